"""Carry out an import: each rank's files by the engine, then its metadata, then its manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.back.request import BackRequest
from ckpt2pt.back.survey import (
    BackPrepared,
    BackSurvey,
    held_for,
    pipeline_of,
    prepare_back,
    prove_unchanged_back,
    survey_back,
)
from ckpt2pt.checksums import crc32
from ckpt2pt.engine.write import ReadPieces, Stop, Written, write_files
from ckpt2pt.errors import ref
from ckpt2pt.folders import keep_apart
from ckpt2pt.formats.megatron import ROLES
from ckpt2pt.mapping.names import NameTable, is_split, prefix_remark
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.planning.imported import payload_bytes
from ckpt2pt.pt.archive import Archive
from ckpt2pt.pt.resume import warning
from ckpt2pt.publish import MINDSPORE, Target, make_folder, publish_bytes
from ckpt2pt.records import Json
from ckpt2pt.request import Reporter
from ckpt2pt.run import Conversion, Outcome, carry_out, check_twins
from ckpt2pt.tensors import TensorRef

if TYPE_CHECKING:
    from ckpt2pt.verification.tensors import Held

log = logging.getLogger("ckpt2pt")

META, META_OF_SOURCE = "pt_meta", "source_pt_meta"
"""Where the metadata goes below the MindSpore folder; the second where the ranks beside it are of another layout."""


def meta_folder(found: BackSurvey) -> str:
    """Where the metadata goes, which describes the checkpoint that is imported."""
    return META_OF_SOURCE if found.relaid else META


@dataclass(frozen=True, slots=True)
class _Back:
    """One rank on its way to MindSpore."""

    request: BackRequest
    found: BackSurvey
    rank: Rank
    target: Target
    prepared: BackPrepared

    @property
    def source_bytes(self) -> int:
        return payload_bytes(self.prepared.entries)

    @property
    def nbytes(self) -> int:
        written = sum(file.lay_out().nbytes for file in self.prepared.files)
        return written + sum(map(len, self.prepared.metadata.values()))

    def _prove(self, read: ReadPieces) -> None:
        prove_unchanged_back(self.request, self.found, self.rank)
        if self.request.verify != "none":
            prove_archives(read)

    @property
    def remarks(self) -> tuple[str, ...]:
        return (prefix_remark(self.prepared.prefix),) if self.prepared.prefix else ()

    @property
    def unused_rules(self) -> frozenset[str]:
        return frozenset()

    @property
    def paths(self) -> list[str]:
        return [
            *(file.name for file in self.prepared.files),
            *(f"{self.meta}/{name}" for name in self.prepared.metadata),
        ]

    @property
    def meta(self) -> str:
        """The folder of the metadata."""
        return meta_folder(self.found)

    def carry(self, stop: Stop, advance: Callable[[int], None]) -> None:
        """The files, then the metadata, then the manifest."""
        with self.target.guarded():
            self._carry(stop, advance)

    def _carry(self, stop: Stop, advance: Callable[[int], None]) -> None:
        prepared, target = self.prepared, self.target
        moves, ledger = prepared.moves(), target.ledger(self.rank, repair=self.request.overwrite)
        check_twins(prepared.copies)
        for name in (self.meta, *(str(Path(file.name).parent) for file in prepared.files)):
            make_folder(target.folder / name, target.root)
        metadata = {f"{self.meta}/{name}": content for name, content in prepared.metadata.items()}
        described: list[Json] = [
            {"path": name, "nbytes": len(content), "crc32": f"{crc32(content, 0):08x}"}
            for name, content in metadata.items()
        ]

        def examine(partials: Mapping[str, Path]) -> Mapping[str, int]:
            from ckpt2pt.verification.imported import prove_import  # noqa: PLC0415 - numpy, and only when asked for

            held = held_of(self.request, self.found, self.rank)
            return prove_import(held, self.rank, partials, NameTable(self.request.rules), heed=stop.check)

        def announce(files: Sequence[Written], _: Mapping[str, int]) -> None:
            prove_unchanged_back(self.request, self.found, self.rank)
            ledger.announce([*(file.entry(target.folder) for file in files), *described])

        files, digests = write_files(
            target.folder,
            prepared.files,
            moves,
            stop=stop,
            advance=advance,
            check=self.request.verify != "none",
            prove=self._prove,
            examine=examine if self.request.verify == "full" else None,
            announce=announce,
            fence=ledger.fence,
        )
        for name, content in metadata.items():
            publish_bytes(target.folder / name, content, fence=ledger.fence)
        target.publish_rank(
            *self.rank,
            {
                "tp": self.rank[0],
                "pp": self.rank[1],
                "source": str(self.found.origin(self.rank)),
                "verified": self.request.verify,
                "evidence": prepared.evidence,
                "files": [*(file.entry(target.folder) for file in files), *described],
                "tensors": {label: f"{crc:08x}" for label, crc in sorted(digests.items())},
            },
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


def prove_archives(read: ReadPieces) -> None:
    """Compare what was read with the checksums of the archives it came from: a byte that changed in them is not passed on.

    What lies between the pieces is read now.
    """
    for path, pieces in read.items():
        Archive.open(Path(path)).prove_read(pieces)


def _plan(request: BackRequest, found: BackSurvey, rank: Rank, target: Target) -> _Back:
    return _Back(request, found, rank, target, prepare_back(request, found, rank))


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
        meaning=request.meaning(found.layout),
        facts={},
        inputs=found.inputs,
        doubts=(),
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
