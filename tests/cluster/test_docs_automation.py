"""The pages of docs/automation, as a new user would try them: what stands in their blocks is what is run.

Only what is a reader's own is replaced: sizes of the model, paths and the iteration; `msrun` is played by the test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckpt2pt.kube.conversion.template import name_for
from conftest import WORKER_UID
from goldens import REPOSITORY
from harness.golden import KIND, document, reach, status
from harness.kubectl import Kubectl
from harness.machine import wait_until
from harness.release import Release
from harness.training import training

DOCS = REPOSITORY / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.fixture(scope="module")
def operator(releases: Callable[..., Release]) -> Iterator[Release]:
    """The operator with the values that the page shows."""
    release = releases()
    [values] = [text for text in blocks("automation/on-the-cluster.md", "yaml") if "trainingKinds" in text]
    release.install(**yaml.safe_load(values))
    yield release
    release.uninstall()


class Desk:
    """A user's terminal: a folder with conversion.yaml, a kubeconfig that names the namespace, kubectl and ckpt2pt."""

    def __init__(self, namespace: Kubectl, checkpoint: Path, volume: Path, folder: Path) -> None:
        self.namespace, self.checkpoint, self.run7, self.folder = namespace, checkpoint, volume / "run7", folder
        self._words = {
            "numLayers: 64": "numLayers: 4", "tensor: 8, pipeline: 4": "tensor: 2, pipeline: 2",
            "--num-layers 64 --tp-size 8 --pp-size 4": "--num-layers 4 --tp-size 2 --pp-size 2",
            "iteration 500": "iteration 2", "iteration=500": "iteration=2", "intervalSeconds: 30": "intervalSeconds: 1",
            "/data/run7": str(self.run7), "/mnt/training": str(volume), "team:trainer": f"{namespace.namespace}:trainer",
            "logs pretrain 3": "logs pretrain 1",
        }  # fmt: skip
        (folder / "conversion.yaml").write_text(self.own(blocks("automation.md", "yaml")[0]))
        for name in ("ms_ckpt", "pt_meta"):
            (folder / name).symlink_to(self.run7 / name)
        msrun = folder / "msrun"
        msrun.write_text(f"#!{sys.executable}\n{self._trainer()}")
        msrun.chmod(0o755)
        config = folder / "kubeconfig"
        shutil.copy(namespace.kubeconfig, config)
        self._environment = {
            **os.environ, "KUBECONFIG": str(config), "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        self(f"kubectl config set-context --current --namespace={namespace.namespace}")

    def _trainer(self) -> str:
        """`msrun`: the four ranks, one after the other."""
        trainer = REPOSITORY / "tests" / "support" / "trainer.py"
        words = [sys.executable, str(trainer), str(self.run7 / "ms_ckpt"), str(self.checkpoint / "ms"), "2", "0"]
        return (
            "import os, subprocess\nfor rank in '0123':\n"
            f"    subprocess.run({words}, env=dict(os.environ, JOB_COMPLETION_INDEX=rank), check=True)\n"
        )

    def own(self, text: str) -> str:
        """A block with the reader's own sizes and paths."""
        for theirs, ours in self._words.items():
            text = text.replace(theirs, ours)
        return text

    def __call__(self, text: str) -> str:
        """Run lines of a shell; what they said."""
        done = subprocess.run(
            ["bash", "-e", "-c", self.own(text)], cwd=self.folder, env=self._environment, capture_output=True, text=True,
            timeout=150, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def train(self, image: str, steps: str = "2", pause: float = 0.2) -> None:
        """The Job `pretrain`, on the cluster."""
        job = training(image, self.checkpoint, self.run7.parent, steps=steps, pause=pause)
        pod = job["spec"]["template"]["spec"]
        pod["securityContext"] = {"runAsUser": WORKER_UID}
        pod["containers"][0]["args"][0] = "/volumes/data/run7/ms_ckpt"
        self.namespace.apply(job)


@pytest.fixture
def desk(
    operator: Release, namespace: Kubectl, kubectl: Kubectl, golden: Path, volume: Path, tmp_path: Path
) -> Iterator[Desk]:
    """The terminal, and the claim `training` that every page names."""
    checkpoint, run7 = golden / "megatron06" / "b_tp2pp2", volume / "run7"
    shutil.copytree(checkpoint / "pt_meta", run7 / "pt_meta")
    (run7 / "ms_ckpt").mkdir()
    for path in (run7, *run7.rglob("*")):
        os.chown(path, WORKER_UID, WORKER_UID)
        path.chmod(0o755 if path.is_dir() else 0o644)
    kubectl.apply(persistent_volume(str(namespace.namespace), volume))
    namespace.apply(claim(str(namespace.namespace)))
    folder = tmp_path / "desk"
    folder.mkdir()
    yield Desk(namespace, checkpoint, volume, folder)
    kubectl("delete", "persistentvolume", str(namespace.namespace), "--wait=false")


def persistent_volume(name: str, folder: Path) -> dict[str, Any]:
    """A folder of this machine as a volume of the cluster."""
    spec = {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteMany"], "storageClassName": ""}
    kind = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}}
    return {**kind, "spec": {**spec, "hostPath": {"path": str(folder), "type": "Directory"}}}


def claim(volume: str) -> dict[str, Any]:
    """The claim of that volume."""
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": volume}
    kind = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "training"}}
    return {**kind, "spec": {**spec, "resources": {"requests": {"storage": "1Gi"}}}}


def test_on_the_cluster(desk: Desk, namespace: Kubectl, converter_image: str) -> None:
    waits, asks, _ = blocks("automation/on-the-cluster.md", "yaml")
    desk(f"kubectl apply -f - <<'EOF'\n{waits}EOF\nkubectl apply -f - <<'EOF'\n{asks}EOF")
    desk.train(converter_image, pause=1.5)
    [annotate] = blocks("automation/on-the-cluster.md", "sh")
    desk(annotate)
    uid = namespace.get("job.batch", "pretrain")["metadata"]["uid"]
    reach(namespace, "Succeeded", "pretrain")
    namespace("wait", "--for=create", f"{KIND}/pretrain-{uid[:8]}", "--timeout=60s")
    reach(namespace, "Succeeded", f"pretrain-{uid[:8]}")
    for target in ("megatron_pt", "pretrain"):
        assert (desk.run7 / target / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_from_the_launcher(desk: Desk, namespace: Kubectl, tmp_path: Path) -> None:
    launch, bind = blocks("automation/launcher.md", "sh")
    [role] = blocks("automation/launcher.md", "yaml")
    desk(f"kubectl create serviceaccount trainer\nkubectl apply -f - <<'EOF'\n{role}EOF\n{bind}")
    desk(f"kubectl auth can-i create ckc --as=system:serviceaccount:{namespace.namespace}:trainer")
    # The ranks write as this user, whose files the workers' user may not read.
    desk("msrun")
    own(desk.run7 / "ms_ckpt")
    (desk.folder / "msrun").write_text("#!/bin/true\n")
    said = desk(launch)
    name = name_for("pretrain", 0, 2)
    assert f"{name}: Succeeded: 100%, 2/2 stages" in said
    assert (desk.run7 / "megatron_pt" / "iter_0000002").is_dir()


def test_from_the_training_process(desk: Desk, namespace: Kubectl) -> None:
    desk("msrun")
    own(desk.run7 / "ms_ckpt")
    call, model, _ = blocks("automation/training-process.md", "python")
    desk(f"python - <<'EOF'\nimport logging\nlogging.basicConfig(level=20)\n{call}EOF")
    reach(namespace, "Succeeded", name_for("run7", 0, 2))
    compile(model, "the page", "exec")


def test_while_the_training_runs(desk: Desk, namespace: Kubectl, converter_image: str) -> None:
    [follow] = blocks("automation/follow.md", "yaml")
    desk(f"kubectl apply -f - <<'EOF'\n{follow}EOF")
    desk.train(converter_image, steps="1,2,3", pause=1.0)
    found = reach(namespace, "Succeeded", "follow-pretrain")
    assert (found["iteration"], found["followEnd"]) == (3, "Succeeded")
    [watch] = blocks("automation/follow.md", "sh")
    (desk.folder / "conversion.yaml").write_text(desk.own(follow))
    by_flags, by_document = watch.strip().splitlines()
    for line in (by_flags, by_document):
        desk(f"{line} --once --progress none")
    assert (desk.folder / "megatron_pt" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_kubectl(desk: Desk, namespace: Kubectl) -> None:
    desk("msrun")
    own(desk.run7 / "ms_ckpt")
    [lines] = blocks("automation/kubectl.md", "sh")
    submit, watch, logs, retry, cancel = lines.strip().splitlines()
    desk(submit)
    assert "pretrain: Succeeded" in desk(watch)
    assert '"iteration": 2' in desk(logs)
    for line, words in ((retry, "only what has Failed is tried again"), (cancel, "it is Succeeded already")):
        with pytest.raises(AssertionError, match=words):
            desk(line)
    assert status(namespace, "pretrain")["phase"] == "Succeeded"
    wrong = document(desk.checkpoint, desk.run7.parent, full=False)
    wrong["spec"]["model"]["numLayers"] = 8
    namespace.apply(wrong)
    reach(namespace, "Failed")
    desk(retry.replace("pretrain", "golden"))
    wait_until("another attempt to fail", lambda: attempt(namespace, "Failed") == 2, seconds=90)
    held = document(desk.checkpoint, desk.run7.parent, full=False)
    held["metadata"]["name"], held["spec"]["suspend"] = "held", True
    namespace.apply(held)
    desk(cancel.replace("pretrain", "held"))
    wait_until("the cancel", lambda: status(namespace, "held").get("phase") == "Cancelled")


def attempt(namespace: Kubectl, phase: str) -> int:
    found = status(namespace)
    return int(found["attempt"]) if found.get("phase") == phase else 0


def own(folder: Path) -> None:
    """Give what this user has written to the workers' user."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, WORKER_UID, WORKER_UID)
