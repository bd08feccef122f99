"""A conversion in either direction: whoever carries one out need not know which it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ckpt2pt.core.progress import Reporter
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import UsageError, ref
from ckpt2pt.run.back.request import BackRequest
from ckpt2pt.run.targets.request import McoreRequest

if TYPE_CHECKING:
    from ckpt2pt.run.conversion import Outcome
    from ckpt2pt.verification.report import Report

Level = Literal["digest", "full"]
Reader = Literal["own", "torch"]
AnyRequest = Request | BackRequest | McoreRequest


def pipeline_of(request: AnyRequest) -> int:
    """How many pipeline stages the result has."""
    if isinstance(request, Request):
        return request.topology.pipeline
    if isinstance(request, McoreRequest):
        from ckpt2pt.run.targets.mcore import pipeline_of_mcore  # noqa: PLC0415

        return pipeline_of_mcore(request)
    from ckpt2pt.run.back import discover  # noqa: PLC0415 - each direction loads what it needs

    return discover.pipeline_of(request)


def run(request: AnyRequest, stages: Sequence[int], reporter: Reporter) -> Outcome:
    """Convert the given pipeline stages of the result; what an earlier run finished is kept."""
    if isinstance(request, Request):
        from ckpt2pt.run.conversion import run as convert  # noqa: PLC0415

        return convert(request, stages, reporter)
    if isinstance(request, McoreRequest):
        from ckpt2pt.run.targets.mcore import run_mcore  # noqa: PLC0415

        return run_mcore(request, reporter, stages)
    from ckpt2pt.run.back.run import run_back  # noqa: PLC0415

    return run_back(request, reporter, stages)


def verify(
    request: AnyRequest, stages: Sequence[int], *, level: Level, reader: Reader = "own", reporter: Reporter
) -> Report:
    """Verify the given stages of the result, against its manifests or against its source."""
    if isinstance(request, Request):
        from ckpt2pt.verification.prove import verify_target  # noqa: PLC0415

        return verify_target(request, stages, level=level, reader=reader, reporter=reporter)
    if isinstance(request, McoreRequest):
        from ckpt2pt.run.targets.mcore import verify_mcore  # noqa: PLC0415

        return verify_mcore(request, stages, level=level, reader=reader, reporter=reporter)
    from ckpt2pt.run.back.verify import verify_import  # noqa: PLC0415

    if reader != "own":
        raise UsageError(
            f"{ref('reader')} is torch, and torch reads no file of MindSpore",
            where=ref("spec"),
            hint=f"leave {ref('reader')} out",
            field="reader",
        )
    return verify_import(request, stages, level=level, reporter=reporter)


def with_workers(request: AnyRequest, workers: int) -> AnyRequest:
    """The same with so many ranks at a time."""
    if isinstance(request, Request):
        return replace(request, workers=workers)
    return replace(request, pace=replace(request.pace, workers=workers))
