"""What a worker says of itself, in its termination message or while it runs, and whether that proves a stage.  Pure.

    {"version": 1, "exitCode": 0, "reason": "Converted", "stages": [3], "iteration": 500, "verified": "digest", ...}

Any image can run as a worker, so nothing in a report is trusted: it is bounded in size and depth, its numbers are made
sane, and its text is stripped of control characters.  An exit code of 0 alone proves nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import Conversion
from ckpt2pt.kube.conversion.status import MAX_MESSAGE

UID_VARIABLE = "CKPT2PT_CONVERSION_UID"
"""Names the conversion that a worker reports for."""

CONVERTED, PLANNED = "Converted", "Planned"
"""The reasons of a worker that has done what it was asked for."""

NO_REPORT = "NoReport"
"""The reason of a stage whose worker ended with exit code 0 and did not report that the stage is done."""

MAX_REPORT = 12 << 10
"""Characters; the kubelet keeps 4096 bytes of a container's message and 12 KiB of all of a pod's."""

_VERSION = 1
_MOST = 1 << 63
_MOST_BYTES = 1 << 50
"""Of one stage: the sum of 1024 of them fits into 64 bits."""
_MOST_STAGES = 1024
_MOST_WARNINGS, _MAX_WARNING = 4, 300
_LEVELS = frozenset({"none", "digest", "full"})


# ----------------------------------------------------------------------------------------------- reading foreign values


def child(value: Mapping[str, object], *names: str) -> Json:
    """The object below ``names``; an empty one where there is none."""
    found: object = value
    for name in names:
        found = cast("Json", found).get(name) if isinstance(found, Mapping) else None
    return cast("Json", found) if isinstance(found, Mapping) else {}


def text(value: Mapping[str, object], name: str, limit: int = MAX_MESSAGE) -> str:
    """A string without control characters."""
    found = value.get(name)
    return clean(found, limit) if isinstance(found, str) else ""


def clean(found: str, limit: int = MAX_MESSAGE) -> str:
    """At most ``limit`` printable characters on one line."""
    return "".join(char if char.isprintable() else " " for char in found[: limit * 4])[:limit].strip()


def word(value: Mapping[str, object], name: str) -> str:
    """A reason in CamelCase; empty where it is anything else."""
    found = text(value, name, 128)
    return found if re.fullmatch(r"[A-Z][A-Za-z0-9]*", found) else ""


def number(value: Mapping[str, object], name: str, default: int = 0) -> int:
    """A whole number that is not negative and fits into 64 bits; a fraction is cut off."""
    found = value.get(name)
    if isinstance(found, str) and found.isdecimal() and len(found) < len(str(_MOST)):
        found = int(found)
    if isinstance(found, float) and 0 <= found < _MOST:
        found = int(found)
    return found if type(found) is int and 0 <= found < _MOST else default


# ------------------------------------------------------------------------------------------------------------- a report


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a dry run has found: what would be written, and what it would need.  Numbers of bytes, but for the files.

    ``free`` is None where the file system does not tell.
    """

    files: int
    written: int
    free: int | None
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a worker says of itself.  Numbers of bytes; None is unknown.

    ``conversion`` is the uid that its Job was given, ``verified`` how its files were verified: None, Digest or Full as in
    ``spec.verify``.  Both are empty where they are not said, as by a worker of an older version.
    """

    exit_code: int | None = None
    reason: str = ""
    message: str = ""
    conversion: str = ""
    stages: tuple[int, ...] | None = None
    verified: str = ""
    done: int = 0
    total: int | None = None
    throughput: int = 0
    iteration: int | None = None
    warnings: tuple[str, ...] = ()
    preview: Preview | None = None


def report_of(message: str) -> Report | None:
    """Read a report; None where it is not one, as when a worker was killed and the kubelet took its log instead."""
    if len(message) > MAX_REPORT:
        return None
    try:
        found = json.loads(message)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    value = cast("Json", found)
    if value.get("version") != _VERSION:
        return None
    total = min(number(value, "bytesTotal"), _MOST_BYTES) or None
    iteration = number(value, "iteration", -1)
    verified = text(value, "verified", 16)
    return Report(
        exit_code=number(value, "exitCode", -1) if "exitCode" in value else None,
        reason=word(value, "reason"),
        message=text(value, "message"),
        conversion=text(value, "conversion", 64),
        stages=_stages(value.get("stages")),
        verified=verified.capitalize() if verified in _LEVELS else "",
        done=min(number(value, "bytes"), total or _MOST_BYTES),
        total=total,
        throughput=min(number(value, "throughput"), _MOST_BYTES),
        iteration=iteration if iteration >= 0 else None,
        warnings=_warnings(value.get("warnings")),
        preview=_preview_of(child(value, "plan")) if "plan" in value else None,
    )


def _stages(found: object) -> tuple[int, ...] | None:
    """The stages of a report; () where what is there is no list of stages, None where nothing is."""
    if found is None:
        return None
    given = cast("list[object]", found) if isinstance(found, list) else []
    listed = tuple(stage for stage in given if type(stage) is int and 0 <= stage < _MOST_STAGES)
    return listed if len(listed) == len(given) <= _MOST_STAGES else ()


def _warnings(found: object) -> tuple[str, ...]:
    given = cast("list[object]", found)[:_MOST_WARNINGS] if isinstance(found, list) else []
    texts = (clean(text, _MAX_WARNING) for text in given if isinstance(text, str))
    return tuple(filter(None, texts))


def _preview_of(plan: Json) -> Preview:
    return Preview(
        files=number(plan, "files"),
        written=min(number(plan, "bytes"), _MOST_BYTES),
        free=min(number(plan, "freeSpace"), _MOST_BYTES) if "freeSpace" in plan else None,
        memory=min(number(plan, "memory"), _MOST_BYTES),
    )


# --------------------------------------------------------------------------------------------------------------- a proof


def unproved(report: Report | None, conversion: Conversion, stage: int) -> str:
    """Why the report of a worker that ended with exit code 0 does not prove its stage done; empty where it does.

    The one worker of a dry run, or of a conversion that follows a training, has all stages.
    """
    if report is None:
        return "it ended with exit code 0 and left no report of ckpt2pt in its termination message"
    wanted = PLANNED if conversion.spec.dry_run else CONVERTED
    expected = tuple(range(conversion.topology.pipeline)) if conversion.one_worker else (stage,)
    if report.exit_code != 0 or report.reason != wanted:
        stated = f"exit code {report.exit_code}, {report.reason or 'without a reason'}"
        return f"it ended with exit code 0, and its report says {stated}, not exit code 0, {wanted}"
    if conversion.uid and report.conversion and report.conversion != conversion.uid:
        return f"its report is of another conversion, of uid {report.conversion}, not {conversion.uid}"
    # So many stages that a message has no room for their numbers are left out of it (kube/worker/termination.py).
    if report.stages != expected and not (conversion.one_worker and report.stages is None):
        return f"its report is of stages {_listed(report.stages)}, not {_listed(expected)}"
    return _of_iteration(report, conversion)


def _of_iteration(report: Report, conversion: Conversion) -> str:
    if conversion.spec.dry_run and report.preview is None:
        return "its report holds no plan"
    if conversion.spec.follow and not conversion.spec.dry_run and report.iteration is None:
        return ""  # the training has ended before it saved anything
    if report.iteration is None:
        return "its report names no iteration"
    if conversion.spec.source.iteration not in {None, report.iteration}:
        return f"its report is of iteration {report.iteration}, not {conversion.spec.source.iteration}"
    return ""


def _listed(stages: Sequence[int] | None) -> str:
    found = ", ".join(map(str, stages or ())) or "unknown"
    return found if len(found) <= 64 else f"{found[:60]}..."
