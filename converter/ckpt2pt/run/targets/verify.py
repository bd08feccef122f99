"""Verify a result of Megatron-LM 0.7 to 0.19 that is there: against its manifests, or against its source, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ckpt2pt.core.progress import Advance, Reporter
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import UsageError, ref
from ckpt2pt.io.paths import status
from ckpt2pt.publish import Target
from ckpt2pt.run.targets.mcore import Found, find
from ckpt2pt.run.targets.request import McoreRequest
from ckpt2pt.verification.manifests import digest_files, published, recorded_bytes, surplus
from ckpt2pt.verification.mcore import compare_files
from ckpt2pt.verification.prove import check_there, digests, joined, reports_of
from ckpt2pt.verification.report import Report


def verify_mcore(
    request: McoreRequest,
    stages: Sequence[int],
    *,
    level: Literal["digest", "full"],
    reader: Literal["own", "torch"],
    reporter: Reporter,
) -> Report:
    """Verify the given stages of a result; ``full`` is ``digest``, and every element besides."""
    if reader != "own":
        raise UsageError(
            f"{ref('reader')} is torch, which compares results of Megatron-LM 0.6 alone",
            where=ref("spec"),
            hint=f"leave {ref('reader')} out",
            field="reader",
        )
    found = find(request)
    target, layout = found.target, found.layout
    check_there(target)
    ranks = [(tp, pp) for pp in stages for tp in range(layout.topology.tensor)]
    if level == "digest":
        reports = digests(target, ranks, reporter)
    else:
        totals = {rank: recorded_bytes(target, rank) for rank in ranks}
        reports = reports_of(
            totals, target.iteration, reporter, lambda rank, advance: _verify(found, target, rank, advance)
        )
    listed = {
        f"{layout.directory(rank)}/{file.name}" for rank in layout.topology.ranks() for file in layout.files(rank)[0]
    }
    return joined(target, level, [*published(target, stages), *surplus(target, listed)], reports)


def _verify(found: Found, target: Target, rank: Rank, advance: Advance) -> Report:
    folder = target.folder / found.layout.directory(rank)
    results = {file.name: folder / file.name for file in found.layout.files(rank)[0]}
    if not all(map(status, results.values())):  # the manifest tells what is not there
        differences, nbytes = digest_files(target, rank, advance)
        return Report(
            folder=str(target.folder), level="full", differences=differences, checked_tensors=0, checked_bytes=nbytes
        )
    report, _ = compare_files(found.expected, rank, results, advance, found.layout.directory(rank))
    differences, nbytes = digest_files(target, rank, advance)
    return replace(
        report, folder=str(target.folder), differences=(*differences, *report.differences), checked_bytes=nbytes
    )
