"""A conversion asked for by hand, by a launcher and by a training: ``kubectl ckpt2pt``, ``submit``, ``submit_conversion``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ckpt2pt.kube.conversion.template import name_for
from harness.golden import KIND, by_command, digests, document, reach, status
from harness.kubectl import Kubectl
from harness.machine import wait_until
from harness.release import Release
from harness.training import training, waiting


@pytest.fixture(scope="module")
def operator(releases: Callable[..., Release]) -> Iterator[Release]:
    """The operator, with the role for trainings that submit."""
    release = releases()
    release.install(rbac={"submitter": {"enabled": True}})
    yield release
    release.uninstall()


# -------------------------------------------------------------------------------------------------------------- kubectl


class Plugin:
    """``kubectl ckpt2pt`` as a user types it: kubectl finds the program of this installation on the PATH."""

    def __init__(self, kubectl: Kubectl) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path, "KUBECONFIG": str(kubectl.kubeconfig)}
        self._where = ("--namespace", str(kubectl.namespace))

    def __call__(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = ["kubectl", "ckpt2pt", *map(str, words), *self._where]
        return subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=150, check=False)


def test_kubectl_submits_follows_and_shows_the_log_of_a_stage(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, tmp_path: Path
) -> None:
    plugin, path = Plugin(namespace), tmp_path / "conversion.json"
    path.write_text(json.dumps(document(checkpoint, volume)))
    done = plugin("submit", "-f", path, "--wait")
    assert done.returncode == 0, done.stderr
    assert "golden: Succeeded: 100%, 2/2 stages; all 2 stages are converted" in done.stdout
    assert f"CheckpointConversion {namespace.namespace}/golden is made" in done.stderr
    again = plugin("submit", "-f", path, "--output", "json", "--wait")
    assert (again.returncode, json.loads(again.stdout)["status"]["phase"]) == (0, "Succeeded"), "the same, once"
    for stage in (0, 1):
        log = plugin("logs", "golden", stage)
        assert log.returncode == 0, log.stderr
        assert f'"stages": [\n  {stage}\n ]' in log.stdout
    missing = plugin("logs", "golden", 7)
    assert (missing.returncode, "there is no stage 7" in missing.stderr) == (64, True)


def test_kubectl_tries_again_what_has_failed(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path
) -> None:
    plugin = Plugin(namespace)
    for rank in (0, 1):
        (volume / "ms").mkdir(exist_ok=True)
        os.symlink(f"/nowhere/rank_{rank}", volume / "ms" / f"rank_{rank}")
    namespace.apply(waiting(checkpoint, volume, after=None, readiness={"timeoutSeconds": 0}))
    watched = plugin("watch", "golden")
    assert watched.returncode == 66, watched.stderr
    assert "golden: Failed: " in watched.stdout
    for rank in range(4):
        (volume / "ms" / f"rank_{rank}").unlink(missing_ok=True)
        (volume / "ms" / f"rank_{rank}").mkdir()
        [file] = (checkpoint / "ms" / f"rank_{rank}").glob("*.ckpt")
        (volume / "ms" / f"rank_{rank}" / file.name).write_bytes(file.read_bytes())
    retried = plugin("retry", "golden")
    assert (retried.returncode, retried.stdout) == (0, "the failed stages of golden are tried again\n")
    wait_until("another attempt", lambda: status(namespace)["phase"] != "Failed", seconds=30)
    assert plugin("watch", "golden").returncode == 0
    assert status(namespace)["attempt"] == 2


def test_kubectl_cancels(operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path) -> None:
    plugin = Plugin(namespace)
    namespace.apply(waiting(checkpoint, volume))
    impatient = plugin("watch", "golden", "--wait-timeout", "1")
    assert impatient.returncode == 75
    assert "it has not ended within 1 s (Pending)" in impatient.stderr
    cancelled = plugin("cancel", "golden")
    assert (cancelled.returncode, cancelled.stdout) == (0, "golden is cancelled; what is finished stays\n")
    watched = plugin("watch", "golden")
    assert watched.returncode == 75
    assert "golden: Cancelled: " in watched.stdout
    unknown = plugin("cancel", "silver")
    assert unknown.returncode == 66
    assert "silver" in unknown.stderr


# ----------------------------------------------------------------------------------------------------- from inside pods


@pytest.fixture
def trainer(operator: Release, namespace: Kubectl, checkpoint: Path, volume: Path) -> dict[str, Any]:
    """What the pod of a training needs to submit: an account with the chart's role, and the template."""
    name = str(namespace.namespace)
    namespace("create", "serviceaccount", "trainer")
    namespace(
        "create", "rolebinding", "trainer", f"--clusterrole={operator.name}-submit", f"--serviceaccount={name}:trainer"
    )
    template = waiting(checkpoint, volume, after=None)
    template["metadata"] = {"name": "pretrain"}
    template["spec"]["source"]["iteration"] = "${iteration}"
    data = {"conversion.yaml": yaml.safe_dump(template)}
    namespace.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "conversion"}, "data": data})
    return {
        "serviceAccountName": "trainer",
        "automountServiceAccountToken": True,
        "volumes": [{"name": "template", "configMap": {"name": "conversion"}}],
    }


def submitting(job: dict[str, Any], trainer: dict[str, Any], *more: str) -> dict[str, Any]:
    """A training whose program goes on with ``more`` when it has saved."""
    pod = job["spec"]["template"]["spec"]
    pod |= {**trainer, "volumes": [*pod["volumes"], *trainer["volumes"]]}
    [container] = pod["containers"]
    container["volumeMounts"].append({"name": "template", "mountPath": "/template"})
    code = container["command"][-1].replace("    sys.exit(main())\n", "    main()\n")
    container["command"][-1] = code + "".join(f"    {line}\n" for line in more)
    return job


def test_a_launcher_submits_when_the_training_has_ended(
    operator: Release,
    namespace: Kubectl,
    checkpoint: Path,
    volume: Path,
    converter_image: str,
    trainer: dict[str, Any],
    tmp_path: Path,
) -> None:
    # What `msrun ... && ckpt2pt submit ...` is in a shell; the image has none.
    words = [
        "ckpt2pt",
        "submit",
        "-f",
        "/template/conversion.yaml",
        "--ready-in",
        "/volumes/data/ms",
        "--iteration",
        "2",
    ]
    job = training(converter_image, checkpoint, volume, pause=0.2)
    namespace.apply(submitting(job, trainer, f"os.execvp('ckpt2pt', {words})"))
    namespace.wait("job.batch", "pretrain", "Complete", seconds=90)
    name = name_for("pretrain", 0, 2)
    reach(namespace, "Succeeded", name)
    assert [item["metadata"]["name"] for item in namespace.get(KIND)["items"]] == [name], "four ranks, once"
    assert digests(volume / "out") == by_command(checkpoint, tmp_path / "by", full=True)


def test_a_training_without_callbacks_submits_on_every_rank_and_makes_one(
    operator: Release, namespace: Kubectl, checkpoint: Path, volume: Path, converter_image: str, trainer: dict[str, Any]
) -> None:
    job = training(converter_image, checkpoint, volume, pause=0.2)
    call = (
        "submit_conversion('/template/conversion.yaml', output_dir='/volumes/data/ms', run='run7', iteration=2,"
        " rank=int(os.environ['JOB_COMPLETION_INDEX']))"
    )
    logs = "import logging; logging.basicConfig(level=logging.INFO)"
    namespace.apply(submitting(job, trainer, logs, "from ckpt2pt.hooks import submit_conversion", call))
    namespace.wait("job.batch", "pretrain", "Complete", seconds=120)
    name = name_for("run7", 0, 2)
    reach(namespace, "Succeeded", name)
    assert [item["metadata"]["name"] for item in namespace.get(KIND)["items"]] == [name]
    said = namespace("logs", "--selector=job-name=pretrain", "--tail=-1")
    assert f"conversion {name} is submitted" in said
