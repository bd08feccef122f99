"""Where workers run and under what terms: what a conversion says of it, as the API server has admitted it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.golden import document, owner_of, reach
from harness.kubectl import Kubectl
from harness.machine import wait_until

pytestmark = pytest.mark.usefixtures("operator")

NODE = "ckpt2pt-node"
ALLOWS = ("podOverrides", "priorityClassName", "serviceAccountName")


@pytest.fixture
def priority(namespace: Kubectl) -> Iterator[str]:
    """A PriorityClass, which has no namespace."""
    name = f"of-{namespace.namespace}"
    namespace("create", "priorityclass", name, "--value=1000")
    yield name
    namespace("delete", "priorityclass", name)


def admitted(namespace: Kubectl) -> dict[str, Any]:
    """The Job, once it is there."""
    wait_until("a Job", lambda: namespace.exists("job", "golden-1"))
    return namespace.get("job", "golden-1")


def test_workers_run_where_and_as_they_are_reported(
    checkpoint: Path, namespace: Kubectl, volume: Path, priority: str
) -> None:
    """Scheduling fields, labels, and a pod template that is changed where there is no field: all at once, and it converts."""
    namespace("create", "serviceaccount", "converting")
    toleration = {"key": "npu", "operator": "Exists", "effect": "NoSchedule"}
    own = {
        "name": "convert",
        "env": [{"name": "TZ", "value": "Asia/Shanghai"}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    }
    workers = {
        "security": {"runAsUser": owner_of(checkpoint)},
        "nodeSelector": {"kubernetes.io/hostname": NODE},
        "tolerations": [toleration],
        "priorityClassName": priority,
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
        "labels": {"team": "pretraining"},
        "annotations": {"example.com/ticket": "42"},
        "podOverrides": {
            "metadata": {"labels": {"cost": "shared"}},
            "spec": {
                "serviceAccountName": "converting",
                "containers": [own],
                "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": "16Mi"}}],
            },
        },
    }
    namespace.apply(document(checkpoint, volume, full=False, workers=workers))
    reach(namespace, "Succeeded")
    pods = namespace.get("pods")["items"]
    assert len(pods) == 2
    for pod in pods:
        spec, metadata = pod["spec"], pod["metadata"]
        assert (spec["nodeName"], spec["priority"], spec["serviceAccountName"]) == (NODE, 1000, "converting")
        assert toleration in spec["tolerations"]
        assert (metadata["labels"]["team"], metadata["labels"]["cost"]) == ("pretraining", "shared")
        assert metadata["annotations"]["example.com/ticket"] == "42"
        [container] = spec["containers"]
        assert {"TZ", "JOB_COMPLETION_INDEX"} < {variable["name"] for variable in container["env"]}
        assert "/scratch" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert container["resources"] == workers["resources"]


def test_a_queue_of_kueue_or_volcano_finds_its_label(checkpoint: Path, namespace: Kubectl, volume: Path) -> None:
    """Neither runs here: the Job is looked at as the API server has it, held back by the conversion itself."""
    security = {"security": {"runAsUser": owner_of(checkpoint)}}
    namespace.apply(document(checkpoint, volume, suspend=True, workers={**security, "queueName": "research"}))
    job = admitted(namespace)
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert job["spec"]["template"]["spec"]["schedulerName"] == "default-scheduler"
    namespace("delete", "ckc", "golden")
    namespace.wait_gone("job", "golden-1")
    volcano = {**security, "queueName": "research", "queueKind": "Volcano"}
    namespace.apply(document(checkpoint, volume, suspend=True, workers=volcano))
    template = admitted(namespace)["spec"]["template"]
    assert template["spec"]["schedulerName"] == "volcano"
    assert template["metadata"]["annotations"]["scheduling.volcano.sh/queue-name"] == "research"
