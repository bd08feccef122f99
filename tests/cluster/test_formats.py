"""Jobs into today's Megatron-LM and from it, and several pods that write one distributed checkpoint."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from harness.golden import document, owner_of, reach, reported
from harness.kubectl import Kubectl
from harness.machine import wait_until
from harness.pods import host_path
from msadapter import rewrite

pytestmark = pytest.mark.usefixtures("operator")

ALLOWS = ("podOverrides",)


def contents(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file that Megatron-LM reads."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and ".ckpt2pt" not in path.parts
    }


def converted(words: Iterable[object], target: Path) -> dict[str, str]:
    """What the command makes."""
    program = [sys.executable, "-m", "ckpt2pt", "convert", *map(str, words), "--target", str(target)]
    subprocess.run([*program, "--progress", "none"], check=True, capture_output=True)
    return contents(target)


def of_megatron(name: str, source: Path, volume: Path, form: str, pipeline: int) -> dict[str, Any]:
    """A Megatron checkpoint of two by two ranks, which says everything itself, into another layout."""
    target = {
        "volume": host_path(volume),
        "path": name,
        "format": form,
        "parallelism": {"tensor": 1, "pipeline": pipeline},
    }
    return {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": name},
        "spec": {
            "model": {"numLayers": 4},
            "parallelism": {"tensor": 2, "pipeline": 2},
            "source": {"volume": host_path(source.parent), "path": source.name, "format": "Megatron"},
            "target": target,
            "workers": {"security": {"runAsUser": owner_of(source)}},
        },
    }


def of_mindspore(checkpoint: Path, volume: Path, name: str = "golden", **spec: Any) -> dict[str, Any]:
    """The golden training, written as a distributed checkpoint by a pod for each stage."""
    target = {"volume": host_path(volume), "path": "out", "format": "TorchDist"}
    return document(checkpoint, volume, name=name, target=target, **spec)


# --------------------------------------------------------------------------------------------------------------- formats


def test_every_format_of_today_comes_from_every_other(
    namespace: Kubectl, checkpoint: Path, volume: Path, tmp_path: Path
) -> None:
    source = ["--source", checkpoint / "ms", "--param-map-path", checkpoint / "pt_meta"]
    first = converted([*source, "--target-format", "torch_dist"], tmp_path / "first")
    namespace.apply(of_mindspore(checkpoint, volume))
    old = checkpoint / "A"
    namespace.apply(of_megatron("from-old", old, volume, "TorchDist", 1))
    found = reach(namespace, "Succeeded")
    assert found["stages"]["total"] == 2
    assert reported(found, "Verified") == ("True", "DigestsMatch")
    assert contents(volume / "out") == first
    assert {name for name in first if name.endswith(".distcp")} >= {
        "iter_0000002/__0_0.distcp",
        "iter_0000002/__2_0.distcp",
    }

    namespace.apply(of_megatron("to-torch", volume / "out", volume, "Megatron", 2))
    reach(namespace, "Succeeded", "from-old")
    words = ["--source", old, "--target-format", "torch_dist", "--target-tp-size", 1, "--target-pp-size", 1]
    assert contents(volume / "from-old") == converted(words, tmp_path / "second")
    reach(namespace, "Succeeded", "to-torch")
    words = ["--source", volume / "out", "--target-format", "megatron", "--target-tp-size", 1, "--target-pp-size", 2]
    assert contents(volume / "to-torch") == converted(words, tmp_path / "third")


def test_what_msadapter_wrote_becomes_files_of_torch(
    namespace: Kubectl, checkpoint: Path, volume: Path, tmp_path: Path
) -> None:
    source = rewrite(checkpoint / "A", volume / "in", "msadapter")
    repair = of_megatron("repair", source, volume, "Torch", 2)
    del repair["spec"]["target"]["parallelism"]
    repair["spec"]["source"]["format"] = "MSAdapter"
    namespace.apply(repair)
    found = reach(namespace, "Succeeded", "repair")
    assert found["stages"]["total"] == 2
    made = converted(["--source", source, "--target-format", "torch"], tmp_path / "made")
    assert contents(volume / "repair") == made


def test_experts_go_to_another_expert_parallel_size(
    namespace: Kubectl, checkpoint: Path, golden: Path, volume: Path, tmp_path: Path
) -> None:
    source = golden / "mcore" / "0.19.0" / "moe_ep2"
    for name, form in (("megatron", "Megatron"), ("torch-dist", "TorchDist")):
        wanted = of_megatron(name, source, volume, form, 2)
        wanted["spec"] |= {"model": {"numLayers": 2}, "parallelism": {"tensor": 1, "pipeline": 1}}
        wanted["spec"]["workers"]["security"]["runAsUser"] = owner_of(checkpoint)
        wanted["spec"]["target"]["parallelism"] = {"expert": 4, "pipeline": 2}
        namespace.apply(wanted)
    for name, form in (("megatron", "megatron"), ("torch-dist", "torch_dist")):
        found = reach(namespace, "Succeeded", name)
        assert found["stages"]["total"] == 2
        words = ["--source", source, "--target-format", form, "--target-ep-size", 4, "--target-pp-size", 2]
        assert contents(volume / name) == converted(words, tmp_path / name)


# ----------------------------------------------------------------------------------------------- several pods on one result

CHILD = """
import os, signal, sys, time
from ckpt2pt.__main__ import main
from ckpt2pt.publish import Target, merged
published, bytes_published = Target.publish_iteration, merged.publish_bytes

def publish_iteration(self, *args):
    volume = self.root.parent
    (volume / ("ready-" + os.environ["JOB_COMPLETION_INDEX"])).touch()
    while not (volume / "go").exists():
        time.sleep(0.05)
    return published(self, *args)

def publish_bytes(path, content, **more):
    killed = path.parents[2] / "killed"
    if path.name == KILLED_AT and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    bytes_published(path, content, **more)

Target.publish_iteration, merged.publish_bytes = publish_iteration, publish_bytes
sys.exit(main())
"""
"""A worker that waits for the test before it looks whether all stages are there, and is killed before it writes a file."""

PARENT = """
import subprocess, sys
code = subprocess.run([sys.executable, "-c", {child!r}, *sys.argv[1:]]).returncode
sys.exit(code if code >= 0 else 128 - code)
"""
"""The first process of a container cannot be killed from inside: the worker is its child."""


def held(checkpoint: Path, *, killed_at: str = "") -> dict[str, Any]:
    """Workers that wait for the file ``go`` beside the result when their own stages are written."""
    program = PARENT.format(child=f"KILLED_AT = {killed_at!r}\n{CHILD}")
    override = {"spec": {"containers": [{"name": "convert", "command": ["python3", "-c", program]}]}}
    return {"security": {"runAsUser": owner_of(checkpoint)}, "podOverrides": override}


def wait_ready(volume: Path) -> None:
    wait_until("both stages", lambda: len(list(volume.glob("ready-*"))) == 2, seconds=120)


@pytest.mark.parametrize(
    "killed_at", ["", "common.pt", ".metadata"], ids=["both-finish", "killed-first", "killed-last"]
)
def test_two_that_finish_at_once_make_one_checkpoint_whoever_is_killed(
    namespace: Kubectl, checkpoint: Path, volume: Path, tmp_path: Path, killed_at: str
) -> None:
    namespace.apply(of_mindspore(checkpoint, volume, workers=held(checkpoint, killed_at=killed_at)))
    wait_ready(volume)
    assert not list((volume / "out").glob("*.txt"))
    assert not list((volume / "out").rglob(".metadata"))
    (volume / "go").touch()
    found = reach(namespace, "Succeeded")
    assert (volume / "killed").exists() == bool(killed_at)
    assert reported(found, "Verified") == ("True", "DigestsMatch")
    source = ["--source", checkpoint / "ms", "--param-map-path", checkpoint / "pt_meta"]
    assert contents(volume / "out") == converted([*source, "--target-format", "torch_dist"], tmp_path / "first")


def lost(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "lost": (lost, "removed or cut since"),
    "cut": (cut, "removed or cut since"),
    "changed": (changed, "not as it was written"),
}


def test_a_file_that_is_damaged_before_they_are_joined_is_found(
    namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    folders = {name: volume / name for name in DAMAGES}
    for name, folder in folders.items():
        folder.mkdir()
        os.chown(folder, owner_of(checkpoint), -1)
        once = {"perStage": 0}
        namespace.apply(of_mindspore(checkpoint, folder, name, workers=held(checkpoint), retries=once))
    for name, folder in folders.items():
        wait_ready(folder)
        DAMAGES[name][0](folder / "out" / "iter_0000002" / "__0_0.distcp")
        (folder / "go").touch()
    for name, folder in folders.items():
        _, says = DAMAGES[name]
        found = reach(namespace, "Failed", name)
        stages = [stage for stage in found["stageStatuses"] if stage["state"] == "Failed"]
        assert stages
        assert all(says in stage["message"] for stage in stages), stages
        assert any("stage 0" in stage["message"] for stage in stages)
        assert not (folder / "out" / "latest_checkpointed_iteration.txt").exists()
        assert not list((folder / "out").rglob(".metadata"))
