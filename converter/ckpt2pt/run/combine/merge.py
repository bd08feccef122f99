"""Carry out a merge: survey, preflight, then one group after the other through the engine.

opt_shard_info/*   -> groups of ranks -> the newest step that all ranks have -> entries of each merged file
preflight             every header, every size, free space; nothing has been written
write                 a group's files appear together by rename, and its manifest after them
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from ckpt2pt import __version__
from ckpt2pt.core.extents import DTYPE_BYTES, TensorRef
from ckpt2pt.core.foldernames import model_rank_of
from ckpt2pt.core.moves import Move
from ckpt2pt.core.names import MOMENTS, is_split
from ckpt2pt.core.progress import Reporter
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.core.training_step import agree, name_conflict
from ckpt2pt.discover import changed, inputs_of
from ckpt2pt.discover.request import Pace, digest
from ckpt2pt.engine.write import ReadPieces, Stop, Written, write_files
from ckpt2pt.errors import InputError, MissingInputError, UsageError, ref
from ckpt2pt.formats.mindspore import facts_of, index_file, prove_sources, read_scalar
from ckpt2pt.formats.mindspore.entries import Entry, text_entry
from ckpt2pt.formats.mindspore.filenames import UNNAMED, CheckpointId
from ckpt2pt.formats.mindspore.ranks import (
    SourceFile,
    choose,
    find_groups,
    find_sources,
    index_source,
    last_saved,
    names_of,
    surplus,
)
from ckpt2pt.formats.mindspore.shards import check_covered, has_shards, read_info
from ckpt2pt.formats.mindspore.writer import MindSporeFile, mindspore_file
from ckpt2pt.io.paths import is_there, status
from ckpt2pt.io.records import Json, seal
from ckpt2pt.io.volume import check_volume
from ckpt2pt.publish import STATE, Ledger, host, locked, make_folder, publish_bytes, read_record, sweep_partials
from ckpt2pt.run.combine.described import described_topology, descriptions
from ckpt2pt.run.combine.outcome import Combined
from ckpt2pt.run.pool import stopped_by_signals, work_through
from ckpt2pt.verification.copies import copied_ranks, remark

log = logging.getLogger("ckpt2pt")

_MOMENTS = (*(f"{moment}." for moment in MOMENTS), "max_exp_avg_sq.", "moments.")
# What the reference leaves out with the moments, but by whole names: it looks for "step" and "epoch" anywhere in them.
_PROGRESS = re.compile(
    r"(?:learning_rate|weight_decay)(?:_group_\d+)?|epoch_num|step_num|num_steps|state_step|global_step|default_generator"
    r"|(?:lr_warmup|lr_decay|wd_incr)_steps|(?:current|last_overflow)_iterator_step"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """All options of ``ckpt2pt combine``; ``section`` is half open, as the reference's; ``check`` reads files back."""

    strategy: Path
    source: Path
    output: Path
    source_format: str = "ckpt"
    target_format: str = "ckpt"
    copies: bool = False
    section: tuple[int, int] | None = None
    optimizer: bool = True
    crc: bool = False
    overwrite: bool = False
    check: bool = True
    workers: int = 1
    in_process: bool = False

    def identity_options(self) -> Json:
        """The options that decide what is written."""
        return {
            "format": self.target_format,
            "copies": self.copies,
            "optimizer": self.optimizer,
            "crc": self.crc,
        }


@dataclass(frozen=True, slots=True)
class Merge:
    """A combination and the groups chosen for it; worker processes get a copy."""

    asked: Combination
    topology: Topology
    files: Mapping[Rank, SourceFile]

    @property
    def pace(self) -> Pace:
        """Workers as asked for."""
        return Pace(workers=self.asked.workers, in_process=self.asked.in_process)

    def manifest(self, rank: Rank) -> Path:
        """Where the record of a merged group is."""
        name = f"rank_{self.topology.source_rank(*rank)}-{_step(self.files[rank])}.json"
        return self.asked.output / STATE / "combined" / name

    def plan(self, rank: Rank, /) -> Group:
        """Index a group and lay its files out: the name of its first rank's, or of each of them."""
        asked, file = self.asked, self.files[rank]
        inputs = tuple(inputs_of(file, asked.source))  # before the files are read, and again behind
        if file.info:
            check_covered(read_info(file.info))
        entries = merged_entries(index_source(file, self.topology.group(*rank)), optimizer=asked.optimizer)
        paths = file.peers if asked.copies else file.peers[:1]
        suffix = asked.target_format
        names = [f"{path.parent.relative_to(asked.source)}/{path.stem}_dp_merged.{suffix}" for path in paths]
        return Group(
            asked=asked,
            manifest=self.manifest(rank),
            source=file,
            inputs=inputs,
            files=tuple(mindspore_file(suffix, name, entries, crc=asked.crc) for name in names),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The ranks of one (tp, pp), ready to be merged into ``files``, which hold the same."""

    asked: Combination
    manifest: Path
    source: SourceFile
    inputs: tuple[Json, ...]
    files: tuple[MindSporeFile, ...]

    @property
    def identity(self) -> str:
        """What the result depends on."""
        return digest({"options": self.asked.identity_options(), "inputs": self.inputs})

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return sum(entry.source.nbytes for entry in self.files[0].entries if isinstance(entry.source, TensorRef))

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(file.lay_out().nbytes for file in self.files)

    @property
    def paths(self) -> list[str]:
        """Files to write, from the output folder on."""
        return [file.name for file in self.files]

    @property
    def is_done(self) -> bool:
        """True when this very merge is there; raises for files that are there and are another's, or nobody's."""
        manifest = read_record(self.manifest) or {}
        found = {name: status(self.asked.output / name, ref("target.path"), follow=False) for name in self.paths}
        sizes = [seen.st_size if seen else None for seen in found.values()]
        ours = manifest.get("identity") == self.identity and "files" in manifest
        if ours and sizes == [file.lay_out().nbytes for file in self.files]:
            return True
        ledger = self._ledger()
        ledger.refuse(found)
        owner = manifest or read_record(ledger.claim) or {}
        if any(found.values()) and owner.get("identity") != self.identity and not self.asked.overwrite:
            raise UsageError(
                "a merged file is there that this command did not make: other options, another source, or a source that "
                "changed since",
                where=next(self.asked.output / name for name, seen in found.items() if seen),
                hint=f"choose another {ref('target.path')}, or replace it with {ref('target.overwrite')}",
            )
        return False

    def end_writing(self) -> None:
        """Remove what a run that was killed at its very end left behind."""
        ledger = self._ledger()
        if is_there(ledger.writing):
            with locked(self._lock, "merging this group"):
                if self.is_done:
                    ledger.end_writing()

    @property
    def _lock(self) -> Path:
        return self.manifest.with_suffix(".lock")

    def _check_unchanged(self) -> None:
        if tuple(inputs_of(self.source, self.asked.source)) != self.inputs:
            raise changed(self.source.path)

    def _ledger(self) -> Ledger:
        mine = (read_record(self.manifest) or {}).get("identity") == self.identity
        hint = f"choose another {ref('target.path')}, or move it away: it is never replaced"
        repair = mine and self.asked.overwrite
        return Ledger.of_group(self.asked.output, self.manifest, self.identity, hint=hint, repair=repair)

    def run(self, stop: Stop, advance: Callable[[int], None]) -> None:
        """Say whose files they will be, write them, then complete the manifest."""
        output, ledger = self.asked.output, self._ledger()
        paths = [output / name for name in self.paths]
        for folder in {self.manifest.parent, *(path.parent for path in paths)}:
            make_folder(folder, output)
        identity_options, inputs = self.asked.identity_options(), list(self.inputs)
        facts: Json = {"identity": self.identity, "version": __version__, "options": identity_options, "inputs": inputs}

        def announce(files: Sequence[Written], _: Mapping[str, int]) -> None:
            self._check_unchanged()
            ledger.announce([file.entry(output) for file in files])

        with locked(self._lock, "merging this group", heed=stop.check):
            publish_bytes(ledger.claim, seal({"identity": self.identity, "host": host()}))
            sweep_partials(self.manifest.parent, f"{self.manifest.stem}.*")
            for path in paths:
                sweep_partials(path.parent, path.name)
            checksums: dict[str, int] = {}

            def prove(read: ReadPieces) -> None:
                self._check_unchanged()  # first: a source that was written meanwhile is not a damaged one
                checksums.update(prove_sources(self.source.paths, read, every_byte=self.asked.optimizer))

            written, digests = write_files(
                output, self.files, merged_moves(self.files), stop=stop, advance=advance, check=self.asked.check,
                prove=prove, announce=announce, fence=ledger.fence,
            )  # fmt: skip
            facts["sourceChecksums"] = checksums
            facts["files"] = [file.entry(output) for file in written]
            facts["tensors"] = {label.partition(":")[2]: f"{crc:08x}" for label, crc in sorted(digests.items())}
            ledger.publish(facts)


def _step(file: SourceFile) -> str:
    return f"{file.when[0]}_{file.when[1]}"


def combine(asked: Combination, reporter: Reporter) -> Combined:
    """Merge the newest step that all ranks have; what an earlier run finished is kept."""
    began = time.monotonic()
    merge = choose_groups(asked)
    chosen = [rank for rank in merge.files if _in_section(merge.topology.source_rank(*rank), asked.section)]
    if not chosen:
        raise UsageError(
            f"{ref('section')} {asked.section} holds the first rank of no group",
            where=asked.strategy,
            hint=f"first ranks are {sorted(merge.topology.source_rank(*rank) for rank in merge.files)}",
        )
    todo: dict[Rank, int] = {}
    needed = 0
    for rank in chosen:
        # One at a time: the plans of many ranks would not fit into the memory of one.
        group = merge.plan(rank)
        if group.is_done:
            group.end_writing()
        else:
            todo[rank] = group.source_bytes
            needed += group.nbytes
    check_volume(asked.output, needed, ref("target.path"), " (convert needs no merged copy at all)")
    when = next(iter(merge.files.values())).when
    with stopped_by_signals() as stop:
        reporter.begin(todo, max(when[1], 0))
        try:
            work_through(merge, list(todo), None, reporter, stop)
        finally:
            reporter.close()
    checksums = Counter[str]()
    for rank in chosen:
        checksums.update(cast("dict[str, int]", (read_record(merge.manifest(rank)) or {}).get("sourceChecksums", {})))
    for remarked in _copies(merge, chosen):
        log.warning("%s", remarked)
    return Combined(
        output=str(asked.output),
        when=when,
        ranks=merge.topology.data,
        written=len(todo),
        kept=len(chosen) - len(todo),
        bytes_written=needed,
        seconds=time.monotonic() - began,
        source_checksums=checksums,
    )


def _copies(merge: Merge, chosen: list[Rank]) -> list[str]:
    """Groups of one stage that were merged to the same bits."""
    digests: dict[Rank, Json] = {}
    for rank in chosen if merge.topology.tensor > 1 else ():
        tensors = cast("Json", (read_record(merge.manifest(rank)) or {}).get("tensors", {}))
        digests[rank] = {name: crc for name, crc in tensors.items() if not name.startswith(_MOMENTS)}

    def weights(rank: Rank) -> list[TensorRef]:
        index = index_source(merge.files[rank], merge.topology.group(*rank))
        return [tensor_ref for name, tensor_ref in index.items() if is_split(name) and not name.startswith(_MOMENTS)]

    found = copied_ranks(digests, weights)
    return [remark(group, lambda rank: merge.files[rank].path) for group in found]


def _in_section(rank: int, section: tuple[int, int] | None) -> bool:
    return section is None or section[0] <= rank < section[1]


def choose_groups(asked: Combination) -> Merge:
    """The groups that the descriptions tell of, at the newest step that all their ranks have."""
    infos = descriptions(asked.strategy)
    if any(map(model_rank_of, infos)):  # whose degrees do not tell what is missing
        _check_described(asked, None, set())
    topology = described_topology(asked.strategy)
    found = find_sources(asked.source, topology, wanted_format=asked.source_format, merged=False)
    found = find_groups(
        asked.source,
        topology,
        found,
        sharded=lambda path: has_shards(index_file(path)),
        info=asked.strategy,
        wanted_format=asked.source_format,
    )
    when = choose(found, last_saved(asked.source, topology))
    files = found[when]
    if not all(file.info for file in files.values()):
        raise InputError(
            "the files hold named parameters and no shards: there is nothing to merge",
            where=next(iter(files.values())).path,
            hint="convert them as they are (ckpt2pt convert)",
        )
    _check_described(asked, when, names_of(topology))
    facts = {path: facts_of(index_file(path)) for file in files.values() for path in file.paths}
    agree(facts, asked.source)
    path, told = next(iter(facts.items()))
    misnamed = name_conflict(None if when == UNNAMED else when, told)
    if misnamed:
        log.warning("%s is %s: the merged file keeps the name, and convert goes by what the file holds", path, misnamed)
    return Merge(asked, topology, files)


def _check_described(asked: Combination, when: CheckpointId | None, described: set[str]) -> None:
    """Refuse folders of shards that nothing describes: part of the model would be left out."""
    found = surplus(asked.source, when, described.union(descriptions(asked.strategy)))
    if found:
        raise MissingInputError(
            f"{len(found)} folders of {ref('source.path')} hold shards that nothing describes: {', '.join(found[:8])}",
            where=asked.strategy,
            hint="copy the whole opt_shard_info folder of the training, or move what another run has left away",
        )


def merged_entries(index: Mapping[str, TensorRef], *, optimizer: bool) -> list[Entry]:
    """The entries of a merged file in the order of the index, with or without the optimizer's moments and progress."""
    entries: list[Entry] = []
    for name, tensor_ref in index.items():
        if not optimizer and (name.startswith(_MOMENTS) or _PROGRESS.fullmatch(name)):
            continue
        if tensor_ref.dtype == "str":
            entries.append(text_entry(name, str(read_scalar(tensor_ref))))
        elif tensor_ref.dtype in DTYPE_BYTES and tensor_ref.dtype != "complex64":
            entries.append(Entry(name=name, dtype=tensor_ref.dtype, shape=tensor_ref.shape, source=tensor_ref))
        else:
            raise InputError(
                f"{tensor_ref} is of a type that mindspore does not load",
                where=tensor_ref.extents[0].path if tensor_ref.extents else name,
                hint="convert the shards directly (ckpt2pt convert), which leaves such entries out",
            )
    return entries


def merged_moves(files: tuple[MindSporeFile, ...]) -> tuple[Move, ...]:
    """Moves that read once and write to every copy."""
    first, *copies = files
    return tuple(
        replace(
            move,
            sinks=(*move.sinks, *(replace(sink, file=copy.name) for copy in copies for sink in move.sinks)),
        )
        for move in first.moves()
    )
