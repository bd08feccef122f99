"""What can go wrong with workers, on a real cluster.  Each fault is a row of the operator's failure matrix."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoints import Large, Unfinished
from harness.cluster import Cluster
from harness.golden import KIND, blocker, digests, document, events, message, owner_of, reach, reported, status
from harness.kubectl import Kubectl
from harness.machine import ClusterError, wait_until
from harness.release import Release

pytestmark = pytest.mark.usefixtures("operator")

ALLOWS = ("image",)


def jobs(namespace: Kubectl) -> list[str]:
    return sorted(job["metadata"]["name"] for job in namespace.get("jobs")["items"])


def pods(namespace: Kubectl, index: int | None = None) -> list[dict[str, Any]]:
    """The workers, or those of one completion index."""
    chosen = [] if index is None else [f"--selector=batch.kubernetes.io/job-completion-index={index}"]
    found: list[dict[str, Any]] = namespace.get("pods", *chosen)["items"]
    return found


def patch(namespace: Kubectl, spec: dict[str, Any], name: str = "golden") -> None:
    namespace("patch", KIND, name, "--type=merge", "--patch", json.dumps({"spec": spec}))


# --------------------------------------------------------------------------------------------------------------- workers


def test_workers_that_wait_for_a_rank_say_for_which(namespace: Kubectl, unfinished: Unfinished) -> None:
    namespace.apply(unfinished.document())
    found = blocker(namespace, "WaitingForCheckpoint", kind="Ready")
    assert f"rank_{unfinished.last}" in message(found, "Ready")
    assert found["phase"] == "Running"
    assert events(namespace)[-1] == "WaitingForCheckpoint"


def test_a_worker_that_is_deleted_is_replaced(
    namespace: Kubectl, unfinished: Unfinished, expected: dict[str, str]
) -> None:
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    [victim] = pods(namespace, 1)
    namespace("delete", "pod", victim["metadata"]["name"])
    wait_until("another worker", lambda: bool(pods(namespace, 1)) and pods(namespace, 1)[0]["metadata"]["uid"] != victim["metadata"]["uid"])  # fmt: skip
    unfinished.finish()
    found = reach(namespace, "Succeeded")
    assert digests(unfinished.target) == expected
    assert [stage["state"] for stage in found["stageStatuses"]] == ["Succeeded"] * 2
    assert jobs(namespace) == ["golden-1"]


def test_a_worker_that_runs_out_of_memory_gets_more(namespace: Kubectl, checkpoint: Path, volume: Path) -> None:
    """The kernel kills it: a Python that has loaded the converter does not fit into 12 MiB."""
    namespace.apply(
        document(
            checkpoint, volume,
            workers={"security": {"runAsUser": owner_of(checkpoint)}, "processes": 1,
                     "resources": {"requests": {"memory": "12Mi"}, "limits": {"memory": "12Mi"}}},
            retries={"perStage": 0, "memoryGrowthPercent": 400, "maxMemory": "256Mi"},
        )
    )  # fmt: skip
    found = reach(namespace, "Succeeded")
    assert found["attempt"] == 2
    assert jobs(namespace) == ["golden-1", "golden-2"]
    reported_of = events(namespace)
    assert "MemoryGrown" in reported_of
    limits = {
        job["metadata"]["name"]: job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
        for job in namespace.get("jobs")["items"]
    }
    assert limits["golden-1"] == "12Mi"
    assert int(limits["golden-2"]) == 60 << 20
    first = [pod for pod in pods(namespace) if pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] == "golden-1"]
    assert {pod["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] for pod in first} == {"OOMKilled"}


def test_only_a_bad_stage_is_done_again_after_it_was_mended(
    namespace: Kubectl, unfinished: Unfinished, expected: dict[str, str]
) -> None:
    unfinished.finish(spoilt=(b"encoder.final_norm", b"encoder.Final_norm"))
    namespace.apply(unfinished.document())
    found = reach(namespace, "Failed")
    good, bad = found["stageStatuses"]
    assert (good["state"], bad["state"], bad["reason"]) == ("Succeeded", "Failed", "InputWrong")
    assert f"rank_{unfinished.last}" in bad["message"], "it names the file"
    assert "language_model.encoder.Final_norm" in bad["message"], "and what is wrong with it"
    assert reported(found, "Failed") == ("True", "StageFailed")
    assert "kubectl annotate ckc golden" in message(found, "Failed")
    assert not (unfinished.target / "latest_checkpointed_iteration.txt").exists()
    began = namespace.get("pods")["items"]
    unfinished.finish()
    namespace("annotate", KIND, "golden", "ckpt2pt.dev/retry=1")
    found = reach(namespace, "Succeeded")
    assert jobs(namespace) == ["golden-1", "golden-2"]
    assert namespace.get("job", "golden-2")["spec"]["completions"] == 1
    assert namespace.get("job", "golden-2")["metadata"]["annotations"]["ckpt2pt.dev/stages"] == "1"
    assert len(namespace.get("pods")["items"]) == len(began) + 1
    assert digests(unfinished.target) == expected
    # Several come within one second, the grain of their times; and a slow worker may be asked while it looks at files just written.
    reported_of = [event for event in events(namespace) if event != "WaitingForCheckpoint"]
    assert sorted(reported_of) == sorted(
        ["JobCreated", "StageFailed", "StageFailed", "RetryRequested", "JobCreated", "AllStagesSucceeded"]
    )


# --------------------------------------------------------------------------------------------------------------- waiting


def test_a_claim_that_is_missing_is_named_and_waited_for(
    namespace: Kubectl, checkpoint: Path, volume: Path, expected: dict[str, str]
) -> None:
    claim = {"persistentVolumeClaim": {"claimName": "results"}}
    namespace.apply(document(checkpoint, volume, target={"volume": claim, "path": "out"}))
    found = blocker(namespace, "PVCNotFound", kind="VolumesReady")
    assert found["phase"] == "Pending"
    assert 'persistentvolumeclaim "results" not found' in message(found, "VolumesReady")
    assert not jobs(namespace)
    name = f"results-{namespace.namespace}"
    namespace.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": name},
            "spec": {
                "capacity": {"storage": "1Gi"},
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "",
                "hostPath": {"path": str(volume)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "results"},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": "",
                "volumeName": name,
                "resources": {"requests": {"storage": "1Gi"}},
            },
        },
    )
    try:
        found = reach(namespace, "Succeeded")
        assert reported(found, "VolumesReady") == ("True", "Bound")
        assert digests(volume / "out") == expected
    finally:
        namespace("delete", "persistentvolume", name, "--wait=false")


def test_an_image_that_cannot_be_pulled_is_reported_and_given_up_in_time(
    namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    workers = {"security": {"runAsUser": owner_of(checkpoint)}, "image": "nowhere.invalid/ckpt2pt:0"}
    namespace.apply(document(checkpoint, volume, workers=workers, pendingDeadlineSeconds=12))
    found = blocker(namespace, "ImagePullBackOff")
    assert "nowhere.invalid/ckpt2pt:0" in message(found, "Degraded")
    found = reach(namespace, "Failed")
    assert reported(found, "Failed") == ("True", "PendingDeadline")
    assert "nowhere.invalid/ckpt2pt:0" in message(found, "Failed")
    namespace.wait_gone("job", "golden-1")


def test_workers_that_no_node_takes_are_reported(namespace: Kubectl, checkpoint: Path, volume: Path) -> None:
    workers = {"security": {"runAsUser": owner_of(checkpoint)}, "nodeSelector": {"disk": "fast"}}
    namespace.apply(document(checkpoint, volume, workers=workers, pendingDeadlineSeconds=8))
    found = blocker(namespace, "Unschedulable")
    assert "node affinity/selector" in message(found, "Degraded")
    assert reported(reach(namespace, "Failed"), "Failed") == ("True", "PendingDeadline")


@pytest.mark.parametrize(
    ("hard", "object_refused"), [({"pods": "0"}, "pod"), ({"count/jobs.batch": "0"}, "job")], ids=["pods", "jobs"]
)
def test_a_quota_that_refuses_is_reported_and_waited_for(
    namespace: Kubectl, checkpoint: Path, volume: Path, hard: dict[str, str], object_refused: str
) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": hard}}
    namespace.apply(quota)
    wait_until("the quota", lambda: "hard" in namespace.get("resourcequota", "none").get("status", {}))
    namespace.apply(document(checkpoint, volume))
    kind = "Degraded" if object_refused == "pod" else "Ready"
    found = blocker(namespace, "QuotaExceeded", kind=kind, seconds=120)
    assert "exceeded quota: none" in message(found, kind)
    namespace("delete", "resourcequota", "none")
    reach(namespace, "Succeeded", seconds=150)


def test_a_quota_that_comes_while_workers_run_ends_it_in_time(namespace: Kubectl, unfinished: Unfinished) -> None:
    namespace.apply(unfinished.document(pendingDeadlineSeconds=10))
    reach(namespace, "Running")
    namespace("create", "quota", "none", "--hard=pods=0")
    wait_until("the quota", lambda: "hard" in namespace.get("resourcequota", "none").get("status", {}))
    namespace("delete", "pods", "--all", "--wait=false")
    blocker(namespace, "QuotaExceeded", seconds=90)
    found = reach(namespace, "Failed")
    assert reported(found, "Failed") == ("True", "PendingDeadline")
    assert "QuotaExceeded: " in message(found, "Failed")
    assert not jobs(namespace)


def test_pod_security_that_refuses_is_reported(namespace: Kubectl, checkpoint: Path, volume: Path) -> None:
    """``restricted`` admits neither hostPath nor root."""
    namespace("label", "namespace", str(namespace.namespace), "pod-security.kubernetes.io/enforce=restricted")
    namespace.apply(document(checkpoint, volume))
    found = blocker(namespace, "PodRejected", seconds=120)
    assert "violates PodSecurity" in message(found, "Degraded")


# ------------------------------------------------------------------------------------------------- what users do meanwhile


def test_a_job_that_is_deleted_is_made_anew_but_not_for_ever(namespace: Kubectl, unfinished: Unfinished) -> None:
    namespace.apply(unfinished.document())
    for recreation in range(1, 4):
        reach(namespace, "Running")
        uid = namespace.get("job", "golden-1")["metadata"]["uid"]
        namespace("delete", "job", "golden-1")
        wait_until("the Job to be made anew", lambda before=uid: namespace.exists("job", "golden-1") and namespace.get("job", "golden-1")["metadata"]["uid"] != before, seconds=90)  # type: ignore[misc]  # fmt: skip
        wait_until("it to be counted", lambda number=recreation: status(namespace).get("jobRecreations") == number)  # type: ignore[misc]
    reach(namespace, "Running")
    namespace("delete", "job", "golden-1")
    found = reach(namespace, "Failed")
    assert reported(found, "Failed") == ("True", "JobDeleted")
    assert events(namespace).count("JobRecreated") == 1, "one event, counted"


def test_a_conversion_that_is_suspended_goes_on_where_it_was(
    namespace: Kubectl, unfinished: Unfinished, expected: dict[str, str]
) -> None:
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    patch(namespace, {"suspend": True})
    found = reach(namespace, "Suspended")
    assert reported(found, "Suspended") == ("True", "UserRequested")
    wait_until("the workers to be gone", lambda: not pods(namespace), seconds=90)
    unfinished.finish()
    patch(namespace, {"suspend": False})
    reach(namespace, "Succeeded")
    assert digests(unfinished.target) == expected
    assert "Resumed" in events(namespace)


def test_no_deadline_runs_while_a_conversion_is_suspended_before_it_has_a_job(
    namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    claim = {"volume": {"persistentVolumeClaim": {"claimName": "nowhere"}}, "path": "out"}
    namespace.apply(document(checkpoint, volume, target=claim, suspend=True, pendingDeadlineSeconds=4))
    found = blocker(namespace, "PVCNotFound", kind="VolumesReady")
    assert (found["phase"], reported(found, "Suspended")) == ("Suspended", ("True", "UserRequested"))
    time.sleep(6)
    patch(namespace, {"suspend": False})
    reach(namespace, "Pending")
    assert reported(reach(namespace, "Failed"), "Failed") == ("True", "PendingDeadline")


def test_what_comes_too_early_or_is_a_queues_to_do_is_reported(namespace: Kubectl, unfinished: Unfinished) -> None:
    """No Kueue runs here, so that the Job is not held back: what it would have admitted."""
    workers = unfinished.document()["spec"]["workers"]
    namespace.apply(unfinished.document(workers={**workers, "queueName": "research"}))
    reach(namespace, "Running")
    patch(namespace, {"suspend": True})
    found = blocker(namespace, "QueueDecides", kind="Suspended")
    assert found["phase"] == "Running"
    assert "spec.active" in message(found, "Suspended")
    namespace("annotate", KIND, "golden", "ckpt2pt.dev/retry=1")
    wait_until("the token", lambda: status(namespace).get("retryToken") == "1")
    wait_until("its event", lambda: "RetryIgnored" in events(namespace))
    unfinished.finish()
    reach(namespace, "Succeeded")
    assert jobs(namespace) == ["golden-1"]


def test_a_conversion_that_is_cancelled_ends_and_stays_so(namespace: Kubectl, unfinished: Unfinished) -> None:
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    patch(namespace, {"cancel": True})
    found = reach(namespace, "Cancelled")
    assert reported(found, "Failed") == ("True", "Cancelled")
    namespace.wait_gone("job", "golden-1")
    wait_until("its pods to be collected", lambda: not pods(namespace))
    with pytest.raises(ClusterError, match="cancel"):
        patch(namespace, {"cancel": False})


def test_an_edit_of_what_is_fixed_is_refused_in_words(namespace: Kubectl, unfinished: Unfinished) -> None:
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    with pytest.raises(ClusterError, match="is fixed; make a new CheckpointConversion"):
        patch(namespace, {"verify": "None"})
    with pytest.raises(ClusterError, match="is fixed"):
        patch(namespace, {"startAfter": {"apiVersion": "batch/v1", "kind": "Job", "name": "x"}})


def test_fewer_workers_at_a_time_can_be_had_while_it_runs(namespace: Kubectl, unfinished: Unfinished) -> None:
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    patch(namespace, {"workers": {"maxParallelStages": 1}})
    wait_until("one worker", lambda: namespace.get("job", "golden-1")["spec"]["parallelism"] == 1)
    unfinished.finish()
    reach(namespace, "Succeeded")


def test_an_active_deadline_ends_it(namespace: Kubectl, unfinished: Unfinished) -> None:
    namespace.apply(unfinished.document(activeDeadlineSeconds=8))
    found = reach(namespace, "Failed")
    assert reported(found, "Failed") == ("True", "ActiveDeadline")
    assert "spec.activeDeadlineSeconds" in message(found, "Failed")


def test_a_finished_job_goes_in_its_time_and_its_results_stay(
    namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    namespace.apply(document(checkpoint, volume, ttlSecondsAfterFinished=1))
    before = reach(namespace, "Succeeded")
    namespace.wait_gone("job", "golden-1")
    time.sleep(1)
    assert status(namespace)["stageStatuses"] == before["stageStatuses"]
    assert jobs(namespace) == []


# --------------------------------------------------------------------------------------------------------------- deletion


def test_a_conversion_that_is_deleted_leaves_nothing_behind(namespace: Kubectl, large: Large) -> None:
    namespace.apply(large.document())
    wait_until("bytes to be written", large.is_writing, seconds=90)
    namespace("delete", KIND, "large")
    namespace.wait_gone("job", "large-1")
    wait_until("the workers to be gone", lambda: not pods(namespace), seconds=90)
    assert large.partials() == [], "the workers were asked to stop and removed what they had begun"
    assert not (large.target / "latest_checkpointed_iteration.txt").exists()


def test_and_neither_does_one_that_is_deleted_while_the_operator_is_down(
    namespace: Kubectl, large: Large, operator: Release
) -> None:
    namespace.apply(large.document())
    wait_until("bytes to be written", large.is_writing, seconds=90)
    operator.scale(0)
    try:
        namespace("delete", KIND, "large")
        namespace.wait_gone("job", "large-1")
        wait_until("the workers to be gone", lambda: not pods(namespace), seconds=90)
        assert large.partials() == []
    finally:
        operator.scale(1)


# --------------------------------------------------------------------------------------------------------- the operator


def test_an_operator_that_is_killed_while_workers_run_goes_on_where_it_was(
    operator: Release, namespace: Kubectl, unfinished: Unfinished, expected: dict[str, str]
) -> None:
    namespace.apply(unfinished.document())
    before = reach(namespace, "Running")
    made = namespace.get("job", "golden-1")["metadata"]["uid"]
    operator.kill()
    after = status(namespace)
    assert (after["phase"], after["startTime"]) == ("Running", before["startTime"])
    unfinished.finish()
    reach(namespace, "Succeeded")
    assert namespace.get("job", "golden-1")["metadata"]["uid"] == made
    assert jobs(namespace) == ["golden-1"]
    assert digests(unfinished.target) == expected


def test_an_api_server_that_is_restarted_while_workers_run_is_no_more_than_a_pause(
    operator: Release, cluster: Cluster, namespace: Kubectl, unfinished: Unfinished, expected: dict[str, str]
) -> None:
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    made = namespace.get("job", "golden-1")["metadata"]["uid"]
    cluster.restart_apiserver()
    unfinished.finish()
    reach(namespace, "Succeeded")
    assert namespace.get("job", "golden-1")["metadata"]["uid"] == made
    assert digests(unfinished.target) == expected
    [pod] = operator.pods()
    assert pod["status"]["containerStatuses"][0]["ready"]


def test_a_kubelet_that_is_away_for_a_while_loses_nothing(
    cluster: Cluster, namespace: Kubectl, unfinished: Unfinished
) -> None:
    """What workers write meanwhile is reported when it is back."""
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    cluster.node.kubelet.stop(kill=True)
    try:
        unfinished.finish()
        wait_until("the result", (unfinished.target / "latest_checkpointed_iteration.txt").exists, seconds=60)
    finally:
        cluster.node.kubelet.start()
    found = reach(namespace, "Succeeded")
    assert [stage["attempts"] for stage in found["stageStatuses"]] == [1, 1]
    assert found["iteration"] == 2
