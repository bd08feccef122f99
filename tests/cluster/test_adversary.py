"""Tenants who mean harm, against the chart as it comes: its own service account, its own values, its own policy.

Trainer is an account that may create conversions and nothing else.  The neighbour is a tenant with a namespace of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import WORKER_UID
from documents import changed, claim
from harness.golden import KIND, document, message, reach, reported, status
from harness.kubectl import Kubectl
from harness.machine import ClusterError, wait_until
from harness.pods import NON_ROOT, host_path
from harness.release import Release
from statuses import check_status

Object = dict[str, Any]
Change = tuple[str, object]

SECRET = "hunter2"
ASKING = {"trainingTrigger": {"enabled": True}, "rbac": {"submitter": {"enabled": True}}}
"""What makes attacks possible at all; neither is on by default."""


@pytest.fixture(scope="module")
def operator(releases: Callable[..., Release]) -> Iterator[Release]:
    """The chart's own values."""
    release = releases(allows=())
    release.install(**ASKING)
    yield release
    release.uninstall()


@pytest.fixture(scope="module")
def unguarded(operator: Release) -> Iterator[Release]:
    """The same in a cluster without admission policies: the operator's own check has to do."""
    operator.upgrade(**ASKING, admissionPolicy={"enabled": False})
    yield operator
    operator.upgrade(**ASKING)


@pytest.fixture
def neighbour(kubectl: Kubectl) -> Iterator[Kubectl]:
    """Another tenant's namespace, with a claim and ConfigMaps that are nobody else's business."""
    name = f"other-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    found = kubectl.within(name)
    spec = {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}}}
    theirs = changed(("metadata.name", "theirs"), ("spec.source.path", "secret/project-x"))
    found.apply(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "their-claim"}, "spec": spec},
        config_map("their-template", json.dumps(theirs)),
        config_map("their-text", f"password: [{SECRET}, "),
    )
    yield found
    kubectl("delete", "namespace", name, "--wait=false")


def config_map(name: str, text: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"conversion.yaml": text}}


@dataclass(frozen=True, slots=True)
class Trainer:
    """May create conversions in a namespace, and nothing else."""

    namespace: Kubectl

    @property
    def user(self) -> str:
        """As RBAC names it."""
        return f"system:serviceaccount:{self.namespace.namespace}:trainer"

    def create(self, thing: Object) -> str:
        """Create an object as this account; what the API server says of it, also where it refuses."""
        words = ("create", f"--as={self.user}", "--validate=ignore", "--filename=-")
        try:
            return self.namespace(*words, stdin=json.dumps(thing))
        except ClusterError as error:
            return str(error)


@pytest.fixture
def trainer(operator: Release, namespace: Kubectl) -> Trainer:
    """As the chart's README has it: the submit role, bound to the account of a training."""
    namespace("create", "serviceaccount", "trainer")
    role = f"--clusterrole={operator.name}-submit"
    namespace("create", "rolebinding", "trainer", role, f"--serviceaccount={namespace.namespace}:trainer")
    found = Trainer(namespace)
    wait_until(
        "the right", lambda: "forbidden" not in found.create(changed(("metadata.name", "first"), ("spec.dryRun", True)))
    )
    for right in ("create pods", "get secrets", "create jobs.batch", "get configmaps"):
        words = ("auth", "can-i", *right.split(), f"--as={found.user}")
        with pytest.raises(ClusterError):
            namespace(*words)
    return found


def named(*changes: Change, name: str = "hostile") -> Object:
    return changed(("metadata.name", name), *changes)


def made_for(namespace: Kubectl, name: str = "hostile") -> list[str]:
    """Jobs and pods that there are for a conversion."""
    found: list[Object] = namespace.get("jobs,pods", f"--selector=app.kubernetes.io/instance={name}")["items"]
    return [f"{item['kind']}/{item['metadata']['name']}" for item in found]


def all_events(namespace: Kubectl) -> list[str]:
    return [event["message"] for event in namespace.get("events")["items"]]


# --------------------------------------------------------------------------------------------------- another's namespace


def test_the_name_of_a_claim_leads_to_no_other_namespace(trainer: Trainer, neighbour: Kubectl) -> None:
    for tail in ("their-claim", "nosuch"):
        name = f"../../{neighbour.namespace}/persistentvolumeclaims/{tail}"
        said = trainer.create(named(("spec.source.volume", claim(name))))
        assert "spec.source.volume.persistentVolumeClaim.claimName: Invalid value" in said
    assert not trainer.namespace.exists(KIND, "hostile")


def ended_training(name: str, image: str, annotation: str) -> Object:
    """A Job that succeeds at once, and asks for a conversion."""
    container = {"name": "train", "image": image, "args": ["--version"]}
    pod = {"restartPolicy": "Never", "securityContext": NON_ROOT, "containers": [container]}
    meta = {"name": name, "annotations": {"ckpt2pt.dev/convert-on-success": annotation}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": {"template": {"spec": pod}}}


def any_of(namespace: Kubectl, *words: str) -> bool:
    return bool(namespace.get(*words)["items"])


def test_an_annotation_leads_to_no_other_namespaces_config_map(
    operator: Release, namespace: Kubectl, neighbour: Kubectl, converter_image: str
) -> None:
    for name in ("their-template", "their-text"):
        annotation = f"../../{neighbour.namespace}/configmaps/{name}"
        namespace.apply(ended_training(name, converter_image, annotation))
        words = ("events", f"--field-selector=involvedObject.name={name},reason=ConversionTemplateWrong")
        wait_until("the event", partial(any_of, namespace, *words), seconds=90)
        [event] = namespace.get(*words)["items"]
        assert event["message"].startswith("it is not the name of a ConfigMap")
    assert namespace.get(KIND)["items"] == []
    assert not [said for said in all_events(namespace) if SECRET in said or "project-x" in said]


def test_an_event_quotes_no_config_map_of_the_own_namespace_either(
    operator: Release, namespace: Kubectl, converter_image: str
) -> None:
    """Who may annotate trainings and read events may not be allowed to read ConfigMaps."""
    texts = {
        "syntax": f"password: [{SECRET}, ",
        "field": f"a: ${{{SECRET}}}",
        "value": json.dumps(named(("spec.verify", SECRET))),
    }
    for name, text in texts.items():
        namespace.apply(config_map(name, text), ended_training(name, converter_image, name))

    def reported_of() -> set[str]:
        found = namespace.get("events", "--field-selector=type=Warning")["items"]
        return {event["involvedObject"]["name"] for event in found if event["reason"].startswith("Conversion")}

    wait_until("three warnings", lambda: reported_of() == set(texts), seconds=120)
    assert not [said for said in all_events(namespace) if SECRET in said]
    assert any("422 Invalid: spec.verify" in said for said in all_events(namespace))


# ------------------------------------------------------------------------------------------------------ what may be asked

ESCAPE = {
    "serviceAccountName": "boss", "automountServiceAccountToken": True, "hostPID": True, "shareProcessNamespace": False,
    "volumes": [{"name": "host", "hostPath": {"path": "/"}}],
    "containers": [{"name": "convert", "command": ["python3", "-c", "print('owned')"],
                    "volumeMounts": [{"name": "host", "mountPath": "/host"}]}],
}  # fmt: skip
EMPTY: Change = ("spec.source.volume", {"emptyDir": {}})
NFS = {"nfs": {"server": "10.0.0.1", "path": "/"}}
#   what is asked for -> what the refusal names
HOSTILE: dict[str, tuple[list[Change], str, str]] = {
    "podOverrides": ([("spec.workers.podOverrides.spec", ESCAPE)], "spec.workers.podOverrides", "podOverrides"),
    "image": ([("spec.workers.image", "evil.example/x:1")], "spec.workers.image", "image"),
    "hostPath": ([("spec.source.volume", {"hostPath": {"path": "/"}})], "spec.source.volume.hostPath", "hostPath"),
    "hostPath-target": ([("spec.target.volume", {"hostPath": {"path": "/etc"}})], "spec.target.volume.hostPath", "hostPath"),
    "nfs": ([("spec.metadata.volume", NFS)], "spec.metadata.volume.nfs", "nfs"),
    "csi": ([("spec.source.volume", {"csi": {"driver": "nfs.csi.k8s.io"}})], "spec.source.volume.csi", "csi"),
    "uid-0": ([("spec.workers.security", {"runAsUser": 0})], "spec.workers.security.runAsUser", "root"),
    "gid-0": ([("spec.workers.security", {"runAsGroup": 0})], "spec.workers.security.runAsGroup", "root"),
    "fsGroup-0": ([("spec.workers.security", {"fsGroup": 0})], "spec.workers.security.fsGroup", "root"),
    "group-0": (
        [("spec.workers.security", {"supplementalGroups": [1000, 0]})], "spec.workers.security.supplementalGroups", "root",
    ),
    "priority": ([("spec.workers.priorityClassName", "system-node-critical")], "spec.workers.priorityClassName", "priorityClassName"),
    "runtime": ([("spec.workers.runtimeClassName", "other")], "spec.workers.runtimeClassName", "runtimeClassName"),
    "apparmor": (
        [("spec.workers.annotations", {"container.apparmor.security.beta.kubernetes.io/convert": "unconfined"})],
        "spec.workers.annotations", "privileged",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "field", "permission"), HOSTILE.values(), ids=HOSTILE)
def test_the_api_server_refuses_what_the_values_do_not_allow(
    trainer: Trainer, changes: list[Change], field: str, permission: str
) -> None:
    said = trainer.create(named(*changes))
    assert "denied request" in said
    assert field in said
    assert f"worker.allow.{permission} to true in the values of the operator's chart" in said
    assert not trainer.namespace.exists(KIND, "hostile")


def test_an_administrator_gets_no_further_by_the_same_way(operator: Release, namespace: Kubectl) -> None:
    """The values decide, and not who asks: the operator could not tell who it was."""
    with pytest.raises(ClusterError, match=r"worker\.allow\.hostPath"):
        namespace.create(named(("spec.source.volume", {"hostPath": {"path": "/"}})))


def test_a_template_of_a_training_gets_no_more(operator: Release, namespace: Kubectl, converter_image: str) -> None:
    text = json.dumps(named(("spec.workers.podOverrides.spec", ESCAPE)))
    namespace.apply(config_map("escape", text), ended_training("pretrain", converter_image, "escape"))
    words = ("events", "--field-selector=reason=ConversionNotMade")
    wait_until("the event", lambda: namespace.get(*words)["items"] != [], seconds=90)
    assert "worker.allow.podOverrides" in namespace.get(*words)["items"][0]["message"]
    assert namespace.get(KIND)["items"] == []


@pytest.mark.parametrize(("changes", "field", "permission"), HOSTILE.values(), ids=HOSTILE)
def test_without_the_policy_the_operator_refuses_the_same(
    unguarded: Release, trainer: Trainer, changes: list[Change], field: str, permission: str
) -> None:
    # An API server goes by a policy for some time after it was deleted.
    wait_until("the policy to be gone", lambda: "created" in trainer.create(named(*changes)), seconds=60)
    found = reach(trainer.namespace, "Failed", "hostile")
    check_status(found)
    assert reported(found, "Failed") == ("True", "NotAllowed")
    assert reported(found, "Accepted") == ("False", "NotAllowed")
    assert field in message(found, "Failed")
    assert f"worker.allow.{permission}" in message(found, "Failed")
    assert made_for(trainer.namespace) == []


def test_nor_does_a_template_of_a_training(unguarded: Release, namespace: Kubectl, converter_image: str) -> None:
    text = json.dumps(named(("spec.workers.podOverrides.spec", ESCAPE)))
    namespace.apply(config_map("escape", text), ended_training("pretrain", converter_image, "escape"))
    wait_until("the conversion", lambda: namespace.get(KIND)["items"] != [], seconds=90)
    [made] = namespace.get(KIND)["items"]
    found = reach(namespace, "Failed", made["metadata"]["name"])
    assert reported(found, "Failed")[1] == "NotAllowed"
    assert made_for(namespace, made["metadata"]["name"]) == []


def test_overrides_that_are_allowed_lead_to_no_account_and_no_node(operator: Release, trainer: Trainer) -> None:
    """With the one value on, an override may add a variable, and still not what has a value of its own."""
    operator.upgrade(**ASKING, worker={"allow": {"podOverrides": True}})
    try:
        assert "created" in trainer.create(named(("spec.workers.podOverrides.spec", ESCAPE)))
        found = reach(trainer.namespace, "Failed", "hostile")
        assert reported(found, "Failed")[1] == "NotAllowed"
        for permission in ("serviceAccountName", "privileged", "hostPath"):
            assert f"worker.allow.{permission}" in message(found, "Failed")
        assert made_for(trainer.namespace) == []
        variable = {"containers": [{"name": "convert", "env": [{"name": "TZ", "value": "UTC"}]}]}
        trainer.create(
            named(("spec.workers.podOverrides.spec", variable), ("spec.suspend", True), EMPTY, name="harmless")
        )
        wait_until("a Job", partial(trainer.namespace.exists, "job", "harmless-1"))
        job = trainer.namespace.get("job", "harmless-1")
        assert job["spec"]["template"]["spec"]["automountServiceAccountToken"] is False
    finally:
        operator.upgrade(**ASKING)


# ------------------------------------------------------------------------------------------------------- forged labels


@pytest.fixture
def honest(golden: Path, volume: Path, namespace: Kubectl) -> Iterator[Object]:
    """A conversion as the chart's values allow it: everything on a claim, by the image's own user."""
    folder = golden / "megatron06" / "b_tp2pp2"
    for part in ("ms_params", "pt_meta_params"):
        shutil.copytree(folder / part, volume / part)
    for path in (volume, *volume.rglob("*")):
        os.chown(path, WORKER_UID, WORKER_UID)
    name = f"pv-{namespace.namespace}"
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    namespace.apply(
        {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
            "spec": {**common, "capacity": {"storage": "1Gi"}, **host_path(volume),
                     "claimRef": {"namespace": namespace.namespace, "name": "training"}},
        },
        {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "training"},
            "spec": {**common, "volumeName": name, "resources": {"requests": {"storage": "1Gi"}}},
        },
    )  # fmt: skip
    made = document(folder, volume, full=False, workers={})
    made["spec"]["source"]["volume"] = claim("training")
    del made["spec"]["target"]["volume"]
    yield made
    namespace("delete", "pv", name, "--wait=false")


def forged(conversion: Object, image: str, **meta: Any) -> Object:
    """A pod with all the labels of a worker, whose image cannot be pulled."""
    uid, name = conversion["metadata"]["uid"], conversion["metadata"]["name"]
    labels = {
        "app.kubernetes.io/managed-by": "ckpt2pt-operator", "app.kubernetes.io/name": "ckpt2pt",
        "app.kubernetes.io/component": "worker", "app.kubernetes.io/instance": name,
        "ckpt2pt.dev/conversion-uid": uid, "ckpt2pt.dev/attempt": "1",
        "batch.kubernetes.io/job-completion-index": "0", "batch.kubernetes.io/job-name": f"{name}-1", **meta.pop("labels", {}),
    }  # fmt: skip
    spec = {"terminationGracePeriodSeconds": 1, "containers": [{"name": "convert", "image": image}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "forged", "labels": labels, **meta}, "spec": spec}


def test_pods_that_carry_our_labels_count_for_nothing(
    operator: Release, honest: Object, namespace: Kubectl, neighbour: Kubectl
) -> None:
    """One in another namespace, and one in the same that its Job does not own, each with warnings about it."""
    made = namespace.create({**honest, "spec": {**honest["spec"], "suspend": True}})
    reach(namespace, "Suspended")
    uid = namespace.get("job", "golden-1")["metadata"]["uid"]
    # By these labels the Job controller would adopt it where the Job is, and delete it as one too many.
    own = {"batch.kubernetes.io/controller-uid": uid, "controller-uid": uid}
    for there, labels in ((namespace, {}), (neighbour, own)):
        pod = there.create(forged(made, "nowhere.invalid/x:1", labels=labels))
        about = {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": "forged",
            "uid": pod["metadata"]["uid"],
            "namespace": there.namespace,
        }
        there.create(
            {"apiVersion": "v1", "kind": "Event", "metadata": {"generateName": "forged."}, "involvedObject": about,
             "type": "Warning", "reason": "FailedMount", "message": f"forged {SECRET}"}
        )  # fmt: skip
    namespace("patch", KIND, "golden", "--type=merge", "--patch", '{"spec":{"suspend":false}}')
    found = reach(namespace, "Succeeded")
    check_status(found)
    assert [stage["state"] for stage in found["stageStatuses"]] == ["Succeeded"] * 2
    assert SECRET not in json.dumps(found)
    assert not [said for said in all_events(namespace) if "nowhere.invalid" in said and "CheckpointConversion" in said]
    for there in (namespace, neighbour):
        assert there.exists("pod", "forged"), "it was there all the time"
    assert made_for(neighbour, "golden") == ["Pod/forged"], "and the operator has touched neither"


def test_nor_does_one_that_ran_before_there_was_a_job(
    operator: Release, honest: Object, namespace: Kubectl, neighbour: Kubectl
) -> None:
    """It held the conversion in WaitingForPods for as long as it ran."""
    after = {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}
    made = namespace.create({**honest, "spec": {**honest["spec"], "startAfter": after}})
    wait_until("the operator to have seen it", lambda: "phase" in status(namespace))
    for there in (namespace, neighbour):
        there.create(forged(made, "nowhere.invalid/x:1"))
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "pretrain"}}
    done = {
        "restartPolicy": "Never",
        "securityContext": NON_ROOT,
        "containers": [{"name": "t", "image": operator.images[1], "args": ["--version"]}],
    }
    namespace.create({**job, "spec": {"template": {"spec": done}}})
    reach(namespace, "Succeeded")
