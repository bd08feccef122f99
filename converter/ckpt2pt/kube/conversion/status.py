"""What is known of a run -> the status of its CheckpointConversion.  Pure: times come in as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt2pt.core.foldernames import iteration_name, mindformers_iteration_name
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import Conversion

State = Literal["Pending", "Running", "Succeeded", "Failed"]

REASONS = {
    64: "WrongUsage",
    65: "InputWrong",
    66: "InputMissing",
    70: "Bug",
    74: "InputOutputError",
    75: "TryAgain",
    76: "DigestMismatch",
}
"""One word for each exit code; anything above 128 is a kill."""

TERMINAL = frozenset({"Succeeded", "Planned", "Failed", "Cancelled"})
"""Phases in which a conversion has ended."""

WAITING = "WaitingForCheckpoint"
"""The reason of a worker that waits until every rank has saved; its message says who has not."""

FOLLOWING, FOLLOWED = "Following", "TrainingFollowed"
"""The reasons of a conversion of each new checkpoint of a training: while it runs, and when the training has ended."""

WORST_FIRST = (64, 65, 66, 76, 70, 74, 75)
"""A user hints a wrong document before anything else, then the input; what only wants another try comes last."""

MAX_MESSAGE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One pipeline stage as it was last seen; ``done`` and ``total`` are bytes to read, total None before they are known.

    ``iteration`` and ``verified`` are those of the report that proves it done; ``verified`` is empty where none says it.
    """

    stage: int
    state: State = "Pending"
    reason: str = ""
    message: str = ""
    done: int = 0
    total: int | None = None
    throughput: int = 0
    attempts: int = 0
    disruptions: int = 0
    node: str = ""
    iteration: int | None = None
    verified: str = ""

    @property
    def fraction(self) -> float:
        """Share of this stage that is done."""
        if self.state == "Succeeded":
            return 1.0
        return min(self.done / self.total, 1.0) if self.total else 0.0

    def document(self) -> Json:
        """Its entry in ``stageStatuses``; what is not known is left out."""
        optional: Json = {
            "reason": self.reason,
            "message": self.message[:MAX_MESSAGE],
            "bytes": self.done,
            "bytesTotal": self.total,
            "throughput": self.throughput,
            "attempts": self.attempts,
            "disruptions": self.disruptions,
            "node": self.node,
            "iteration": self.iteration,
            "verified": self.verified,
        }
        return {"stage": self.stage, "state": self.state, **{key: value for key, value in optional.items() if value}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a run ended before every stage was done."""

    reason: str
    message: str


def disagreement(records: Sequence[StageRecord]) -> Ending | None:
    """The end of a run whose stages are of different iterations: together they are no checkpoint, and none is published."""
    found: dict[int, list[str]] = {}
    for record in records:
        if record.iteration is not None:
            found.setdefault(record.iteration, []).append(str(record.stage))
    if len(found) < 2:
        return None
    iterations = "; ".join(f"iteration {each} of stage {', '.join(stages)}" for each, stages in sorted(found.items()))
    hint = "the source got a newer checkpoint meanwhile; retry it, or name one with spec.source.iteration"
    return Ending(reason="IterationsDiffer", message=f"converted were {iterations[:800]}; {hint}")


def status_of_run(
    conversion: Conversion,
    records: Sequence[StageRecord],
    *,
    job: str,
    started: str | None,
    finished: str | None = None,
    ended: Ending | None = None,
    planned: str = "",
    iteration: int | None = None,
    now: str | None = None,
) -> Json:
    """The status document, as the CRD describes it, from the records of the stages; all times are RFC 3339.

    ``now`` is the time of conditions before the end; that of the start when it is not given.  ``planned`` is what a dry
    run has found.
    """
    count = {state: sum(record.state == state for record in records) for state in ("Running", "Succeeded", "Failed")}
    phase = _phase(conversion, records, started=started, finished=finished, ended=ended)
    when = finished or now or started
    share = sum(record.fraction for record in records) / len(records) if records else 0.0
    status: Json = {
        "phase": phase,
        "progress": f"{int(share * 100)}%",
        "stageSummary": f"{count['Succeeded']}/{len(records)}",
        "stages": {
            "total": len(records),
            "active": count["Running"],
            "succeeded": count["Succeeded"],
            "failed": count["Failed"],
        },
        "stageStatuses": [record.document() for record in records],
        "bytesDone": sum(record.done for record in records),
        "bytesTotal": sum(record.total or 0 for record in records),
        "job": job,
        # Each condition has a time, and before the start there may be none to give.
        "conditions": _conditions(conversion, records, phase, ended, when, planned) if when else [],
    }
    if iteration is not None:
        status["iteration"] = iteration
        target = conversion.spec.target
        name = mindformers_iteration_name if target.format == "MindFormers" else iteration_name
        inner = [] if target.format in {"MindSpore", "Safetensors"} else [name(iteration)]
        parts = [*([] if target.path == "." else [target.path]), *inner]
        status["outputPath"] = "/".join(parts) or "."
        if phase == "Succeeded":
            status["reportPath"] = "/".join([*parts, ".ckpt2pt/report.json"])
    times = {"startTime": started, "completionTime": finished}
    return status | {name: time for name, time in times.items() if time}


def _phase(
    conversion: Conversion,
    records: Sequence[StageRecord],
    *,
    started: str | None,
    finished: str | None,
    ended: Ending | None,
) -> str:
    if not finished:
        return "Running" if started else "Pending"
    if ended is not None and ended.reason == "Cancelled":
        return "Cancelled"
    if ended is not None or any(record.state != "Succeeded" for record in records):
        return "Failed"
    return "Planned" if conversion.spec.dry_run else "Succeeded"


def _conditions(
    conversion: Conversion, records: Sequence[StageRecord], phase: str, ended: Ending | None, when: str, planned: str
) -> list[Json]:
    """Complete and Failed as a Job has them, Verified, and the three that kstatus reads."""
    done, over = phase in {"Succeeded", "Planned"}, phase in {"Failed", "Cancelled"}
    reason, message = _why(conversion, records, phase, ended, planned)
    verified = _verified(conversion, records, done=done)

    def condition(kind: str, status: str, reason: str, message: str) -> Json:
        return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": when}

    def yes(value: bool) -> str:
        return "True" if value else "False"

    # What went wrong is said where one looks for it, and not in every condition.
    count = f"{sum(record.state == 'Succeeded' for record in records)} of {len(records)} stages are done"
    return [
        condition("Complete", yes(done), reason, count if over else message),
        condition("Failed", yes(over), reason, message),
        condition("Verified", *verified),
        condition("Ready", yes(done), reason, message),
        condition("Reconciling", yes(phase in {"Pending", "Running"}), reason, "it has ended" if over else message),
        condition("Stalled", yes(over), reason, message),
    ]


def _verified(conversion: Conversion, records: Sequence[StageRecord], *, done: bool) -> tuple[str, str, str]:
    """The condition Verified: True only where the report of every stage says so."""
    if conversion.spec.verify == "None" or conversion.spec.dry_run:
        return "False", "NotRequested", "verification was not asked for"
    mismatch = [record.stage for record in records if record.reason == REASONS[76]]
    if mismatch:
        return "False", REASONS[76], f"stages {mismatch} differ from what was written, or from their source"
    if not done:
        return "False", "NotYet", "not every stage is verified yet"
    enough = {conversion.spec.verify, "Full"}
    silent = [str(record.stage) for record in records if record.verified not in enough]
    if silent:
        what = f"no report says that stage {', '.join(silent)} was verified as spec.verify, {conversion.spec.verify}, asks for"
        return "Unknown", "NotReported", what[:MAX_MESSAGE]
    if conversion.spec.verify == "Full":
        return "True", "SourceMatches", "every file was read back, and every element is that of its source"
    return "True", "DigestsMatch", "every file was read back, and is what was written"


def _why(
    conversion: Conversion, records: Sequence[StageRecord], phase: str, ended: Ending | None, planned: str
) -> tuple[str, str]:
    if ended is not None:
        return ended.reason, ended.message
    failed = [record for record in records if record.state == "Failed"]
    if phase == "Failed" and failed:
        stages = ", ".join(str(record.stage) for record in failed)
        return "StageFailed", f"stage {stages} failed; stage {failed[0].stage}: {failed[0].message}"[:MAX_MESSAGE]
    if conversion.spec.follow and not conversion.spec.dry_run:
        if phase == "Succeeded":
            return FOLLOWED, "the training has ended, and what it saved is converted"
        return FOLLOWING, "each new checkpoint of the training is converted as it becomes whole"
    if phase == "Planned":
        return "Planned", planned or "planned; nothing was written"
    if phase == "Succeeded":
        return "AllStagesSucceeded", f"all {len(records)} stages are converted"
    return "InProgress", f"{sum(record.state == 'Succeeded' for record in records)} of {len(records)} stages are done"
