"""Verify a torch_dist result that is there: against its manifests, or against its source, element by element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from ckpt2pt.core.progress import Advance, Reporter
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import UsageError, ref
from ckpt2pt.io.paths import status
from ckpt2pt.publish import Target
from ckpt2pt.run.torch_dist.convert import Found, find
from ckpt2pt.run.torch_dist.request import DistRequest
from ckpt2pt.verification.manifests import digest_files, merged, published, recorded_bytes, surplus
from ckpt2pt.verification.prove import check_there, digests, joined, reports_of
from ckpt2pt.verification.report import Findings, Report
from ckpt2pt.verification.torch_dist import compare_parts


def verify_dist(
    request: DistRequest,
    stages: Sequence[int],
    *,
    level: Literal["digest", "full"],
    reader: Literal["own", "torch"],
    reporter: Reporter,
) -> Report:
    """Verify what the workers of the given stages wrote; ``full`` is ``digest``, and every element besides."""
    if reader != "own":
        raise UsageError(
            f"{ref('reader')} is torch, which is for files that torch.load reads",
            where=ref("spec"),
            hint=f"leave {ref('reader')} out",
            field="reader",
        )
    found = find(request)
    target = found.target
    check_there(target)
    ranks = [(tp, pp) for pp in stages for tp in range(found.division.tensor)]
    if level == "digest":
        reports = digests(target, ranks, reporter)
    else:
        totals = {rank: recorded_bytes(target, rank) for rank in ranks}
        reports = reports_of(
            totals, found.state.iteration, reporter, lambda rank, advance: _verify(found, target, rank, advance)
        )
    listed = {found.division.file(rank)[0].name for rank in found.division.ranks()}
    rest = [*published(target, stages), *merged(target), *surplus(target, listed | {*target.kind.merged})]
    return joined(target, level, rest, reports)


def _verify(found: Found, target: Target, rank: Rank, advance: Advance) -> Report:
    division = found.division
    file, _ = division.file(rank)
    findings, path = Findings(), target.folder / file.name
    crcs: Mapping[str, int] = {}
    seen = status(path)
    if seen and seen.st_size == file.lay_out().nbytes:  # else the manifest tells that it is not there, or was cut
        crcs = compare_parts(division.index, list(division.layers.numbers), file, path, findings, advance)
    differences, nbytes = digest_files(target, rank, advance, crcs)
    return replace(
        findings.report(target.folder, nbytes), differences=(*differences, *findings.differences), checked_bytes=nbytes
    )
