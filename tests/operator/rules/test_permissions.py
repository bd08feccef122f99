"""What a conversion may ask for is the cluster owner's to say, permission by permission."""

from __future__ import annotations

from typing import Any

import pytest

from charts import values
from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt_operator.rules.permissions import PERMISSIONS, to_error
from ckpt2pt_operator.rules.plan import plan
from ckpt2pt_operator.rules.seen import CreateJob, OperatorDefaults
from documents import changed, claim
from simulation import HOUSE, World
from statuses import reported

Raw = dict[str, Any]
Change = tuple[str, object]


def override(**spec: object) -> Change:
    return ("spec.workers.podOverrides.spec", spec)


def container(**fields: object) -> Change:
    return override(containers=[{"name": "convert", **fields}])


def context(**fields: object) -> Change:
    return container(securityContext=fields)


HOST: Raw = {"hostPath": {"path": "/"}}
NFS: Raw = {"nfs": {"server": "nas", "path": "/"}}
CSI: Raw = {"csi": {"driver": "nfs.csi.k8s.io"}}
APPARMOR = {"container.apparmor.security.beta.kubernetes.io/convert": "unconfined"}

#   what is asked for -> the field that is reported, and its permission
ASKED: dict[str, tuple[Change, str, str]] = {
    "host-path": (("spec.source.volume", HOST), "spec.source.volume.hostPath", "hostPath"),
    "host-path-of-the-target": (("spec.target.volume", HOST), "spec.target.volume.hostPath", "hostPath"),
    "host-path-of-pt-meta": (("spec.metadata.volume", HOST), "spec.metadata.volume.hostPath", "hostPath"),
    "nfs": (("spec.source.volume", NFS), "spec.source.volume.nfs", "nfs"),
    "csi": (("spec.target.volume", CSI), "spec.target.volume.csi", "csi"),
    "image": (("spec.workers.image", "evil"), "spec.workers.image", "image"),
    "priority": (("spec.workers.priorityClassName", "high"), "spec.workers.priorityClassName", "priorityClassName"),
    "runtime": (("spec.workers.runtimeClassName", "r"), "spec.workers.runtimeClassName", "runtimeClassName"),
    "uid-0": (("spec.workers.security", {"runAsUser": 0}), "spec.workers.security.runAsUser", "root"),
    "gid-0": (("spec.workers.security", {"runAsGroup": 0}), "spec.workers.security.runAsGroup", "root"),
    "fs-group-0": (("spec.workers.security", {"fsGroup": 0}), "spec.workers.security.fsGroup", "root"),
    "groups": (("spec.workers.security", {"supplementalGroups": [5, 0]}), "spec.workers.security.supplementalGroups", "root"),
    "apparmor": (("spec.workers.annotations", APPARMOR), "spec.workers.annotations", "privileged"),
}  # fmt: skip
SPEC = "spec.workers.podOverrides.spec"
#   what an override asks for, which needs a permission of its own
OVERRIDDEN: dict[str, tuple[Change, str, str]] = {
    "account": (override(serviceAccountName="boss"), f"{SPEC}.serviceAccountName", "serviceAccountName"),
    "old-account": (override(serviceAccount="boss"), f"{SPEC}.serviceAccount", "serviceAccountName"),
    "token": (override(automountServiceAccountToken=True), f"{SPEC}.automountServiceAccountToken", "serviceAccountName"),
    "projected-token": (
        override(volumes=[{"name": "t", "projected": {"sources": [{"configMap": {}}, {"serviceAccountToken": {"path": "t"}}]}}]),
        f"{SPEC}.volumes[0].projected.sources[1].serviceAccountToken", "serviceAccountName",
    ),
    "token-by-default": (
        override(automountServiceAccountToken=None), f"{SPEC}.automountServiceAccountToken", "serviceAccountName",
    ),
    "certificate": (
        override(volumes=[{"name": "t", "projected": {"sources": [{"podCertificate": {"signerName": "kubernetes.io/kube-apiserver-client-pod"}}]}}]),
        f"{SPEC}.volumes[0].projected.sources[0].podCertificate", "serviceAccountName",
    ),
    "host-pid": (override(hostPID=True), f"{SPEC}.hostPID", "privileged"),
    "host-ipc": (override(hostIPC=True), f"{SPEC}.hostIPC", "privileged"),
    "host-network": (override(hostNetwork=True), f"{SPEC}.hostNetwork", "privileged"),
    "priority": (override(priority=1000000), f"{SPEC}.priority", "priorityClassName"),
    "priority-class": (override(priorityClassName="high"), f"{SPEC}.priorityClassName", "priorityClassName"),
    "runtime": (override(runtimeClassName="r"), f"{SPEC}.runtimeClassName", "runtimeClassName"),
    "host-path": (override(volumes=[{"name": "a"}, {"name": "b", **HOST}]), f"{SPEC}.volumes[1].hostPath", "hostPath"),
    "host-path-under-our-name": (override(volumes=[{"name": "source", **HOST}]), f"{SPEC}.volumes[0].hostPath", "hostPath"),
    "nfs": (override(volumes=[{"name": "b", **NFS}]), f"{SPEC}.volumes[0].nfs", "nfs"),
    "csi": (override(volumes=[{"name": "b", **CSI}]), f"{SPEC}.volumes[0].csi", "csi"),
    "an-old-driver": (override(volumes=[{"name": "b", "iscsi": {}}]), f"{SPEC}.volumes[0].iscsi", "csi"),
    "image-volume": (override(volumes=[{"name": "b", "image": {}}]), f"{SPEC}.volumes[0].image", "image"),
    "image": (container(image="evil"), f"{SPEC}.containers[0].image", "image"),
    "image-of-another": (override(initContainers=[{"name": "i", "image": "evil"}]), f"{SPEC}.initContainers[0].image", "image"),
    "uid-0": (override(securityContext={"runAsUser": 0}), f"{SPEC}.securityContext.runAsUser", "root"),
    "any-uid": (override(securityContext={"runAsNonRoot": None}), f"{SPEC}.securityContext.runAsNonRoot", "root"),
    "uid-0-of-a-container": (context(runAsUser=0), f"{SPEC}.containers[0].securityContext.runAsUser", "root"),
    "no-context": (override(securityContext=None), f"{SPEC}.securityContext", "privileged"),
    "no-context-of-a-container": (container(securityContext=None), f"{SPEC}.containers[0].securityContext", "privileged"),
    "privileged": (context(privileged=True), f"{SPEC}.containers[0].securityContext.privileged", "privileged"),
    "escalation": (
        context(allowPrivilegeEscalation=True), f"{SPEC}.containers[0].securityContext.allowPrivilegeEscalation", "privileged",
    ),
    "capabilities": (
        context(capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}), f"{SPEC}.containers[0].securityContext.capabilities", "privileged",
    ),
    "seccomp": (
        override(securityContext={"seccompProfile": {"type": "Unconfined"}}), f"{SPEC}.securityContext.seccompProfile", "privileged",
    ),
    "proc": (context(procMount="Unmasked"), f"{SPEC}.containers[0].securityContext.procMount", "privileged"),
    "sysctls": (override(securityContext={"sysctls": []}), f"{SPEC}.securityContext.sysctls", "privileged"),
    "host-port": (container(ports=[{"hostPort": 80}]), f"{SPEC}.containers[0].ports[0].hostPort", "privileged"),
    "apparmor": (
        ("spec.workers.podOverrides.metadata", {"annotations": APPARMOR}), "spec.workers.podOverrides.metadata.annotations", "privileged",
    ),
}  # fmt: skip


def said(change: Change, *allowed: str) -> str:
    return to_error(parse(changed(change)), frozenset(allowed))


@pytest.mark.parametrize(("change", "field", "permission"), ASKED.values(), ids=ASKED)
def test_each_field_needs_its_permission_and_no_other(change: Change, field: str, permission: str) -> None:
    others = set(PERMISSIONS) - {permission}
    assert said(change).startswith(field)
    assert f"worker.allow.{permission} to true" in said(change, *others)
    assert said(change, permission) == ""


@pytest.mark.parametrize(("change", "field", "permission"), OVERRIDDEN.values(), ids=OVERRIDDEN)
def test_an_override_that_is_allowed_may_not_ask_for_everything(change: Change, field: str, permission: str) -> None:
    assert "worker.allow.podOverrides" in said(change)
    assert said(change, *(set(PERMISSIONS) - {permission})).startswith(field)
    assert f"worker.allow.{permission} to true" in said(change, *(set(PERMISSIONS) - {permission}))
    assert said(change, "podOverrides", permission) == ""


HARMLESS: list[Change] = [
    ("spec.source.volume", claim("training")),
    ("spec.target.volume", {"emptyDir": {}}),
    ("spec.workers", {"security": {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000, "supplementalGroups": [5]}}),
    ("spec.workers", {"nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}], "affinity": {}, "queueName": "q"}),
    ("spec.workers", {"labels": {"a": "b"}, "annotations": {"a": "b"}, "imagePullSecrets": [{"name": "pull"}], "schedulerName": "s"}),
    ("spec.workers", {"resources": {"limits": {"memory": "1Gi"}}, "coSchedule": True, "imagePullPolicy": "Always"}),
]  # fmt: skip


@pytest.mark.parametrize("change", HARMLESS)
def test_what_everybody_may_ask_for(change: Change) -> None:
    assert said(change) == ""


@pytest.mark.parametrize(
    "change",
    [
        override(dnsPolicy="None", volumes=[{"name": "scratch", "emptyDir": {}}, {"name": "s", "secret": {"secretName": "x"}}]),
        container(env=[{"name": "TZ", "value": "UTC"}], securityContext={"capabilities": {"drop": ["ALL"]}, "runAsNonRoot": True}),
        override(automountServiceAccountToken=False, hostPID=False, securityContext={"seccompProfile": {"type": "RuntimeDefault"}}),
    ],
)  # fmt: skip
def test_what_an_override_needs_no_further_permission_for(change: Change) -> None:
    assert said(change, "podOverrides") == ""


@pytest.mark.parametrize(
    "value", ["x", 1, None, [1], {"containers": "x"}, {"containers": [1], "volumes": {"a": 1}, "securityContext": 5}]
)
def test_an_override_of_another_form_is_no_way_round_and_no_error(value: object) -> None:
    assert "worker.allow.podOverrides" in said(("spec.workers.podOverrides.spec", value))
    said(("spec.workers.podOverrides.spec", value), "podOverrides")


def test_many_fields_make_one_message_of_bounded_length() -> None:
    many = override(containers=[{"name": str(number), "image": "evil"} for number in range(50)])
    found = said(many, "podOverrides")
    assert found.count(".image") == 7, "six fields and the value"
    assert " and 44 more" in found
    assert len(found) < 1024


def test_the_chart_has_a_value_for_each_and_none_is_on() -> None:
    assert values()["worker"]["allow"] == dict.fromkeys(PERMISSIONS, False)


# ---------------------------------------------------------------------------------------------------------- the operator


def test_no_job_is_made_and_the_status_names_field_and_value() -> None:
    world = World(("spec.workers.image", "evil"))
    world.settle()
    assert (world.phase, world.made) == ("Failed", [])
    for kind, status in (("Accepted", "False"), ("Failed", "True"), ("Stalled", "True"), ("Ready", "False")):
        assert reported(world.status, kind) == (status, "NotAllowed"), kind
    [message] = {c["message"] for c in world.status["conditions"] if c["type"] in {"Failed", "Accepted"}}
    assert message.startswith("spec.workers.image: not allowed in this cluster")
    assert "worker.allow.image to true" in message


def test_it_is_reported_before_a_training_is_waited_for() -> None:
    after = {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}
    world = World(("spec.workers.image", "evil"), ("spec.startAfter", after))
    world.settle()
    assert world.phase == "Failed"


def step(world: World, *allowed: str) -> list[Raw]:
    """One look of an operator that allows these; the Jobs that it asks for."""
    decided = plan(world.look(), OperatorDefaults(image=HOUSE.image, allowed=frozenset(allowed)))
    world.document["status"] = dict(decided.status)
    return [action.manifest for action in decided.actions if isinstance(action, CreateJob)]


def test_once_it_is_allowed_a_retry_carries_it_out() -> None:
    world = World(("spec.workers.image", "ours"))
    world.settle()
    world.retry("now")
    assert step(world, "image") == []
    [job] = step(world, "image")
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "ours"
    assert reported(world.status, "Accepted") == ("True", "Valid")


def test_a_job_that_runs_goes_on_when_the_values_change_and_no_other_is_made() -> None:
    world = World(("spec.workers.image", "ours"))
    for _ in range(2):
        for manifest in step(world, "image"):
            world.create(manifest)
    world.control()
    world.start(0, 1, 2, 3)
    world.step()
    assert world.phase == "Running"
    world.delete_job("demo-1")
    world.reap()
    world.settle()
    assert (world.phase, reported(world.status, "Failed")[1]) == ("Failed", "NotAllowed")


def test_a_cancelled_one_is_cancelled_and_one_that_is_done_stays_so() -> None:
    world = World(("spec.workers.image", "evil"), ("spec.cancel", True))
    world.settle()
    assert world.phase == "Cancelled"


def test_what_the_owner_gives_by_default_needs_no_permission() -> None:
    pod: Raw = {
        "priorityClassName": "low", "security": {"runAsUser": 0}, "podOverrides": {"spec": {"serviceAccountName": "converter"}},
    }  # fmt: skip
    world = World()
    decided = plan(world.look(), OperatorDefaults(image="i", pod=pod))
    assert any(isinstance(action, CreateJob) for action in decided.actions)
