"""Can the workers have the volumes that a conversion names.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ckpt2pt.kube.conversion.job import Mount, mounts_of
from ckpt2pt.kube.conversion.spec import Conversion
from ckpt2pt_operator.rules.conditions import Verdict
from ckpt2pt_operator.rules.views import Claim

_SHARED = frozenset({"ReadWriteMany", "ReadOnlyMany"})
_ONE_POD = "ReadWriteOncePod"


def claims_of(conversion: Conversion) -> dict[str, Mount]:
    """The claims by name, each with the mount that it stands for."""
    found: dict[str, Mount] = {}
    for mount in mounts_of(conversion):
        claim = cast("dict[str, str]", mount.volume.get("persistentVolumeClaim", {}))
        if claim:
            found[claim["claimName"]] = mount
    return found


def verdict(conversion: Conversion, claims: Mapping[str, Claim | None] | None, workers: int) -> Verdict:
    """The condition VolumesReady; False means that no worker can do anything until somebody changes something.

    ``claims`` are those of ``claims_of`` as they were found, None for one that is not there; None for all of it where
    the operator may not look.  ``workers`` run at the same time.
    """
    wanted = claims_of(conversion)
    if not wanted:
        return "True", "Bound", "no claim is needed"
    if claims is None:
        return "Unknown", "NotChecked", "the operator was set not to look at claims"
    for name, mount in wanted.items():
        claim = claims.get(name)
        if claim is None:
            where = f"spec.{mount.roles[0]}.volume"
            return "False", "PVCNotFound", f'persistentvolumeclaim "{name}" not found; create it, or correct {where}'
        if claim.phase == "Lost":
            return "False", "PVCLost", f'persistentvolumeclaim "{name}" has lost its volume; restore it'
        conflict = _conflict(conversion, name, claim, mount, workers)
        if conflict:
            return "False", "AccessModeConflict", conflict
    pending = [name for name in wanted if (claim := claims.get(name)) and claim.phase == "Pending"]
    if pending:
        # A claim that is bound when its first pod is scheduled is no obstacle.
        return "Unknown", "PVCPending", f"persistentvolumeclaim {', '.join(pending)} is not bound yet"
    return "True", "Bound", f"persistentvolumeclaim {', '.join(wanted)} is bound"


def _conflict(conversion: Conversion, name: str, claim: Claim, mount: Mount, workers: int) -> str:
    modes = ", ".join(sorted(claim.modes))
    if claim.modes == frozenset({"ReadOnlyMany"}) and not mount.read_only:
        return f"persistentvolumeclaim {name} is {modes}, and the result is written there; name another in spec.target"
    if workers > 1 and claim.modes and not claim.modes & _SHARED:
        alone = _ONE_POD in claim.modes and len(claim.modes) == 1
        if alone or not conversion.spec.workers.co_schedule:
            hint = "set spec.workers.maxParallelStages to 1"
            hint += "" if alone else ", make it anew with spec.workers.coSchedule: true"
            return f"persistentvolumeclaim {name} is {modes}, and {workers} workers would need it at once; {hint}, or use a ReadWriteMany claim"
    return ""
