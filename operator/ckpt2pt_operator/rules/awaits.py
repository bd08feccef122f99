"""The training that a conversion waits for, or follows: what its end means, and what is said until then.  Pure."""

from __future__ import annotations

from dataclasses import replace

from ckpt2pt.kube.conversion.report import child
from ckpt2pt.kube.conversion.schema import Json, Workload
from ckpt2pt.kube.conversion.spec import Conversion
from ckpt2pt.kube.conversion.status import Ending
from ckpt2pt_operator.rules.conditions import StatusInput
from ckpt2pt_operator.rules.seen import Training
from ckpt2pt_operator.rules.stages import Blocker

_UNWATCHED = Training(state="Unwatched")


def awaited(document: Json) -> Json:
    """The workload whose end a conversion waits for; an empty object where there is none, or not any more."""
    spec, status = child(document, "spec"), child(document, "status")
    if "follow" in spec:
        over = "followEnd" in status or spec.get("dryRun") is True
        return {} if over else child(spec, "follow", "until")
    return {} if "startTime" in status else child(spec, "startAfter")


def pinned(status_input: StatusInput, training: Training | None) -> StatusInput:
    """From now on it is this very training, and another one of its name is another."""
    return replace(status_input, training_uid=training.uid) if training and training.uid else status_input


def start(conversion: Conversion, status_input: StatusInput, training: Training | None) -> Blocker | Ending | None:
    """What keeps a conversion from beginning, for now or for good; None once its training has succeeded."""
    training = training or _UNWATCHED
    name = _name(conversion.spec.start_after or Workload())
    if training.state == "Succeeded":
        return None
    if training.state == "Failed":
        message = f"{name} failed, so there is nothing whole to convert: {training.message}"
        return Ending(reason="TrainingFailed", message=message)
    if training.state == "Missing" and status_input.training_uid:
        hint = "if it did, make the conversion anew without startAfter"
        return Ending(reason="TrainingDeleted", message=f"{name} was deleted before it was seen to complete; {hint}")
    if training.state == "Unwatched":
        return _unwatched(conversion.spec.start_after or Workload(), training)
    unknown = f"is not known yet{f' ({training.message})' if training.message else ''}"
    known = {"Missing": "is not there yet", "Unknown": unknown}
    what = known.get(training.state, f"runs: {training.message or 'not complete yet'}")
    return Blocker(reason="WaitingForTraining", message=f"{name} {what}")


def follow_end(conversion: Conversion, status_input: StatusInput, training: Training | None) -> str:
    """How the training that is followed has ended, as it is recorded; empty while it has not."""
    if status_input.follow_end or conversion.spec.follow is None or conversion.spec.dry_run or training is None:
        return status_input.follow_end
    if training.state in {"Succeeded", "Failed"}:
        return training.state
    return "Deleted" if training.state == "Missing" and status_input.training_uid else ""


def unfollowed(conversion: Conversion, status_input: StatusInput, training: Training | None) -> Blocker | None:
    """The end of the training that is followed would not be noticed."""
    follow = conversion.spec.follow
    training = training or _UNWATCHED
    over = conversion.spec.dry_run or status_input.follow_end
    if follow is None or follow.until is None or over or training.state != "Unwatched":
        return None
    return _unwatched(follow.until, training)


def _unwatched(workload: Workload, training: Training) -> Blocker:
    """Nobody would notice its end; of one kind there may be several API groups."""
    what = f"{_name(workload)} is of {workload.api_version} {workload.kind}, which this operator does not watch"
    watched = f"it watches {training.message}" if training.message else "it watches no kind"
    hint = "name one of them, or add the kind to trainingKinds in the values of the chart"
    return Blocker(reason="TrainingKindUnknown", message=f"{what}; {watched}; {hint}")


def _name(workload: Workload) -> str:
    return f"{workload.kind} {workload.name}"
