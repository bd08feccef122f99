"""What a conversion may ask of the pods that work for it: the cluster's owner says it, permission by permission.  Pure.

The pods run with the rights of their namespace, so each of these fields would give whoever may create a conversion what
only whoever may create pods should have.  ``worker.defaults`` are the owner's own words and need no permission.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from ckpt2pt.kube.conversion.job import mounts_of
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import Conversion

PERMISSIONS = (
    "podOverrides", "image", "hostPath", "nfs", "csi", "root", "privileged", "serviceAccountName", "priorityClassName",
    "runtimeClassName",
)  # fmt: skip
"""As in the chart's ``worker.allow``."""

_FIELDS = ("podOverrides", "image", "priorityClassName", "runtimeClassName")
_VOLUMES = frozenset({"hostPath", "nfs", "csi"})
_POD_FIELDS = {
    "serviceAccountName": "serviceAccountName",
    "serviceAccount": "serviceAccountName",
    "priorityClassName": "priorityClassName",
    "priority": "priorityClassName",
    "runtimeClassName": "runtimeClassName",
    "hostPID": "privileged",
    "hostIPC": "privileged",
    "hostNetwork": "privileged",
}
"""Fields of a pod that only do harm when they are true, or name something -> the permission."""
_HARMLESS_VOLUMES = frozenset(
    {"name", "emptyDir", "configMap", "secret", "downwardAPI", "projected", "persistentVolumeClaim", "ephemeral"}
)
_HARMLESS_SOURCES = frozenset({"configMap", "secret", "downwardAPI", "clusterTrustBundle"})
"""Of a projected volume; any other is a token or a certificate of the pod's account."""
_CONTAINERS = ("containers", "initContainers", "ephemeralContainers")
_IDS = ("runAsUser", "runAsGroup", "fsGroup")
_SECURITY = frozenset(
    {*_IDS, "supplementalGroups", "runAsNonRoot", "allowPrivilegeEscalation", "capabilities", "readOnlyRootFilesystem",
     "fsGroupChangePolicy", "supplementalGroupsPolicy"}
)  # fmt: skip
"""Fields of a security context that are looked at one by one; any other loosens what keeps a worker in its container."""

_NO_CAPABILITIES = {"drop": ["ALL"]}
_SECCOMP = ("seccompProfile", {"type": "RuntimeDefault"})
_APPARMOR = "container.apparmor.security.beta.kubernetes.io/"
"""Annotations that say what ``appArmorProfile`` says since Kubernetes 1.30."""
_MOST = 6
"""Fields that a message names."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A field that needs a permission."""

    field: str
    permission: str


def to_error(conversion: Conversion, allowed: frozenset[str]) -> str:
    """What it asks for and may not have, and who can change that; empty where it may have all of it."""
    found = [asked for asked in _asked(conversion) if asked.permission not in allowed]
    if not found:
        return ""
    fields = list(dict.fromkeys(asked.field for asked in found))
    more = f" and {len(fields) - _MOST} more" if len(fields) > _MOST else ""
    values = ", ".join(dict.fromkeys(f"worker.allow.{asked.permission}" for asked in found))
    return (
        f"{', '.join(fields[:_MOST])}{more}: not allowed in this cluster; leave it out, or let the cluster's owner set "
        f"{values} to true in the values of the operator's chart"
    )


def _asked(conversion: Conversion) -> Iterator[Asked]:
    for mount in mounts_of(conversion):
        for kind in sorted(_VOLUMES & mount.volume.keys()):
            yield Asked(f"spec.{mount.roles[0]}.volume.{kind}", kind)
    pod, path = conversion.pod, "spec.workers"
    for field in _FIELDS:
        if field in pod:
            yield Asked(f"{path}.{field}", field)
    yield from _of_security(pod.get("security", {}), f"{path}.security")
    yield from _of_annotations(pod, path)
    overrides = pod.get("podOverrides")
    if isinstance(overrides, Mapping):
        template, path = cast("Json", overrides), f"{path}.podOverrides"
        yield from _of_annotations(template.get("metadata"), f"{path}.metadata")
        yield from _of_pod(template.get("spec"), f"{path}.spec")


def _of_annotations(holder: object, path: str) -> Iterator[Asked]:
    annotations = cast("Json", holder).get("annotations") if isinstance(holder, Mapping) else None
    for name in sorted(cast("Json", annotations)) if isinstance(annotations, Mapping) else ():
        if name.startswith(_APPARMOR):
            yield Asked(f"{path}.annotations[{name}]", "privileged")


def _of_pod(spec: object, path: str) -> Iterator[Asked]:
    """What a piece of a pod asks for; what is no pod at all, the API server refuses."""
    if not isinstance(spec, Mapping):
        return
    fields = cast("Json", spec)
    for field, permission in _POD_FIELDS.items():
        if fields.get(field):
            yield Asked(f"{path}.{field}", permission)
    if fields.get("automountServiceAccountToken", False) is not False:  # null takes away what we put there
        yield Asked(f"{path}.automountServiceAccountToken", "serviceAccountName")
    if "securityContext" in fields:
        yield from _of_security(fields["securityContext"], f"{path}.securityContext")
    for number, volume in _objects(fields, "volumes"):
        yield from _of_volume(volume, f"{path}.volumes[{number}]")
    for kind in _CONTAINERS:
        for number, container in _objects(fields, kind):
            yield from _of_container(container, f"{path}.{kind}[{number}]")


def _of_volume(volume: Json, path: str) -> Iterator[Asked]:
    for kind in sorted(volume.keys() - _HARMLESS_VOLUMES):
        yield Asked(f"{path}.{kind}", kind if kind in _VOLUMES else "image" if kind == "image" else "csi")
    projected = volume.get("projected")
    sources = _objects(cast("Json", projected), "sources") if isinstance(projected, Mapping) else ()
    for number, source in sources:
        for kind in sorted(source.keys() - _HARMLESS_SOURCES):
            yield Asked(f"{path}.projected.sources[{number}].{kind}", "serviceAccountName")


def _of_container(container: Json, path: str) -> Iterator[Asked]:
    if "image" in container:
        yield Asked(f"{path}.image", "image")
    if "securityContext" in container:
        yield from _of_security(container["securityContext"], f"{path}.securityContext")
    for number, port in _objects(container, "ports"):
        if port.get("hostPort"):
            yield Asked(f"{path}.ports[{number}].hostPort", "privileged")


def _of_security(context: object, path: str) -> Iterator[Asked]:
    if not isinstance(context, Mapping):
        yield Asked(path, "privileged")  # null takes away what we put there
        return
    given = cast("Json", context)
    for field in _IDS:
        if field in given and not given[field]:
            yield Asked(f"{path}.{field}", "root")
    groups = given.get("supplementalGroups")
    if isinstance(groups, list) and 0 in cast("list[object]", groups):
        yield Asked(f"{path}.supplementalGroups", "root")
    if given.get("runAsNonRoot", True) is not True:
        yield Asked(f"{path}.runAsNonRoot", "root")
    if given.get("allowPrivilegeEscalation", False) is not False:
        yield Asked(f"{path}.allowPrivilegeEscalation", "privileged")
    if given.get("capabilities", _NO_CAPABILITIES) != _NO_CAPABILITIES:
        yield Asked(f"{path}.capabilities", "privileged")
    for field in sorted(given.keys() - _SECURITY):
        if (field, given[field]) != _SECCOMP:
            yield Asked(f"{path}.{field}", "privileged")


def _objects(value: Json, name: str) -> Iterator[tuple[int, Json]]:
    found = value.get(name)
    for number, item in enumerate(cast("list[object]", found) if isinstance(found, list) else []):
        if isinstance(item, Mapping):
            yield number, cast("Json", item)
