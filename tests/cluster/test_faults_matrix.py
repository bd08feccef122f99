"""The rows of the operator's failure matrix that the other files have not: nodes, volumes, and what ends a Job at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.checkpoints import Unfinished
from harness.cluster import Cluster
from harness.golden import KIND, blocker, by_command, digests, document, events, message, owner_of, reach, reported
from harness.kubectl import Kubectl
from harness.machine import run
from harness.pods import host_path

pytestmark = pytest.mark.usefixtures("operator")

ONE_TRY = {"perStage": 0}
ALLOWS = ("podOverrides",)


def pod_of(namespace: Kubectl, index: int) -> str:
    """The name of the one worker of a stage."""
    [found] = namespace.get("pods", f"--selector=batch.kubernetes.io/job-completion-index={index}")["items"]
    return str(found["metadata"]["name"])


# ----------------------------------------------------------------------------------------------------------------- nodes


def test_a_worker_that_is_evicted_costs_no_try(namespace: Kubectl, unfinished: Unfinished, tmp_path: Path) -> None:
    """As by a drain of its node; the stage has no second try."""
    namespace.apply(unfinished.document(retries=ONE_TRY))
    reach(namespace, "Running")
    name = pod_of(namespace, 1)
    where = f"/api/v1/namespaces/{namespace.namespace}/pods/{name}/eviction"
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    namespace("create", "--raw", where, "--filename", "-", stdin=json.dumps(eviction))
    assert "EvictionByEvictionAPI" in message(blocker(namespace, "Evicted"), "Degraded")
    unfinished.finish()
    found = reach(namespace, "Succeeded")
    assert [stage.get("disruptions", 0) for stage in found["stageStatuses"]] == [0, 1]
    assert digests(unfinished.target) == by_command(unfinished.folder, tmp_path / "by-command", full=True)


def test_a_node_that_does_not_end_its_pods_is_named_with_the_remedy(
    namespace: Kubectl, cluster: Cluster, unfinished: Unfinished
) -> None:
    """Nobody else writes the stage meanwhile: the worker may still run."""
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    name = pod_of(namespace, 1)
    cluster.node.kubelet.stop(kill=True)
    try:
        namespace("delete", "pod", name, "--grace-period=1", "--wait=false")
        said = message(blocker(namespace, "NodeLost", seconds=150), "Degraded")
        assert pod_of(namespace, 1) == name
    finally:
        cluster.node.kubelet.start()
    assert "ckpt2pt-node" in said
    assert "node.kubernetes.io/out-of-service:NoExecute" in said
    unfinished.finish()
    found = reach(namespace, "Succeeded")
    assert reported(found, "Degraded") == ("False", "Ended")


# --------------------------------------------------------------------------------------------------------------- volumes


def test_a_volume_that_cannot_be_mounted_is_reported(namespace: Kubectl, checkpoint: Path, volume: Path) -> None:
    target = {"volume": host_path(volume / "not-there"), "path": "out"}
    namespace.apply(document(checkpoint, volume, target=target))
    assert str(volume / "not-there") in message(blocker(namespace, "VolumeMountFailed", seconds=90), "Degraded")
    (volume / "not-there").mkdir()
    reach(namespace, "Succeeded", seconds=180)  # the kubelet tries again after a pause that doubles


def test_a_claim_for_one_node_is_not_asked_for_by_two_workers(
    namespace: Kubectl, checkpoint: Path, volume: Path, kubectl: Kubectl
) -> None:
    """Found before they hang, and mended without making the conversion anew."""
    name = f"once-{namespace.namespace}"
    size, once = {"storage": "1Gi"}, ["ReadWriteOnce"]
    persistent = {"capacity": size, "accessModes": once, "storageClassName": "", "hostPath": {"path": str(volume)}}
    asked = {"accessModes": once, "storageClassName": "", "volumeName": name, "resources": {"requests": size}}
    namespace.apply(
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": persistent},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "once"}, "spec": asked},
    )
    try:
        namespace("wait", "--for=jsonpath={.status.phase}=Bound", "pvc/once", "--timeout=60s")
        claim = {"persistentVolumeClaim": {"claimName": "once"}}
        namespace.apply(document(checkpoint, volume, target={"volume": claim, "path": "out"}))
        assert "spec.workers.maxParallelStages" in message(
            blocker(namespace, "AccessModeConflict", kind="VolumesReady"), "VolumesReady"
        )
        assert not namespace.get("jobs")["items"]
        fewer = {"spec": {"workers": {"maxParallelStages": 1}}}
        namespace("patch", KIND, "golden", "--type=merge", "--patch", json.dumps(fewer))
        reach(namespace, "Succeeded")
    finally:
        kubectl("delete", "persistentvolume", name, "--wait=false")


@pytest.fixture
def small(volume: Path, checkpoint: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = volume / "small"
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size=256k,uid={owner_of(checkpoint)}", "tmpfs", folder)
    yield folder
    run("umount", "--lazy", folder)


def test_a_volume_without_room_is_reported_in_bytes_and_the_rest_is_done_when_there_is_some(
    namespace: Kubectl, checkpoint: Path, volume: Path, small: Path, tmp_path: Path
) -> None:
    target = {"volume": host_path(small), "path": "out"}
    namespace.apply(document(checkpoint, volume, target=target, retries=ONE_TRY))
    found = reach(namespace, "Failed")
    assert {stage["reason"] for stage in found["stageStatuses"]} == {"VolumeTooSmall"}
    assert "are needed" in message(found, "Failed")
    assert not list(small.rglob("*.pt"))
    run("mount", "-o", "remount,size=64m", small)
    namespace("annotate", KIND, "golden", "ckpt2pt.dev/retry=1")
    reach(namespace, "Succeeded")
    assert digests(small / "out") == by_command(checkpoint, tmp_path / "by-command", full=True)


# ------------------------------------------------------------------------------------------------------------ containers


def test_a_container_that_cannot_be_made_is_reported(namespace: Kubectl, checkpoint: Path, volume: Path) -> None:
    wanted = {"name": "CA", "valueFrom": {"configMapKeyRef": {"name": "site", "key": "ca"}}}
    workers = {
        "security": {"runAsUser": owner_of(checkpoint)},
        "podOverrides": {"spec": {"containers": [{"name": "convert", "env": [wanted]}]}},
    }
    namespace.apply(document(checkpoint, volume, workers=workers))
    assert 'configmap "site" not found' in message(blocker(namespace, "CreateContainerError"), "Degraded")
    namespace("create", "configmap", "site", "--from-literal=ca=x")
    reach(namespace, "Succeeded")


def test_arguments_that_no_stage_can_take_end_the_job_with_its_first_worker(
    namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    workers = {
        "maxParallelStages": 1,
        "security": {"runAsUser": owner_of(checkpoint)},
        "podOverrides": {"spec": {"containers": [{"name": "convert", "args": ["convert", "--no-such-flag"]}]}},
    }
    namespace.apply(document(checkpoint, volume, workers=workers))
    found = reach(namespace, "Failed")
    assert reported(found, "Failed") == ("True", "InvalidSpec")
    assert len(namespace.get("pods")["items"]) == 1


def test_more_bad_stages_than_were_allowed_end_the_job(namespace: Kubectl, unfinished: Unfinished) -> None:
    unfinished.finish(spoilt=(b"encoder.final_norm", b"encoder.Final_norm"))
    namespace.apply(unfinished.document(retries={"maxFailedStages": 0}))
    found = reach(namespace, "Failed")
    assert reported(found, "Failed") == ("True", "MaxFailedStages")
    assert f"rank_{unfinished.last}" in message(found, "Failed")
    assert events(namespace)[-1] == "MaxFailedStages"
