"""Verify an import that is there: against its manifests, or against the checkpoint, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ckpt2pt.core.names import NameTable
from ckpt2pt.core.progress import Advance, Reporter
from ckpt2pt.core.topology import Rank
from ckpt2pt.io.paths import status
from ckpt2pt.publish import Target
from ckpt2pt.run.back.discover import BackSurvey, files_named, survey_back
from ckpt2pt.run.back.request import BackRequest
from ckpt2pt.run.back.run import held_of, target_back
from ckpt2pt.verification.imported import compare_import
from ckpt2pt.verification.manifests import digest_files, published, recorded_bytes
from ckpt2pt.verification.prove import check_there, digests, joined, reports_of
from ckpt2pt.verification.report import Findings, Report


def verify_import(
    request: BackRequest, stages: Sequence[int], *, level: Literal["digest", "full"], reporter: Reporter
) -> Report:
    """Verify the given stages of the result of an import; ``full`` is ``digest``, and every element besides."""
    found = survey_back(request)
    target = target_back(request, found)
    check_there(target)
    ranks = [(tp, pp) for pp in stages for tp in range(found.layout.tensor)]
    if level == "digest":
        reports = digests(target, ranks, reporter)
    else:
        totals = {rank: recorded_bytes(target, rank) for rank in ranks}
        reports = reports_of(
            totals, found.iteration, reporter, lambda rank, advance: _verify(request, found, target, rank, advance)
        )
    return joined(target, level, [*published(target, stages)], reports)


def _verify(request: BackRequest, found: BackSurvey, target: Target, rank: Rank, advance: Advance) -> Report:
    results = {name: target.folder / name for name in files_named(request, found.layout, rank)}
    report, crcs = Findings().report(target.folder, 0), None
    if all(map(status, results.values())):  # else the manifest tells which is not there
        held = held_of(request, found, rank)
        report, crcs = compare_import(held, rank, results, NameTable(request.rules), advance)
    differences, nbytes = digest_files(target, rank, advance, crcs)
    return replace(report, differences=(*differences, *report.differences), checked_bytes=nbytes)
