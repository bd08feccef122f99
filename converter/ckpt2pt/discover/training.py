"""A MindSpore training output as the source of a conversion.

rank_R/*  --ckpt.ranks-->  one file for each rank, or its group's shards, at one iteration
headers   --ckpt------->   {name: TensorRef}, the clock
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.names import NameTable, is_tied_head
from ckpt2pt.core.reshard import RankTensors
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.topology import Rank
from ckpt2pt.core.training_step import TrainingStep, agree, name_conflict, read_training_step
from ckpt2pt.discover.checkpoint import Discovered, Found, RankSource, prove_same, stat_of
from ckpt2pt.discover.metadata import template_of
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import InputError, MissingInputError, ref
from ckpt2pt.formats.mindspore import Header, Row, facts_of, index_file, rows_of, statement_of, states_checksum
from ckpt2pt.formats.mindspore import source as sources
from ckpt2pt.formats.mindspore.filenames import CheckpointId, shown
from ckpt2pt.formats.mindspore.ranks import SourceFile, choose, find_groups, find_sources, index_source, last_saved
from ckpt2pt.formats.mindspore.shards import has_shards
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.io.checksums import Piece
from ckpt2pt.io.inputs import InputFile

Index = Mapping[str, TensorRef]
_MAX_KEPT = 1 << 16  # tensors, about 30 MiB; those of files that are laid out alike count once


def find(request: Request, keep: Collection[Rank]) -> Found:
    """Choose the checkpoint, and make sure that all ranks are at the same step: every file is indexed to learn its step."""
    layout, first = request.source_layout, (0, 0)
    files = find_sources(request.source, layout, wanted_format=request.source_format)
    headers = Headers({ranks[rank].path for ranks in files.values() for rank in keep if rank in ranks})
    found = find_groups(
        request.source,
        layout,
        files,
        sharded=headers.has_shards,
        info=request.shard_info,
        wanted_format=request.source_format,
    )
    batch = _batch_size(request)
    if request.iteration is None:
        when = _given(request, found) or choose(found, last_saved(request.source, layout))
        training_step = _step_of(request, when, found[when][first], batch, headers)
        training_step = _with_rivals(
            training_step, when, {other: files[first] for other, files in found.items()}, batch, headers
        )
    else:
        when, training_step = _choose_iteration(found, first, batch, headers, request)
    agree({path: headers.facts(path) for file in found[when].values() for path in file.paths}, request.source)
    return Found(found[when], training_step, {} if request.source_topology else headers.kept, headers.prove_unchanged)


def read(request: Request, chosen: Discovered, rank: Rank, meta: RankMeta) -> RankSource:
    """Index one rank's file, or its group's shards; those of all ranks where the layout changes."""
    header, (tp, pp) = _header_of(chosen), rank
    if request.source_topology:
        held = sources.read_source(
            request, chosen.files, chosen.identity, rank, sizes=meta.sizes, tied=meta.tied, header=header
        )
        return RankSource(held, _statement(chosen, rank, held.others))
    entries, first = index_source(chosen.files[rank], request.topology.group(*rank), header), None
    statement = _statement(chosen, rank, entries)
    if request.files:  # which takes all of them as they are
        return RankSource(RankTensors(others=entries), statement)
    if meta.tied and pp and any(is_tied_head(name) for chunk in meta.chunks for name in chunk.names):
        first = index_source(chosen.files[tp, 0], request.topology.group(tp, 0), header)
    where, table = str(chosen.files[rank].path), NameTable(request.rules)
    return RankSource(sources.held_in(entries, table, where, full=request.full, first_stage=first), statement)


def stated(request: Request, chosen: Discovered, rank: Rank) -> Statement:
    """By the index of one rank's file, or of its group's shards: of the source's first rank where the layout changes."""
    own = (0, 0) if request.source_topology else rank
    index = index_source(chosen.files[own], request.source_layout.group(*own), _header_of(chosen))
    return _statement(chosen, rank, index)


def prove_read(
    request: Request, chosen: Discovered, rank: Rank, read: Mapping[str, Sequence[Piece]], *, every_byte: bool
) -> dict[str, int]:
    """By the CRC-32 that a file may state of itself."""
    none = frozenset(path for path, header in chosen.headers.items() if not header.checksum)
    return sources.prove_read(rank, chosen.files, request, read, every_byte=every_byte, none=none)


def _header_of(chosen: Discovered) -> Callable[[Path], Index]:
    def index(path: Path) -> Index:
        return chosen.headers[path].index if path in chosen.headers else index_file(path)

    return index


def _statement(chosen: Discovered, rank: Rank, index: Index) -> Statement:
    """What the file of a rank of the source states of optimizer and scheduler; ``index`` is its own."""
    known = chosen.files.get(rank)
    kept = chosen.headers.get(known.path) if known and not known.peers else None
    return kept.statement if kept else statement_of(index)


def _given(request: Request, found: Mapping[CheckpointId, object]) -> CheckpointId | None:
    if request.when is not None and request.when not in found:
        epoch, step = request.when
        hint = "run it again: the training may have removed it, as it keeps only its last checkpoints"
        raise MissingInputError(f"checkpoint {epoch}_{step} is gone", where=request.source, hint=hint)
    return request.when


def when_of_iteration(request: Request, files: Mapping[CheckpointId, SourceFile]) -> CheckpointId | None:
    """Which of the first rank's files is of ``request.iteration``; None while there is none, or more than one."""
    first = next(iter(request.topology.ranks()))
    batch = _batch_size(request)
    found = {when: {first: file} for when, file in files.items()}
    try:
        return _choose_iteration(found, first, batch, Headers(()), request)[0]
    except InputError:
        return None


class Headers:
    """What each file says of its step, read once; and the indexes of the files that are kept."""

    def __init__(self, keep: Collection[Path]) -> None:
        self._keep = keep
        self._facts: dict[Path, dict[str, float]] = {}
        self._stats: dict[Path, dict[str, int]] = {}
        self._sharded: set[Path] = set()
        self.kept: dict[Path, Header] = {}
        self._rows: dict[tuple[Row, ...], tuple[Row, ...]] = {}
        self._room = _MAX_KEPT

    def facts(self, path: Path) -> dict[str, float]:
        """The entries of :data:`STEP_ENTRIES` that are numbers."""
        if path not in self._facts:
            self._stats[path] = stat_of(path)
            with InputFile(path) as file:
                index = index_file(file)
                self._facts[path] = facts_of(index, file)
                if path in self._keep:
                    self._hold(path, index, file)
            if has_shards(index):
                self._sharded.add(path)
        return self._facts[path]

    def _hold(self, path: Path, index: Index, file: InputFile) -> None:
        rows = rows_of(index)
        if rows not in self._rows:
            if self._room < len(rows):
                return
            self._room -= len(rows)
        rows = self._rows.setdefault(rows, rows)
        self.kept[path] = Header(file.path, rows, statement_of(index, file), states_checksum(file))

    def prove_unchanged(self) -> None:
        """Refuse files that are not those any more whose headers were read."""
        prove_same(self._stats)

    def has_shards(self, path: Path) -> bool:
        """Whether a file holds data-parallel shards."""
        self.facts(path)
        return path in self._sharded


def _batch_size(request: Request) -> int | None:
    """Samples of an iteration; a MindSpore result needs no metadata that would tell them."""
    if request.files and request.metadata is None:
        return None
    return template_of(request, (0, 0)).global_batch_size


def _step_of(
    request: Request, when: CheckpointId, file: SourceFile, batch: int | None, headers: Headers
) -> TrainingStep:
    """The time of the chosen file; a MindSpore result says what its source says, which need not be its iteration."""
    try:
        return _training_step(file, batch, headers)
    except InputError:
        if request.files is None:
            raise
        return TrainingStep(iteration=max(when[1], 0), samples=None, iteration_source="the name of the file")


def _training_step(file: SourceFile, batch: int | None, headers: Headers) -> TrainingStep:
    facts = headers.facts(file.path)
    return read_training_step(facts, global_batch_size=batch, named=file.named, where=str(file.path))


def _with_rivals(
    training_step: TrainingStep,
    when: CheckpointId,
    files: Mapping[CheckpointId, SourceFile],
    batch: int | None,
    headers: Headers,
) -> TrainingStep:
    """Where the chosen file contradicts its name: name the others that claim its iteration too."""
    if not name_conflict(files[when].named, headers.facts(files[when].path)):
        return training_step
    rivals: list[str] = []
    for other, file in files.items():
        with suppress(InputError):
            if other != when and _training_step(file, batch, headers).iteration == training_step.iteration:
                rivals.append(file.path.name)
    conflict = f"{', '.join(rivals)} hold the same iteration: {files[when].path.name} was taken for its name"
    return replace(training_step, conflicts=(*training_step.conflicts, conflict)) if rivals else training_step


def _choose_iteration(
    found: Mapping[CheckpointId, Mapping[Rank, SourceFile]],
    first: Rank,
    batch: int | None,
    headers: Headers,
    request: Request,
) -> tuple[CheckpointId, TrainingStep]:
    """The checkpoint of ``--iteration``; a single one that does not tell its time is taken at the user's word."""
    wanted = request.iteration or 0
    training_steps: dict[CheckpointId, TrainingStep] = {}
    for when, files in found.items():
        try:
            training_steps[when] = _training_step(files[first], batch, headers)
        except InputError:
            if len(found) > 1:
                raise
            samples = wanted * batch if batch else None
            return when, TrainingStep(iteration=wanted, samples=samples, iteration_source="the iteration asked for")
    matching = [when for when, training_step in training_steps.items() if training_step.iteration == wanted]
    if len(matching) != 1:
        there = ", ".join(
            f"{training_steps[when].iteration} ({shown(when)})"
            if name_conflict(files[first].named, headers.facts(files[first].path))
            else str(training_steps[when].iteration)
            for when, files in found.items()
        )
        several = (
            f"{len(matching)} checkpoints are of iteration {wanted}"
            if matching
            else f"no checkpoint is of iteration {wanted}"
        )
        raise InputError(
            f"{several}; by what the files hold they are of iterations {there}",
            where=request.source,
            hint=f"set {ref('source.iteration')} to one of them"
            + (", or move the files of all but one of the same iteration away" if matching else ""),
        )
    return matching[0], training_steps[matching[0]]
