"""The Indexed Job of one conversion, without the operator, on a real kubelet: the bytes are the command's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt2pt.kube.conversion.document import validate
from ckpt2pt.kube.conversion.job import build_job
from ckpt2pt.kube.conversion.spec import parse
from harness.golden import by_command, digests, document, owner_of
from harness.kubectl import Kubectl


@pytest.mark.parametrize("full", [True, False], ids=["full", "params-only"])
def test_a_golden_checkpoint_becomes_the_bytes_of_the_command(
    golden: Path, namespace: Kubectl, volume: Path, tmp_path: Path, converter_image: str, full: bool
) -> None:
    folder = golden / "megatron06" / "b_tp2pp2"
    os.chown(volume, owner_of(folder), -1)  # a worker has no capabilities: root has no other rights than an owner has
    manifest = build_job(parse(validate(document(folder, volume, full=full), where="test")), image=converter_image)
    job = namespace.create(manifest)
    name = job["metadata"]["name"]
    assert job["spec"]["completions"] == 2
    namespace.wait("job", name, "Complete", seconds=180)
    assert namespace.get("job", name)["status"]["completedIndexes"] == "0,1"
    expected = by_command(folder, tmp_path / "by-command", full=full)
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
