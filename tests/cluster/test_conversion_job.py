"""The Indexed Job of one conversion, without the operator, on a real kubelet: the bytes are the command's own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.conversion.document import validate
from ckpt2pt.conversion.job import build_job
from ckpt2pt.conversion.spec import parse
from conversions import flags_for, topology_of
from harness.kubectl import Kubectl
from harness.pods import host_path


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.suffix in {".pt", ".txt"}
    }


def owner_of(folder: Path) -> int:
    """Who may read a golden set: its files are as MindSpore left them, readable by their owner alone."""
    return folder.stat().st_uid


def document(folder: Path, volume: Path, *, full: bool) -> dict[str, Any]:
    """The conversion of a golden set: source as it lies there, result on a volume of its own."""
    cut, suffix = topology_of(folder), "" if full else "_params"
    return {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": "golden"},
        "spec": {
            "mode": "Full" if full else "ParamsOnly",
            "model": {"numLayers": cut.num_layers},
            "parallelism": {
                "tensor": cut.tensor,
                "pipeline": cut.pipeline,
                "virtualPipeline": cut.virtual,
                "data": cut.data,
            },
            "source": {"volume": host_path(folder), "path": f"ms{suffix}"},
            "metadata": {"path": f"pt_meta{suffix}"},
            "target": {"volume": host_path(volume), "path": "out"},
            "workers": {"security": {"runAsUser": owner_of(folder)}},
        },
    }


@pytest.mark.parametrize("full", [True, False], ids=["full", "params-only"])
def test_a_golden_checkpoint_becomes_the_bytes_of_the_command(
    golden: Path, namespace: Kubectl, volume: Path, tmp_path: Path, converter_image: str, full: bool
) -> None:
    folder = golden / "megatron06" / "b_tp2pp2"
    os.chown(volume, owner_of(folder), -1)  # a worker has no capabilities: root has no other rights than an owner has
    target = tmp_path / "by-command"
    subprocess.run(
        [sys.executable, "-m", "ckpt2pt", "convert", *flags_for(folder, target, full=full)],
        check=True,
        capture_output=True,
    )
    manifest = build_job(parse(validate(document(folder, volume, full=full), where="test")), image=converter_image)
    job = namespace.create(manifest)
    name = job["metadata"]["name"]
    assert job["spec"]["completions"] == 2
    namespace.wait("job", name, "Complete", seconds=180)
    assert namespace.get("job", name)["status"]["completedIndexes"] == "0,1"
    expected = digests(target)
    assert len(expected) == (9 if full else 5)
    assert digests(volume / "out") == expected


def test_a_wrong_layer_count_fails_each_stage_at_once(
    golden: Path, namespace: Kubectl, volume: Path, converter_image: str
) -> None:
    folder = golden / "megatron06" / "b_tp2pp2"
    conversion = document(folder, volume, full=True)
    conversion["spec"]["model"]["numLayers"] = 8
    job = namespace.create(build_job(parse(validate(conversion, where="test")), image=converter_image))
    namespace.wait("job", job["metadata"]["name"], "Failed", seconds=120)
    pods = namespace.get("pods")["items"]
    codes = {pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] for pod in pods}
    assert codes == {65}
    assert len(pods) == 2, "exit 65 fails the index at once"
    assert not os.listdir(volume)
