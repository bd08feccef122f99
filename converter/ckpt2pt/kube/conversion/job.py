"""A Conversion -> the Indexed Job that carries it out, one index for each pipeline stage.  Pure.

The operator creates this manifest; ``ckpt2pt run`` interprets the same one with local processes.  Field by field it
needs Kubernetes 1.29 (backoffLimitPerIndex, podReplacementPolicy).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ckpt2pt.errors import FAILS_JOB, FAILS_STAGE
from ckpt2pt.kube.conversion.report import UID_VARIABLE
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import API_VERSION, KIND, ROLES, Conversion, worker_words

CONTAINER = "convert"
STAGES_VARIABLE = "CKPT2PT_STAGES"
"""Stages of a Job that does not do all of them: index 0 does the first named, index 1 the second."""

POD_VARIABLE = "CKPT2PT_POD_NAME"
"""The pod's own name: its host name lacks the last part, by which tries of one index differ."""

STAGES_ANNOTATION = "ckpt2pt.dev/stages"
"""The same on the Job and its pods, for whoever reads them."""
UID_LABEL = "ckpt2pt.dev/conversion-uid"
ATTEMPT_LABEL = "ckpt2pt.dev/attempt"
MANAGER = "ckpt2pt-operator"

TERMINATION_PATH = "/dev/termination-log"
PROGRESS_PORT = 8080
PROGRESS_PORT_NAME = "progress"

IMAGE_ID = 65532
"""User and group of the image, as the Dockerfile has them."""

_MOUNT_ROOT = "/volumes"
_GRACE_SECONDS = 60
_POD_FIELDS = (
    "nodeSelector", "tolerations", "affinity", "schedulerName", "priorityClassName", "runtimeClassName", "imagePullSecrets",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One volume of the pod, and the roles that share it."""

    name: str
    roles: tuple[str, ...]
    volume: Json
    read_only: bool

    @property
    def path(self) -> str:
        """Where the container sees it."""
        return f"{_MOUNT_ROOT}/{self.name}"


def mounts_of(conversion: Conversion) -> tuple[Mount, ...]:
    """Each volume once, named after the first role that uses it; writable only where something is written."""
    roles: list[tuple[Json, list[str]]] = []
    for role in (role for role in ROLES if conversion.place(role).path):
        volume = conversion.place(role).volume
        sharing = next((names for seen, names in roles if seen == volume), None)
        if sharing is None:
            roles.append((volume, [role]))
        else:
            sharing.append(role)
    return tuple(
        Mount(
            name=names[0], roles=tuple(names), volume=volume, read_only=conversion.spec.dry_run or "target" not in names
        )
        for volume, names in roles
    )


def job_name(conversion: Conversion, attempt: int) -> str:
    """``<conversion>-<attempt>``: known before it exists, so that it can be created twice without harm."""
    return f"{conversion.name}-{attempt}"


def parallelism(conversion: Conversion, completions: int) -> int:
    """Workers at a time."""
    return min(completions, conversion.spec.workers.max_parallel_stages or completions)


def build_job(
    conversion: Conversion,
    *,
    image: str,
    attempt: int = 1,
    stages: Sequence[int] | None = None,
    memory_percent: int = 100,
    ended: str = "",
) -> Json:
    """The Job of one attempt; ``stages`` are those to do when they are not all, ``ended`` as of ``worker_words``.

    ``memory_percent`` of the memory that the spec gives is asked for, but never more than ``grown_memory`` allows.
    """
    todo = tuple(range(conversion.topology.pipeline)) if stages is None else tuple(sorted(set(stages)))
    completions = 1 if conversion.one_worker else len(todo)
    pod = conversion.pod
    labels = _labels(conversion, attempt)
    queue: dict[str, str] = {}
    if "queueName" in pod and pod["queueKind"] == "Kueue":
        queue["kueue.x-k8s.io/queue-name"] = str(pod["queueName"])
    spec: Json = {
        "completionMode": "Indexed",
        "completions": completions,
        "parallelism": parallelism(conversion, completions),
        "backoffLimitPerIndex": conversion.spec.retries.per_stage,
        "podReplacementPolicy": "Failed",  # one writer for each stage
        "podFailurePolicy": _failure_policy(),
        "template": _template(
            conversion, image=image, labels=labels, stages=todo, memory_percent=memory_percent, ended=ended
        ),
    }
    if conversion.spec.retries.max_failed_stages is not None:
        spec["maxFailedIndexes"] = min(conversion.spec.retries.max_failed_stages, completions)
    if conversion.spec.active_deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = conversion.spec.active_deadline_seconds
    if conversion.spec.suspend:
        spec["suspend"] = True
    # ttlSecondsAfterFinished is not set here: termination messages have to be recorded before the pods may go.
    metadata: Json = {"name": job_name(conversion, attempt), **_home(conversion), "labels": {**labels, **queue}}
    if annotations := _stages_annotation(conversion, todo):
        metadata["annotations"] = annotations
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def _partial(conversion: Conversion, stages: Sequence[int]) -> bool:
    return len(stages) != conversion.topology.pipeline and not conversion.one_worker


def _stages_annotation(conversion: Conversion, stages: Sequence[int]) -> dict[str, str]:
    """The annotation of a Job, and of its pods, that does not do all stages."""
    return {STAGES_ANNOTATION: ",".join(map(str, stages))} if _partial(conversion, stages) else {}


def _home(conversion: Conversion) -> Json:
    """Namespace and owner, as far as they are known: a document in a file has neither."""
    found: Json = {}
    if conversion.namespace:
        found["namespace"] = conversion.namespace
    if conversion.uid:
        found["ownerReferences"] = [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": conversion.name,
                "uid": conversion.uid,
                "controller": True,
                "blockOwnerDeletion": False,  # true would need the right to update finalizers
            }
        ]
    return found


def _labels(conversion: Conversion, attempt: int) -> dict[str, str]:
    labels = {
        "app.kubernetes.io/name": "ckpt2pt",
        "app.kubernetes.io/component": "worker",
        "app.kubernetes.io/instance": conversion.name,
        "app.kubernetes.io/managed-by": MANAGER,
        ATTEMPT_LABEL: str(attempt),
    }
    return labels | ({UID_LABEL: conversion.uid} if conversion.uid else {})


def _failure_policy() -> Json:
    """The table of exit codes (errors.py) in the Job's words; what no rule names counts as one try."""

    def rule(action: str, codes: frozenset[int]) -> Json:
        exits = {"containerName": CONTAINER, "operator": "In", "values": sorted(codes)}
        return {"action": action, "onExitCodes": exits}

    disruption: Json = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    # The first rule that fits decides, and a pod that was evicted may have ended with any code.
    return {"rules": [disruption, rule("FailJob", FAILS_JOB), rule("FailIndex", FAILS_STAGE)]}


def _template(
    conversion: Conversion,
    *,
    image: str,
    labels: Mapping[str, str],
    stages: Sequence[int],
    memory_percent: int,
    ended: str,
) -> Json:
    pod = conversion.pod
    mounts = mounts_of(conversion)
    spec: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # As process 1 of its own it would not hear SIGTERM before Python has set up a handler.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": _pod_security(cast("Json", pod["security"])),
        "containers": [_container(conversion, image=image, mounts=mounts, stages=stages, ended=ended)],
        "volumes": [{"name": mount.name, **mount.volume} for mount in mounts],
        **{name: pod[name] for name in _POD_FIELDS if name in pod},
    }
    annotations = dict(cast("dict[str, str]", pod.get("annotations", {})))
    if "queueName" in pod and pod["queueKind"] == "Volcano":
        spec.setdefault("schedulerName", "volcano")
        annotations["scheduling.volcano.sh/queue-name"] = str(pod["queueName"])
    metadata: Json = {"labels": {**cast("dict[str, str]", pod.get("labels", {})), **labels}}
    if annotations:
        metadata["annotations"] = annotations
    if conversion.spec.workers.co_schedule:
        spec["affinity"] = _beside_each_other(cast("Json", spec.get("affinity", {})), labels)
    template = cast("Json", _merged({"metadata": metadata, "spec": spec}, pod.get("podOverrides", {})))
    # By these labels and annotations the operator knows its pods; whatever else an override makes of them, the API server judges.
    metadata = cast("Json", template["metadata"])
    for field, own in (("labels", labels), ("annotations", _stages_annotation(conversion, stages))):
        given = metadata.get(field)
        if own:
            metadata[field] = {**cast("Json", given), **own} if isinstance(given, dict) else {**own}
    _harden(template)
    if memory_percent != 100:
        _grow(template, conversion, memory_percent)
    return template


_HARDENED: Json = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""Of every container: without it a program of an image may become root, whatever its uid is."""


def _harden(template: Json) -> None:
    """Give the containers that an override adds what ours has, where they do not say it themselves."""
    spec = cast("Json", template["spec"]) if isinstance(template.get("spec"), dict) else {}
    for kind in ("containers", "initContainers"):
        listed = spec.get(kind)
        for item in cast("list[object]", listed) if isinstance(listed, list) else ():
            container = cast("Json", item) if isinstance(item, dict) else {}
            given = container.get("securityContext", {})
            if isinstance(given, dict) and not cast("Json", given).get("privileged"):
                container["securityContext"] = {**_HARDENED, **cast("Json", given)}


def _beside_each_other(affinity: Json, labels: Mapping[str, str]) -> Json:
    """``affinity``, and every worker on the node of the first."""
    name = UID_LABEL if UID_LABEL in labels else "app.kubernetes.io/instance"
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {name: labels[name]}}}
    pods = cast("Json", affinity.get("podAffinity", {}))
    key = "requiredDuringSchedulingIgnoredDuringExecution"
    return {**affinity, "podAffinity": {**pods, key: [*cast("list[Json]", pods.get(key, [])), term]}}


# -------------------------------------------------------------------------------------------------------------- memory

_SUFFIXES: dict[str, float] = {"": 1, "m": 1e-3, "u": 1e-6, "n": 1e-9, "k": 1e3} | {
    letter + binary: (1024 if binary else 1000) ** power
    for power, letter in enumerate("KMGTPE", 1)
    for binary in ("", "i")
}


_MOST_EXPONENT = 30
"""An API server takes larger ones, and makes 2**63 - 1 of them."""


def quantity(text: object) -> float:
    """A Kubernetes quantity as a number: ``256Mi`` is 268435456."""
    found = re.fullmatch(r"([0-9.]+)(?:[eE]([+-]?[0-9]+))?([A-Za-z]{0,2})", str(text))
    if not found or found[3] not in _SUFFIXES:
        return 0.0
    exponent = max(min(int(found[2] or 0), _MOST_EXPONENT), -_MOST_EXPONENT)
    return float(found[1]) * 10.0**exponent * _SUFFIXES[found[3]]


def grown_memory(conversion: Conversion, percent: int) -> int | None:
    """Bytes of memory of a worker at ``percent`` of its limit; None where it has no limit and cannot grow."""
    override = cast("Json", cast("Json", conversion.pod.get("podOverrides", {})).get("spec", {}))
    containers = cast("list[Json]", override.get("containers", []))
    given: Json = {}
    for item in containers:
        if item.get("name") == CONTAINER:
            given = cast("Json", item.get("resources", given))
    resources = cast("Json", _merged(resources_of(conversion), given))
    limit = quantity(cast("Json", resources.get("limits", {})).get("memory", 0))
    if not limit:
        return None
    most = quantity(conversion.spec.retries.max_memory) if conversion.spec.retries.max_memory else 4 * limit
    return int(max(limit, min(limit * percent / 100, most)))


def _grow(template: Json, conversion: Conversion, percent: int) -> None:
    grown = grown_memory(conversion, percent)
    containers = cast("list[Json]", cast("Json", template["spec"])["containers"])
    for container in (item for item in containers if item["name"] == CONTAINER and grown is not None):
        resources = cast("dict[str, Json]", container["resources"])
        container["resources"] = {
            **resources,
            "requests": {**resources.get("requests", {}), "memory": str(grown)},
            "limits": {**resources.get("limits", {}), "memory": str(grown)},
        }


def _container(
    conversion: Conversion, *, image: str, mounts: Sequence[Mount], stages: Sequence[int], ended: str
) -> Json:
    pod = conversion.pod
    paths = {role: mount.path for mount in mounts for role in mount.roles}
    words = worker_words(conversion, paths, ended=ended)
    words += ["--termination-log", TERMINATION_PATH, "--progress-port", str(PROGRESS_PORT)]
    container: Json = {
        "name": CONTAINER,
        "image": str(pod.get("image") or image),
        "args": [word.replace("$", "$$") for word in words],  # the kubelet expands $(NAME), and makes one $ of two
        "ports": [{"name": PROGRESS_PORT_NAME, "containerPort": PROGRESS_PORT}],
        "resources": resources_of(conversion),
        "env": _environment(conversion, stages),
        "terminationMessagePath": TERMINATION_PATH,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {**_HARDENED, "readOnlyRootFilesystem": True},
        "volumeMounts": [
            {"name": mount.name, "mountPath": mount.path, **({"readOnly": True} if mount.read_only else {})}
            for mount in mounts
        ],
    }
    if "imagePullPolicy" in pod:
        container["imagePullPolicy"] = pod["imagePullPolicy"]
    return container


def _environment(conversion: Conversion, stages: Sequence[int]) -> list[Json]:
    # JOB_COMPLETION_INDEX, the stage by default, is given by Kubernetes.
    own = {"fieldRef": {"fieldPath": "metadata.name"}}
    found: list[Json] = [{"name": POD_VARIABLE, "valueFrom": own}]
    if conversion.uid:
        found.append({"name": UID_VARIABLE, "value": conversion.uid})
    if _partial(conversion, stages):
        found.append({"name": STAGES_VARIABLE, "value": ",".join(map(str, stages))})
    return found


def resources_of(conversion: Conversion) -> Json:
    """What a worker asks for and may use: what the spec says, or what its processes need.

    A namespace with a quota admits no pod without requests and limits, and memory without a limit cannot grow after an
    out-of-memory kill.  A process uses one core and 48 MiB; the rest is for the page cache.
    """
    given, processes = cast("Json", conversion.pod["resources"]), conversion.spec.workers.processes
    if any(given.values()):
        return given
    memory = f"{128 + 64 * processes}Mi"
    return {
        "requests": {"cpu": f"{250 * processes}m", "memory": memory},
        "limits": {"cpu": str(processes), "memory": memory},
    }


def _pod_security(given: Json) -> Json:
    # MindSpore leaves files that only their owner can read, and the owner is often root.
    user = given.get("runAsUser", IMAGE_ID)
    security: Json = {
        # A kubelet takes the user of the image and not its group: files would belong to group 0.  A group without a user is
        # refused by containerd (pkg/cri/server/helpers.go of 1.6, generateUserString), so both are said.
        "runAsUser": user,
        "runAsGroup": user,
        "runAsNonRoot": user != 0,
        "seccompProfile": {"type": "RuntimeDefault"},
        **given,
    }
    if "fsGroup" in given:
        security["fsGroupChangePolicy"] = "OnRootMismatch"  # a recursive chown of a checkpoint takes hours
    return security


_KEYS = {"containers": "name", "initContainers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath"}
"""By what the items of a list are known, as ``kubectl patch`` knows them."""


def _merged(base: object, over: object) -> object:
    """``over`` put into ``base``: objects field by field, the lists of ``_KEYS`` item by item, anything else replaced."""
    if isinstance(base, dict) and isinstance(over, Mapping):
        ours, theirs = cast("Json", base), cast("Mapping[str, object]", over)
        merged = {
            name: _merged_items(ours.get(name), value, _KEYS[name]) if name in _KEYS else _merged(ours.get(name), value)
            for name, value in theirs.items()
        }
        return {**ours, **merged}
    return over


def _merged_items(base: object, over: object, key: str) -> object:
    if not isinstance(base, list) or not isinstance(over, list):
        return over
    if not all(isinstance(item, Mapping) for item in cast("list[object]", over)):
        return cast("object", over)  # the API server says what is wrong with it
    changes = {str(item.get(key)): item for item in cast("list[Json]", over)}
    kept = [_merged(item, changes.pop(str(item[key]), {})) for item in cast("list[Json]", base)]
    return [*kept, *changes.values()]
