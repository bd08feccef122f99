"""Nothing is reported done that is not, and nothing that is done is reported otherwise: against the files on the volume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.checkpoints import Large
from harness.golden import KIND, digests, document, message, owner_of, reach, reported, status
from harness.kubectl import Kubectl
from harness.machine import ClusterError, run, wait_until
from harness.release import Release
from helm import helm
from statuses import check_status, kstatus

TRACKER = "latest_checkpointed_iteration.txt"
ALLOWS = ("podOverrides",)


def running(words: list[str], checkpoint: Path) -> dict[str, Any]:
    """Workers whose container runs something else."""
    override = {"spec": {"containers": [{"name": "convert", "command": words}]}}
    return {"security": {"runAsUser": owner_of(checkpoint)}, "podOverrides": override}


# -------------------------------------------------------------------------------------------------------- exit code 0 alone

CLAIM = """
import json, os
said = {"version": 1, "exitCode": 0, "reason": "Converted", "stages": [7], "iteration": 2, "verified": "full"}
open("/dev/termination-log", "w").write(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("pass", "it ended with exit code 0 and left no report of ckpt2pt"),
        (CLAIM, "its report is of stages 7, not 0"),
        ("open('/dev/termination-log', 'w').write('\\x1b[2Jdone ' * 2000)", "it left:  [2Jdone"),
    ],
    ids=["nothing", "of-another-stage", "noise"],
)
def test_a_worker_that_ends_with_0_and_has_done_nothing_has_failed(
    operator: Release, namespace: Kubectl, checkpoint: Path, volume: Path, program: str, says: str
) -> None:
    namespace.apply(document(checkpoint, volume, workers=running(["python3", "-c", program], checkpoint)))
    found = reach(namespace, "Failed")
    check_status(found)
    assert {stage["reason"] for stage in found["stageStatuses"]} == {"NoReport"}
    assert says.replace("  ", " ") in found["stageStatuses"][0]["message"].replace("  ", " ")
    assert reported(found, "Verified") == ("False", "NotYet")
    assert not list(volume.iterdir())


def test_pods_that_are_gone_before_an_operator_saw_them_prove_nothing_and_cost_nothing(
    operator: Release, namespace: Kubectl, checkpoint: Path, volume: Path, expected: dict[str, str]
) -> None:
    namespace.apply(document(checkpoint, volume))
    reach(namespace, "Running")
    operator.scale(0)
    wait_until("the Job to end", lambda: namespace.condition("job", "golden-1").get("Complete") == "True")
    before = {path: path.stat().st_mtime_ns for path in (volume / "out").rglob("*.pt")}
    namespace("delete", "pods", "--all")
    operator.scale(1)
    found = reach(namespace, "Succeeded")
    assert (found["attempt"], reported(found, "Verified")) == (2, ("True", "DigestsMatch"))
    assert digests(volume / "out") == expected
    assert before == {path: path.stat().st_mtime_ns for path in (volume / "out").rglob("*.pt")}, (
        "nothing is written again"
    )


# ---------------------------------------------------------------------------------------------------------------- late ends


def cancel(namespace: Kubectl) -> None:
    namespace("patch", KIND, "large", "--type=merge", "--patch", json.dumps({"spec": {"cancel": True}}))


def delete(namespace: Kubectl) -> None:
    namespace("delete", "job", "large-1", "--wait=false")


@pytest.mark.parametrize("killed", [False, True], ids=["", "operator-killed"])
@pytest.mark.parametrize("stop", [cancel, delete])
def test_what_is_reported_after_a_late_end_is_what_lies_on_the_volume(
    operator: Release, namespace: Kubectl, large: Large, stop: Callable[[Kubectl], None], killed: bool
) -> None:
    """Every rank is there, and the workers are about to publish."""
    namespace.apply(large.document(mode="ParamsOnly"))

    def ranks() -> bool:
        return len(list(large.target.rglob(".ckpt2pt/rank-*.json"))) == 2

    wait_until("both ranks", ranks, seconds=240)
    stop(namespace)
    if killed:
        operator.kill()
    wait_until("an end", lambda: status(namespace, "large").get("phase") in {"Succeeded", "Cancelled"}, seconds=240)
    found = status(namespace, "large")
    check_status(found)
    done = len(list(large.target.rglob(".ckpt2pt/stage-*.json")))
    published = (large.target / TRACKER).is_file()
    if killed and found["phase"] == "Cancelled" and "nobody saw" in message(found, "Ready"):
        return  # its workers ended while no operator was there, and it says so
    assert found["stages"]["succeeded"] == done
    assert (found["phase"] == "Succeeded") == published


# ------------------------------------------------------------------------------------------------------------- refused Jobs


def test_a_job_that_is_refused_has_a_pending_deadline(
    operator: Release, namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    namespace("create", "quota", "none", "--hard=count/jobs.batch=0")
    wait_until("the quota", lambda: "hard" in namespace.get("resourcequota", "none").get("status", {}))
    namespace.apply(document(checkpoint, volume, pendingDeadlineSeconds=15))
    wait_until("the refusal", lambda: "pendingSince" in status(namespace))
    found = status(namespace)
    assert (reported(found, "Degraded"), reported(found, "Stalled")[0]) == (("True", "QuotaExceeded"), "False")
    found = reach(namespace, "Failed", seconds=60)
    assert reported(found, "Failed") == ("True", "PendingDeadline")
    assert "QuotaExceeded: jobs.batch" in message(found, "Failed")


def test_a_job_that_no_api_server_takes_ends_at_once(
    operator: Release, namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    namespace.apply(document(checkpoint, volume, workers={"podOverrides": {"spec": {"containers": "nonsense"}}}))
    found = reach(namespace, "Failed", seconds=30)
    assert (reported(found, "Failed"), reported(found, "Accepted")[0]) == (("True", "InvalidSpec"), "False")
    assert "cannot unmarshal string" in message(found, "Failed")


def test_a_training_of_a_kind_that_nobody_watches(
    operator: Release, namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    after = {"apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "name": "train-x"}
    namespace.apply(document(checkpoint, volume, startAfter=after))
    wait_until("a word", lambda: bool(status(namespace).get("conditions")))
    found = status(namespace)
    assert reported(found, "Stalled") == ("True", "TrainingKindUnknown")
    assert "batch.volcano.sh/v1alpha1 Job, which this operator does not watch; it watches batch/v1 Job" in message(
        found, "Ready"
    )
    warned = namespace.get("events", "--field-selector=type=Warning,reason=TrainingKindUnknown")["items"]
    assert len(warned) == 1


# --------------------------------------------------------------------------------------------------------------- helm --wait


def chart_of(folder: Path, conversion: dict[str, Any]) -> Path:
    """A chart with this one object."""
    (folder / "templates").mkdir(parents=True)
    (folder / "Chart.yaml").write_text("apiVersion: v2\nname: one\nversion: 0.1.0\n")
    (folder / "templates" / "conversion.yaml").write_text(yaml.safe_dump(conversion))
    return folder


def install(namespace: Kubectl, chart: Path, seconds: int) -> str:
    words = ("install", "one", chart, "--namespace", str(namespace.namespace), "--wait", "--timeout", f"{seconds}s")
    return run(helm("v4"), "--kubeconfig", namespace.kubeconfig, *words, seconds=seconds + 60)


def test_helm_waits_where_no_operator_looks(
    operator: Release, namespace: Kubectl, checkpoint: Path, volume: Path, tmp_path: Path
) -> None:
    chart = chart_of(tmp_path / "chart", document(checkpoint, volume))
    operator.scale(0)
    try:
        began = time.monotonic()
        with pytest.raises(ClusterError):
            install(namespace, chart, 10)
        assert time.monotonic() - began >= 10
        conversion = namespace.get(KIND, "golden")
    finally:
        operator.scale(1)
    assert conversion["status"] == {"observedGeneration": -1}
    assert kstatus(conversion["status"], conversion["metadata"]["generation"]) == "InProgress"


@pytest.mark.parametrize("good", [True, False], ids=["succeeds", "fails"])
def test_helm_waits_for_the_end(
    operator: Release, namespace: Kubectl, checkpoint: Path, volume: Path, tmp_path: Path, good: bool
) -> None:
    wanted = document(checkpoint, volume)
    if not good:
        wanted["spec"]["source"]["path"] = "nowhere"
        wanted["spec"]["readiness"] = {"timeoutSeconds": 0}
    chart = chart_of(tmp_path / "chart", wanted)
    if good:
        assert "STATUS: deployed" in install(namespace, chart, 120)
        assert status(namespace)["phase"] == "Succeeded"
        assert (volume / "out" / TRACKER).is_file()
        return
    with pytest.raises(ClusterError, match="nowhere"):
        install(namespace, chart, 60)
    assert status(namespace)["phase"] == "Failed"
