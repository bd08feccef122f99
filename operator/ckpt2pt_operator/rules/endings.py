"""What is said at the end of a Job: why it has failed and what to do about it, or what a dry run has found.  Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt2pt.errors import FAILS_JOB, NOT_THE_SPEC, size
from ckpt2pt.kube.conversion.report import report_of
from ckpt2pt.kube.conversion.spec import Conversion
from ckpt2pt.kube.conversion.status import Ending, StageRecord
from ckpt2pt_operator.rules.views import Job, Pod

RETRY_ANNOTATION = "ckpt2pt.dev/retry"

_REASONS = {
    "DeadlineExceeded": "ActiveDeadline",
    "MaxFailedIndexesExceeded": "MaxFailedStages",
    "FailedIndexes": "StageFailed",
    "BackoffLimitExceeded": "StageFailed",
    "PodFailurePolicy": "StageFailed",
}


def reason_of(job: Job) -> str:
    """What its end means if not every stage is done."""
    return "StageFailed" if job.ending == "Complete" else _REASONS.get(job.reason, job.reason or "JobFailed")


def planned(pods: Sequence[Pod]) -> str:
    """What the worker of a dry run has found, in one sentence; empty where it left none."""
    reports = [report for pod in pods if pod.phase == "Succeeded" and (report := report_of(pod.report))]
    found = next((report for report in reports if report.preview), None)
    if found is None or found.preview is None:
        return ""
    preview = found.preview
    return (
        f"{preview.files} files are planned: {size(found.total or 0)} to read, {size(preview.written)} to write with "
        f"{'an unknown amount' if preview.free is None else size(preview.free)} free, at most {size(preview.memory)} of memory for a worker; nothing was written"
    )


def ending(conversion: Conversion, job: Job, pods: Sequence[Pod], failed: Sequence[StageRecord]) -> Ending:
    """The end in words, with the hint; ``failed`` are the stages that were given up."""
    reason = reason_of(job)
    hint = f"correct it, then: kubectl annotate ckc {conversion.name} --overwrite {RETRY_ANNOTATION}=$(date +%s)"
    wrong = next((pod for pod in pods if pod.exit_code in FAILS_JOB), None)
    if wrong is not None:
        report = report_of(wrong.report)
        reason = report.reason if report and report.reason in NOT_THE_SPEC else "InvalidSpec"
        message = report.message if report and report.message else f"pod {wrong.name} refused its arguments"
        again = f"; {hint}" if reason in NOT_THE_SPEC else ""  # the document may stay as it is
        return Ending(reason=reason, message=f"{message[:800]}{again}")
    if reason == "ActiveDeadline":
        seconds = conversion.spec.active_deadline_seconds
        return Ending(reason=reason, message=f"not done after spec.activeDeadlineSeconds, {seconds} s")
    stages = ", ".join(str(record.stage) for record in failed)
    if not failed:
        return Ending(reason=reason, message=job.message or "the Job failed")
    first = failed[0]
    message = f"stage {stages} failed; stage {first.stage}: {first.reason}: {first.message}"
    return Ending(reason=reason, message=f"{message[:800]}; {hint}")
