"""Verify a result by global tensors that is there: against its manifests, or against its source, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from ckpt2pt.core.progress import Advance, Reporter
from ckpt2pt.core.topology import Rank
from ckpt2pt.io.paths import is_file
from ckpt2pt.run.targets import huggingface, mcore, mindformers, repair, torch_dist
from ckpt2pt.run.targets.request import (
    DistRequest,
    HuggingFaceRequest,
    McoreRequest,
    MindFormersRequest,
    RepairRequest,
)
from ckpt2pt.run.targets.shards import Shards
from ckpt2pt.verification.manifests import digest_files, extra_files, merged, published, recorded_bytes
from ckpt2pt.verification.prove import check_there, digests, joined, reports_of
from ckpt2pt.verification.report import Report

_AnyRequest = McoreRequest | DistRequest | RepairRequest | HuggingFaceRequest | MindFormersRequest
_AnyFound = mcore.Found | torch_dist.Found | repair.Found | Shards


def verify_by_tensors(
    request: _AnyRequest,
    stages: Sequence[int],
    *,
    level: Literal["digest", "full"],
    reporter: Reporter,
) -> Report:
    """Verify what the ranks of the given stages wrote; ``full`` is ``digest``, and every element besides."""
    found = _found(request)
    target = found.target
    check_there(target)
    ranks = [(tp, pp) for pp in stages for tp in range(target.tensor)]
    if level == "digest":
        reports = digests(target, ranks, reporter)
    else:
        totals = {rank: recorded_bytes(target, rank) for rank in ranks}
        reports = reports_of(totals, target.iteration, reporter, partial(_verify, found))
    stated = found.compare_rest() if level == "full" and isinstance(found, torch_dist.Found) else ()
    listed = {name for rank in target.ranks for name in found.listed(rank)}
    rest = [*stated, *published(target, stages), *merged(target), *extra_files(target, listed | {*target.kind.merged})]
    return joined(target, level, rest, reports)


def _found(request: _AnyRequest) -> _AnyFound:
    if isinstance(request, HuggingFaceRequest):
        return huggingface.find(request)
    if isinstance(request, MindFormersRequest):
        return mindformers.find_weights(request)
    if isinstance(request, DistRequest):
        return torch_dist.find(request)
    return repair.find(request) if isinstance(request, RepairRequest) else mcore.find(request)


def _verify(found: _AnyFound, rank: Rank, advance: Advance) -> Report:
    target, crcs = found.target, dict[str, int]()
    report = Report(folder=str(target.folder), level="full", differences=(), checked_tensors=0, checked_bytes=0)
    if all(is_file(target.folder / name) for name in found.listed(rank)):  # else the manifest tells what is not there
        report, known = found.compare(rank, advance)
        crcs.update(known)
    differences, nbytes = digest_files(target, rank, advance, crcs)
    return replace(
        report, folder=str(target.folder), differences=(*differences, *report.differences), checked_bytes=nbytes
    )
