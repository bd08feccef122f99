"""The operator, installed by its chart: from ``kubectl apply`` to the files, as README.md shows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.golden import KIND, by_command, digests, document, events, message, reach, reported, status
from harness.kubectl import Kubectl
from harness.pods import host_path
from harness.release import Release
from statuses import check_status


@pytest.mark.parametrize("full", [True, False], ids=["full", "params-only"])
def test_a_golden_checkpoint_becomes_the_bytes_of_the_command(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, tmp_path: Path, full: bool
) -> None:
    expected = by_command(checkpoint, tmp_path / "by-command", full=full)
    namespace.apply(document(checkpoint, volume, full=full))
    namespace("wait", "--for=condition=Complete", f"{KIND}/golden", "--timeout=120s", seconds=150)
    assert digests(volume / "out") == expected
    found = status(namespace)
    check_status(found)
    assert (found["phase"], found["progress"], found["stageSummary"]) == ("Succeeded", "100%", "2/2")
    assert found["iteration"] == 2
    assert found["outputPath"] == "out/iter_0000002"
    assert (volume / found["reportPath"]).is_file()
    assert found["stages"] == {"total": 2, "active": 0, "succeeded": 2, "failed": 0}
    for stage in found["stageStatuses"]:
        assert (stage["state"], stage["attempts"], stage["node"]) == ("Succeeded", 1, "ckpt2pt-node")
        assert stage["bytes"] == stage["bytesTotal"] > 0
        assert stage["throughput"] > 0
    assert found["bytesDone"] == sum(stage["bytes"] for stage in found["stageStatuses"])
    assert reported(found, "Verified") == ("True", "DigestsMatch")
    assert reported(found, "Ready") == ("True", "AllStagesSucceeded")
    assert events(namespace) == ["JobCreated", "AllStagesSucceeded"]
    columns = namespace("get", "ckc").split("\n")[1].split()
    assert columns[:6] == ["golden", "Succeeded", "100%", "2/2", "2", "AllStagesSucceeded"]
    assert not namespace.get(KIND, "golden")["metadata"].get("finalizers")
    assert set(namespace.get(KIND, "golden")["metadata"].get("annotations", {})) <= {
        "kubectl.kubernetes.io/last-applied-configuration"
    }, "kopf writes nothing there"


def test_a_megatron_checkpoint_becomes_mindspores_files(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path, tmp_path: Path
) -> None:
    """The other direction by the same operator: a worker for each stage of the result."""
    words = ["--megatron-path", str(checkpoint / "A"), "--ms-path", str(tmp_path / "ms")]
    subprocess.run([sys.executable, "-m", "ckpt2pt", "import", *words], check=True, capture_output=True)
    wanted = {"path": "back", "format": "MindSpore", "volume": host_path(volume)}
    imported = document(checkpoint, volume, target=wanted, verify="Full")
    imported["spec"]["source"]["path"] = "A"
    del imported["spec"]["metadata"]
    namespace.apply(imported)
    found = reach(namespace, "Succeeded")
    check_status(found)
    assert (found["stageSummary"], found["iteration"], found["outputPath"]) == ("2/2", 2, "back")
    assert reported(found, "Verified") == ("True", "SourceMatches")
    assert (volume / found["reportPath"]).is_file()

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("[!.]*/*")}

    assert files(volume / "back") == files(tmp_path / "ms")


def test_a_dry_run_reports_and_writes_nothing(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path
) -> None:
    namespace.apply(document(checkpoint, volume, dryRun=True))
    found = reach(namespace, "Planned")
    check_status(found)
    assert reported(found, "Complete")[0] == "True"
    size = r"[1-9][0-9.]* [KMGT]iB"
    said = rf"[1-9]\d* files are planned: {size} to read, {size} to write with {size} free, at most {size} of memory for a worker"
    assert re.match(said, message(found, "Ready")), message(found, "Ready")
    assert len(namespace.get("pods")["items"]) == 1
    assert not os.listdir(volume)


def test_every_element_can_be_verified(operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path) -> None:
    namespace.apply(document(checkpoint, volume, verify="Full"))
    found = reach(namespace, "Succeeded")
    assert reported(found, "Verified")[0] == "True"


def test_a_wrong_layer_count_says_what_is_wrong_and_how_to_correct_it(
    operator: Release, checkpoint: Path, namespace: Kubectl, volume: Path
) -> None:
    wrong = document(checkpoint, volume, model={"numLayers": 8})
    namespace.apply(wrong)
    found = reach(namespace, "Failed")
    check_status(found)
    assert reported(found, "Failed") == ("True", "StageFailed")
    assert "spec.model.numLayers" in message(found, "Failed")
    assert {stage["reason"] for stage in found["stageStatuses"]} == {"InputWrong"}
    assert all(stage["attempts"] == 1 for stage in found["stageStatuses"]), "what cannot help is not tried again"
    assert not os.listdir(volume)
    assert events(namespace)[-1] == "StageFailed"
