"""Verify the result of any conversion, against its manifests or against its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ckpt2pt.core.progress import Reporter
from ckpt2pt.run.targets.request import McoreRequest
from ckpt2pt.run.torch_dist.request import AnyRequest, DistRequest
from ckpt2pt.verification.prove import Reader, verify_target
from ckpt2pt.verification.report import Report


def verify_result(
    request: AnyRequest, stages: Sequence[int], *, level: Literal["digest", "full"], reader: Reader, reporter: Reporter
) -> Report:
    """Verify the given stages of what a request asks for, where it puts it."""
    if isinstance(request, DistRequest):
        from ckpt2pt.run.torch_dist.verify import verify_dist  # noqa: PLC0415 - each kind loads what it needs

        return verify_dist(request, stages, level=level, reader=reader, reporter=reporter)
    if isinstance(request, McoreRequest):
        from ckpt2pt.run.targets.mcore import verify_mcore  # noqa: PLC0415 - as above

        return verify_mcore(request, stages, level=level, reader=reader, reporter=reporter)
    return verify_target(request, stages, level=level, reader=reader, reporter=reporter)
