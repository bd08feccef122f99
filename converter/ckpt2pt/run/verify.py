"""Verify the result of any conversion, against its manifests or against its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ckpt2pt.core.progress import Reporter
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import UsageError, ref
from ckpt2pt.run.targets.request import AnyRequest
from ckpt2pt.run.targets.verify import verify_by_tensors
from ckpt2pt.verification.prove import Reader, verify_target
from ckpt2pt.verification.report import Report


def verify_result(
    request: AnyRequest, stages: Sequence[int], *, level: Literal["digest", "full"], reader: Reader, reporter: Reporter
) -> Report:
    """Verify the given stages of what a request asks for, where it puts it.

    Raises :class:`UsageError` where torch is to read a result that it cannot be compared by.
    """
    if isinstance(request, Request):
        return verify_target(request, stages, level=level, reader=reader, reporter=reporter)
    if reader != "own":
        raise UsageError(
            f"{ref('reader')} is torch, which compares results for Megatron-LM 0.6 alone",
            where=ref("spec"),
            hint=f"leave {ref('reader')} out: the own reader compares every element with the source; another proof is to load the "
            "result with Megatron-LM itself",
            field="reader",
        )
    return verify_by_tensors(request, stages, level=level, reporter=reporter)
