"""Find everything a conversion needs and prove that it fits together: headers only, nothing is written.

source/rank_R/*  --ckpt.ranks-->  one file for each rank, or its group's shards, at one iteration
pt_meta/*        --meta------->   template, buffers                          } -> RankPlan for each rank
file headers     --ckpt------->   {name: TensorRef}, the clock
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt2pt.ckpt import Header, facts_of, index_file, statement_of, states_checksum
from ckpt2pt.ckpt.filenames import When, shown
from ckpt2pt.ckpt.ranks import SourceFile, choose, find_groups, find_sources, index_source, last_saved
from ckpt2pt.ckpt.shards import has_shards
from ckpt2pt.ckpt.source import files_for, read_source
from ckpt2pt.errors import InputError, MissingInputError, TryAgainError, aside, ref
from ckpt2pt.folders import keep_apart
from ckpt2pt.inputs import InputFile, sha256
from ckpt2pt.mapping.names import NameTable, is_tied_head, prefix_remark
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.meta import (
    METADATA,
    RankMeta,
    answering,
    check,
    metadata_files,
    read_arguments,
    read_rank_meta,
    read_stated,
    require,
)
from ckpt2pt.plan.clock import Clock, name_contradiction, read_clock
from ckpt2pt.plan.stage import RankInput, RankPlan, check_layers, plan_rank
from ckpt2pt.plan.stated import Statement
from ckpt2pt.pt.payload import FilePayload, payloads
from ckpt2pt.publish import Target
from ckpt2pt.records import Json
from ckpt2pt.request import Request, digest
from ckpt2pt.system.access import access_error
from ckpt2pt.tensors import TensorRef

Index = Mapping[str, TensorRef]
_INFO = ref("source.optShardInfoPath")
Inputs = list[dict[str, object]]
_MAX_KEPT = 1 << 14  # tensors, about 8 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The chosen checkpoint: a file for each rank, the time they agree on, and the identity of the conversion.

    ``purpose`` is the digest of what is asked for, ``ranks`` adds what each rank is read from, ``identity`` all of it;
    ``base`` that of the source and of the options, but for whether the optimizer is converted too; ``inputs`` are the
    files that each rank is read from.
    """

    files: Mapping[Rank, SourceFile]
    clock: Clock
    identity: str
    purpose: str
    base: str
    ranks: Mapping[Rank, str]
    inputs: Mapping[Rank, Inputs]
    headers: Mapping[Path, Header] = field(default_factory=dict[Path, "Header"])
    """What :func:`survey` was asked to keep, so that :func:`prepare` need not read those files again."""

    def index(self, path: Path) -> Index:
        """The index of one file."""
        return self.headers[path].index if path in self.headers else index_file(path)

    @property
    def without_checksum(self) -> frozenset[Path]:
        """Files that are known to state no CRC-32 of themselves."""
        return frozenset(path for path, header in self.headers.items() if not header.checksum)

    def statement(self, rank: Rank, index: Index) -> Statement:
        """What the file of a rank of the source states of optimizer and scheduler; ``index`` is its own."""
        kept = self.headers.get(self.files[rank].path) if rank in self.files and not self.files[rank].peers else None
        return kept.statement if kept else statement_of(index)

    def read_for(self, rank: Rank, request: Request) -> tuple[SourceFile, ...]:
        """The files that a rank of the result is read from."""
        return files_for(rank, self.files, request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One rank, ready to run."""

    plan: RankPlan
    meta: RankMeta
    files: tuple[FilePayload, ...]
    remarks: tuple[str, ...]
    """What a user should know before the result is used, in whole sentences."""

    @property
    def sizes(self) -> dict[str, int]:
        """Exact size of each file."""
        return {file.name: file.lay_out().nbytes for file in self.files}


@contextmanager
def only_growing() -> Generator[None]:
    """Do not look for cycles: an index and a plan only grow and hold none, and looking again and again takes a fifth longer."""
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looks:
            gc.enable()


@only_growing()
def survey(request: Request, keep: Collection[Rank] = ()) -> Survey:
    """Choose the checkpoint, and make sure that all ranks are at the same step.

    Every file is indexed to learn its step; the headers of ``keep`` stay in the result, as far as memory allows.
    """
    require(request.metadata, source=request.source, target=request.target)
    stated = read_stated(request.metadata, allow=request.rules.pickle_globals)
    first = next(iter(request.topology.ranks()))
    if stated:
        check(request.topology, stated)
        with answering(request.metadata, request.rules.pickle_globals):
            check_layers(meta_of(request, first).chunks, request.topology, pp=0, where=str(request.metadata))
    layout = request.source_layout
    files = find_sources(request.source, layout, wanted_format=request.source_format)
    headers = _Headers({ranks[rank].path for ranks in files.values() for rank in keep if rank in ranks})
    found = find_groups(
        request.source,
        layout,
        files,
        sharded=headers.has_shards,
        info=request.shard_info,
        wanted_format=request.source_format,
    )
    batch = read_arguments(request.metadata, first, allow=request.rules.pickle_globals).global_batch_size
    if request.iteration is None:
        when = _given(request, found) or choose(found, last_saved(request.source, layout))
        clock = _clock(found[when][first], batch, headers)
        clock = _with_rivals(clock, when, {other: files[first] for other, files in found.items()}, batch, headers)
    else:
        when, clock = _choose_iteration(found, first, batch, headers, request)
    agree({path: headers.facts(path) for file in found[when].values() for path in file.paths}, request.source)
    inputs = _inputs(request.topology.ranks(), found[when], request)
    headers.prove_unchanged()
    every = distinct(inputs.values())
    purpose = digest({"options": request.meaning(), "iteration": clock.iteration})
    chosen = Survey(
        files=found[when],
        clock=clock,
        identity=digest([purpose, every]),
        purpose=purpose,
        base=_base(request, clock.iteration, every),
        ranks={rank: _identity(purpose, inputs[rank], inputs[rank[0], 0]) for rank in inputs},
        inputs=inputs,
        headers={} if request.source_topology else headers.kept,
    )
    keep_apart(
        target_of(request, chosen),
        {
            request.shard_info: _INFO,
            request.metadata: METADATA,
            request.source: ref("source.path"),
        },
    )
    return chosen


def _base(request: Request, iteration: int, inputs: Sequence[Mapping[str, object]]) -> str:
    """The metadata is left out: for parameters alone it needs no maps, which may be added for the full conversion."""
    sources = [one for one in inputs if "metadata" not in one]
    return digest([{**request.meaning(), "mode": None}, iteration, sources])


def _identity(purpose: str, inputs: Inputs, first: Inputs) -> str:
    """Of a rank: what is asked for, what it is read from, and what the first stage is read from."""
    return digest([purpose, [*inputs, *first]])


def prove_unchanged(request: Request, chosen: Survey, rank: Rank) -> None:
    """Refuse a rank whose files are not those that were surveyed: what was read may be of two checkpoints."""
    first = rank[0], 0
    inputs = _inputs((rank, first), chosen.files, request)
    now = _identity(chosen.purpose, inputs[rank], inputs[first])
    if now != chosen.ranks[rank]:
        raise changed(chosen.read_for(rank, request)[0].path)


def changed(path: Path) -> TryAgainError:
    """The error for a source that was written while it was read."""
    return TryAgainError(
        "the source was written while it was read",
        where=path,
        hint="let whatever writes it end, keep the checkpoint from being replaced, and run the same command again",
    )


def target_of(request: Request, chosen: Survey) -> Target:
    """The folder that the chosen checkpoint goes into."""
    return Target(
        root=request.target,
        iteration=chosen.clock.iteration,
        identity=chosen.identity,
        purpose=chosen.purpose,
        ranks=chosen.ranks,
        base=chosen.base,
        full=request.full,
        stages=request.topology.pipeline,
        tensor=request.topology.tensor,
    )


def _given(request: Request, found: Mapping[When, object]) -> When | None:
    if request.when is not None and request.when not in found:
        epoch, step = request.when
        hint = "run it again: the training may have removed it, as it keeps only its last checkpoints"
        raise MissingInputError(f"checkpoint {epoch}_{step} is gone", where=request.source, hint=hint)
    return request.when


def when_of_iteration(request: Request, files: Mapping[When, SourceFile]) -> When | None:
    """Which of the first rank's files is of ``request.iteration``; None while there is none, or more than one."""
    first = next(iter(request.topology.ranks()))
    batch = read_arguments(request.metadata, first, allow=request.rules.pickle_globals).global_batch_size
    found = {when: {first: file} for when, file in files.items()}
    try:
        return _choose_iteration(found, first, batch, _Headers(()), request)[0]
    except InputError:
        return None


@only_growing()
def prepare(request: Request, chosen: Survey, rank: Rank) -> Prepared:
    """Index one rank's file, or its group's shards, and plan every copy."""
    with answering(request.metadata, request.rules.pickle_globals):
        return _prepare(request, chosen, rank)


def _prepare(request: Request, chosen: Survey, rank: Rank) -> Prepared:
    topology = request.topology
    tp, pp = rank
    meta = meta_of(request, rank)
    source = read_source(
        request, chosen.files, chosen.identity, rank, sizes=meta.sizes, tied=meta.tied, header=chosen.index
    )
    tied_head = meta.tied and topology.pipeline > 1 and any(is_tied_head(n) for c in meta.chunks for n in c.names)
    found = RankInput(
        tp=tp,
        pp=pp,
        source=str(request.source if request.source_topology else chosen.files[rank].path),
        metadata=str(request.metadata),
        index=source.entries,
        stated=chosen.statement(rank, source.entries),
        clock=chosen.clock,
        chunks=meta.chunks,
        sizes=meta.sizes,
        params_dtype=meta.params_dtype,
        tied=meta.tied,
        copies=source.copies,
        first_stage=index_source(chosen.files[tp, 0], topology.group(tp, 0), chosen.index)
        if tied_head and pp and not request.source_topology
        else None,
    )
    plan = plan_rank(found, topology, NameTable(request.rules), full=request.full)
    files = payloads(plan, meta.template, reference_samples=request.reference_samples)
    remarks = (*source.remarks, *([prefix_remark(plan.prefix)] if plan.prefix else ()))
    return Prepared(plan=plan, meta=meta, files=files, remarks=remarks)


def index_of(request: Request, chosen: Survey, rank: Rank) -> Index:
    """The index of one rank's file, or of its group's shards: of the source's first rank where the layout changes."""
    own = (0, 0) if request.source_topology else rank
    return index_source(chosen.files[own], request.source_layout.group(*own), chosen.index)


def prepare_all(request: Request, chosen: Survey, stages: Iterable[int]) -> Iterator[tuple[Rank, Prepared]]:
    """Every rank of the given stages, one at a time: the plans of a thousand would not fit into memory."""
    for rank in ((tp, pp) for pp in stages for tp in range(request.topology.tensor)):
        yield rank, prepare(request, chosen, rank)


def meta_of(request: Request, rank: Rank) -> RankMeta:
    """What ``pt_meta`` says of a rank."""
    return read_rank_meta(
        request.metadata,
        request.topology,
        tp=rank[0],
        pp=rank[1],
        target_data=request.target_data,
        allow=request.rules.pickle_globals,
    )


class _Headers:
    """What each file says of its step, read once; and the indexes of the files that are kept."""

    def __init__(self, keep: Collection[Path]) -> None:
        self._keep = keep
        self._facts: dict[Path, dict[str, float]] = {}
        self._stats: dict[Path, dict[str, int]] = {}
        self._sharded: set[Path] = set()
        self.kept: dict[Path, Header] = {}
        self._room = _MAX_KEPT

    def facts(self, path: Path) -> dict[str, float]:
        """The entries of :data:`CLOCK_ENTRIES` that are numbers."""
        if path not in self._facts:
            self._stats[path] = _stat(path)
            with InputFile(path) as file:
                index = index_file(file)
                self._facts[path] = facts_of(index, file)
                if path in self._keep and self._room >= len(index):
                    self._room -= len(index)
                    self.kept[path] = Header(index, statement_of(index, file), states_checksum(file))
            if has_shards(index):
                self._sharded.add(path)
        return self._facts[path]

    def prove_unchanged(self) -> None:
        """Refuse files that are not those any more whose headers were read."""
        for path, seen in self._stats.items():
            if _stat(path) != seen:
                raise changed(path)

    def has_shards(self, path: Path) -> bool:
        """Whether a file holds data-parallel shards."""
        self.facts(path)
        return path in self._sharded


def _clock(file: SourceFile, batch: int | None, headers: _Headers) -> Clock:
    facts = headers.facts(file.path)
    return read_clock(facts, global_batch_size=batch, named=file.named, where=str(file.path))


def _with_rivals(
    clock: Clock, when: When, files: Mapping[When, SourceFile], batch: int | None, headers: _Headers
) -> Clock:
    """Where the chosen file contradicts its name: name the others that claim its iteration too."""
    if not name_contradiction(files[when].named, headers.facts(files[when].path)):
        return clock
    rivals: list[str] = []
    for other, file in files.items():
        with suppress(InputError):
            if other != when and _clock(file, batch, headers).iteration == clock.iteration:
                rivals.append(file.path.name)
    doubt = f"{', '.join(rivals)} hold the same iteration: {files[when].path.name} was taken for its name"
    return replace(clock, doubts=(*clock.doubts, doubt)) if rivals else clock


def _choose_iteration(
    found: Mapping[When, Mapping[Rank, SourceFile]],
    first: Rank,
    batch: int | None,
    headers: _Headers,
    request: Request,
) -> tuple[When, Clock]:
    """The checkpoint of ``--iteration``; a single one that does not tell its time is taken at the user's word."""
    wanted = request.iteration or 0
    clocks: dict[When, Clock] = {}
    for when, files in found.items():
        try:
            clocks[when] = _clock(files[first], batch, headers)
        except InputError:
            if len(found) > 1:
                raise
            samples = wanted * batch if batch else None
            return when, Clock(iteration=wanted, samples=samples, because="the iteration asked for")
    matching = [when for when, clock in clocks.items() if clock.iteration == wanted]
    if len(matching) != 1:
        there = ", ".join(
            f"{clocks[when].iteration} ({shown(when)})"
            if name_contradiction(files[first].named, headers.facts(files[first].path))
            else str(clocks[when].iteration)
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
    return matching[0], clocks[matching[0]]


def agree(facts: Mapping[Path, Mapping[str, float]], root: Path) -> None:
    """Refuse ranks that saved at different steps: the names may agree where the contents do not."""
    seen: dict[tuple[tuple[str, float], ...], Path] = {}
    for path, told in facts.items():
        seen.setdefault(tuple(sorted(told.items())), path)
    if len(seen) > 1:
        (one, path), (other, rival) = list(seen.items())[:2]
        differing = sorted(dict(set(one) ^ set(other)))
        raise InputError(
            "ranks are at different steps: "
            + "; ".join(f"{name} is {dict(one).get(name)} and {dict(other).get(name)}" for name in differing),
            where=f"{path} and {rival}",
            hint=f"choose a checkpoint that every rank has finished{aside('source.iteration')}, "
            f"or remove the files of the broken save from {root}",
        )


def _inputs(ranks: Iterable[Rank], files: Mapping[Rank, SourceFile], request: Request) -> dict[Rank, Inputs]:
    """What each rank is read from: sources by name, size and time, the small metadata files by content.

    The time matters: a retrained checkpoint has the same header and size.  A rank of the last stage may read a tied
    embedding of the first, so that is counted with every rank.  Where the layout changes, ranks share all sources.
    """
    sources: dict[Path, Inputs] = {}
    found: dict[Rank, Inputs] = {}
    for rank in ranks:
        needed = files_for(rank, files, request)
        sources |= {file.path: inputs_of(file, request.source) for file in needed if file.path not in sources}
        described = metadata_files(request.metadata, tp=rank[0], pp=rank[1])
        metadata: Inputs = [{"metadata": path.name, "sha256": sha256(path, METADATA)} for path in sorted(described)]
        found[rank] = [*(one for file in needed for one in sources[file.path]), *metadata]
    return found


def distinct(inputs: Iterable[Sequence[Json]]) -> tuple[Json, ...]:
    """Each input of several ranks once."""
    return tuple({id(one): one for listed in inputs for one in listed}.values())


def inputs_of(file: SourceFile, root: Path) -> Inputs:
    """The files that one rank is read from, those below ``root`` by name, size and time."""
    found: Inputs = [{"source": str(path.relative_to(root)), **_stat(path)} for path in file.paths]
    if file.info:
        found.append({"shards": file.info.name, "ranks": len(file.peers), "sha256": sha256(file.info, _INFO)})
    return found


def _stat(path: Path) -> dict[str, int]:
    try:
        seen = path.stat()
    except OSError as error:
        raise access_error(error, path, "examining", reading=True) from error
    return {"nbytes": seen.st_size, "mtime_ns": seen.st_mtime_ns}
