"""A conversion of any kind: whoever carries one out need not know which it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from ckpt2pt.core.progress import Reporter
from ckpt2pt.discover.request import Request
from ckpt2pt.run.targets.request import McoreRequest

if TYPE_CHECKING:
    from ckpt2pt.run.conversion import Outcome
    from ckpt2pt.verification.report import Report

AnyRequest = Request | McoreRequest


def pipeline_of(request: AnyRequest) -> int:
    """How many pipeline stages the result has."""
    if isinstance(request, Request):
        return request.topology.pipeline
    from ckpt2pt.run.targets.mcore import pipeline_of_mcore  # noqa: PLC0415 - each kind loads what it needs

    return pipeline_of_mcore(request)


def run(request: AnyRequest, stages: Sequence[int], reporter: Reporter) -> Outcome:
    """Convert the given pipeline stages of the result; what an earlier run finished is kept."""
    if isinstance(request, Request):
        from ckpt2pt.run.conversion import run as convert  # noqa: PLC0415 - each kind loads what it needs

        return convert(request, stages, reporter)
    from ckpt2pt.run.targets.mcore import run_mcore  # noqa: PLC0415 - the same

    return run_mcore(request, reporter, stages)


def verify(
    request: AnyRequest,
    stages: Sequence[int],
    *,
    level: Literal["digest", "full"],
    reader: Literal["own", "torch"] = "own",
    reporter: Reporter,
) -> Report:
    """Verify the given stages of the result, against its manifests or against its source."""
    if isinstance(request, Request):
        from ckpt2pt.verification.prove import verify_target  # noqa: PLC0415 - each kind loads what it needs

        return verify_target(request, stages, level=level, reader=reader, reporter=reporter)
    from ckpt2pt.run.targets.mcore import verify_mcore  # noqa: PLC0415 - the same

    return verify_mcore(request, stages, level=level, reader=reader, reporter=reporter)
