"""Carry out an import: each rank's files by the engine, then its metadata, then its manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.names import NameTable, is_split, prefix_remark
from ckpt2pt.core.progress import Reporter
from ckpt2pt.core.topology import Rank
from ckpt2pt.engine.write import ReadPieces
from ckpt2pt.errors import ref
from ckpt2pt.formats.folders import keep_apart
from ckpt2pt.formats.megatron.read import ROLES
from ckpt2pt.formats.megatron.resume import warning
from ckpt2pt.formats.mindspore.imported import payload_bytes
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.publish import MINDSPORE, Target
from ckpt2pt.run.back.discover import BackSurvey, held_for, pipeline_of, prepare_back, prove_unchanged_back, survey_back
from ckpt2pt.run.back.request import BackRequest
from ckpt2pt.run.conversion import Conversion, Outcome, carry_out
from ckpt2pt.run.rank import RankTask

if TYPE_CHECKING:
    from ckpt2pt.verification.tensors import Held

log = logging.getLogger("ckpt2pt")

META, META_OF_SOURCE = "pt_meta", "source_pt_meta"
"""Where the metadata goes below the MindSpore folder; the second where the ranks beside it are of another layout."""


def meta_folder(found: BackSurvey) -> str:
    """Where the metadata goes, which describes the checkpoint that is imported."""
    return META_OF_SOURCE if found.relaid else META


@dataclass(frozen=True, slots=True)
class _Reading:
    """The source of one rank on its way to MindSpore."""

    request: BackRequest
    found: BackSurvey
    rank: Rank

    def prove_unchanged(self) -> None:
        prove_unchanged_back(self.request, self.found, self.rank)

    def prove_read(self, read: ReadPieces) -> Mapping[str, int]:
        """By the CRC-32 of each record of the archives; what lies between the pieces is read now."""
        if self.request.verify == "none":
            return {"verified": 0, "notChecked": len(read), "none": 0}
        for path, pieces in read.items():
            Archive.open(Path(path)).prove_read(pieces)
        return {"verified": len(read), "notChecked": 0, "none": 0}

    def prove_result(self, partials: Mapping[str, Path], heed: Callable[[], None]) -> Mapping[str, int]:
        from ckpt2pt.verification.imported import prove_import  # noqa: PLC0415 - numpy, and only when asked for

        held = held_of(self.request, self.found, self.rank)
        return prove_import(held, self.rank, partials, NameTable(self.request.rules), heed=heed)


def _plan(request: BackRequest, found: BackSurvey, rank: Rank, target: Target) -> RankTask:
    prepared, folder = prepare_back(request, found, rank), meta_folder(found)
    return RankTask(
        rank=rank,
        target=target,
        reading=_Reading(request, found, rank),
        verify=request.verify,
        repair=request.overwrite,
        files=prepared.files,
        moves=prepared.moves,
        metadata={f"{folder}/{name}": content for name, content in prepared.metadata.items()},
        copies=prepared.copies,
        source_bytes=payload_bytes(prepared.entries),
        facts={"source": str(found.origin(rank)), "evidence": prepared.evidence},
        remarks=(prefix_remark(prepared.prefix),) if prepared.prefix else (),
    )


def held_of(request: BackRequest, found: BackSurvey, rank: Rank) -> Held:
    """What the checkpoint holds for a rank of the result, for its proof."""
    from ckpt2pt.verification.tensors import Held  # noqa: PLC0415 - numpy, and only when asked for

    stored, tensors = held_for(request, found, rank)
    return Held(
        tensors=tensors,
        layout=found.layout if found.relaid else None,
        template=stored.template,
        iteration=found.iteration,
        roles=[ROLES[kind] for kind in request.contents] if request.full else ["param"],
    )


def _examine(request: BackRequest, found: BackSurvey, target: Target, pp: int) -> tuple[str, ...]:
    if found.layout.tensor == 1:
        return ()
    from ckpt2pt.verification.copies import copies_in_stage  # noqa: PLC0415 - numpy, for layouts that can have copies

    def weights(rank: Rank) -> list[TensorRef]:
        entries = prepare_back(request, found, rank).entries
        return [e.source for e in entries if e.role == "param" and is_split(e.name) and isinstance(e.source, TensorRef)]

    def place(rank: Rank) -> object:
        return f"tp {rank[0]} of the result" if found.relaid else found.ranks[rank]

    return copies_in_stage(target, pp, weights, place)


def target_back(request: BackRequest, found: BackSurvey) -> Target:
    """The MindSpore folder."""
    return Target(
        root=request.target,
        iteration=found.iteration,
        identity=found.identity,
        stages=found.layout.pipeline,
        tensor=found.layout.tensor,
        kind=MINDSPORE,
    )


def keep_import_apart(request: BackRequest, found: BackSurvey, target: Target) -> None:
    """Refuse a result in the place of what it is made from."""
    source = ref("source.path")
    keep_apart(target, {request.source: source, found.folder: source, request.maps: ref("metadata.path")})


def import_of(request: BackRequest, stages: Sequence[int]) -> Conversion:
    """What is imported: the given pipeline stages of the result."""
    found = survey_back(request)
    if found.topology.remark:
        log.warning("%s", found.topology.remark)
    log.debug("iteration %d of %s, cut as %s", found.iteration, request.source, found.topology)
    for tp, pp in found.layout.ranks():
        if pp in stages:
            log.debug("tp %d pp %d: %s -> rank_%d", tp, pp, found.origin((tp, pp)), found.layout.source_rank(tp, pp))
    target = target_back(request, found)
    keep_import_apart(request, found, target)
    return Conversion(
        target=target,
        pace=request.pace,
        verify=request.verify,
        overwrite=request.overwrite,
        identity_options=request.identity_options(found.layout),
        facts={},
        inputs=found.inputs,
        conflicts=(),
        warnings=warning(found.unmet, full=request.full),
        prepare=partial(_plan, request, found),
        examine=partial(_examine, request, found),
    )


def run_back(request: BackRequest, reporter: Reporter, stages: Sequence[int] | None = None) -> Outcome:
    """Import the given pipeline stages of the result, or all; what an earlier run finished is kept."""
    began = time.monotonic()
    asked = range(pipeline_of(request)) if stages is None else stages
    outcome = carry_out(import_of(request, asked), asked, reporter, began)
    for tp, pp in outcome.converted:
        done = outcome.target.rank_manifest(tp, pp) or {}
        log.debug("tp %d pp %d: wrote %s; %s", tp, pp, done.get("files"), done.get("evidence") or "parameters alone")
    return outcome
