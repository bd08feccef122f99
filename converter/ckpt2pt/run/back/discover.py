"""Find a Megatron checkpoint, prove its buffers and plan every copy: headers only, nothing is written.

mp_rank_*/*.pt --pt.megatron--> headers --ptmeta.capture--> proved buffers --planning.imported--> entries --> files
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.foldernames import parallel_sizes, rank_name
from ckpt2pt.core.index import Collector, Index
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE, Move
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.discover import changed
from ckpt2pt.discover.request import digest
from ckpt2pt.errors import FormatError, MissingInputError, TopologyError, aside, ref
from ckpt2pt.formats.megatron.headers import MegatronRank, rank_folders, read_rank
from ckpt2pt.formats.megatron.read import collect_rank, source_folder
from ckpt2pt.formats.megatron.resume import Unmet
from ckpt2pt.formats.mindspore.entries import Entry
from ckpt2pt.formats.mindspore.imported import ImportedChunk, missing_layers, scalar_entries, tensor_entries
from ckpt2pt.formats.mindspore.source import kept
from ckpt2pt.formats.mindspore.writer import MindSporeFile, mindspore_file
from ckpt2pt.formats.ptmeta.capture import (
    SAMPLE_NUMEL,
    Layout,
    lay_out_rank,
    prove_copies,
    prove_given,
    rank_files,
    unmet_of_rank,
)
from ckpt2pt.formats.ptmeta.files import render
from ckpt2pt.formats.ptmeta.metadata import data_parallel_size, param_map_files, read_param_maps
from ckpt2pt.io.access import access_error
from ckpt2pt.io.inputs import sha256
from ckpt2pt.io.paths import is_file
from ckpt2pt.io.records import Json
from ckpt2pt.run.back.relayout import Twins, groups_in_order, relaid
from ckpt2pt.run.back.request import BackRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class BackSurvey:
    """The checkpoint that was found: a folder and the files to be read for each rank, its cut with the no-op layers, its iteration.

    ``inputs`` are those of each rank of the result.
    ``unmet`` is what keeps Megatron-LM from resuming with the metadata of each rank.
    """

    folder: Path
    ranks: Mapping[Rank, Path]
    topology: Topology
    layout: Topology
    """The layout of the result."""
    iteration: int
    samples: int | None
    """What the training had consumed, where its arguments state it."""
    identity: str
    inputs: Mapping[Rank, Sequence[Json]]
    unmet: Mapping[Rank, tuple[Unmet, ...]]

    @property
    def relaid(self) -> bool:
        """Whether the result has another layout than the checkpoint."""
        return self.layout != self.topology

    def origin(self, rank: Rank) -> Path:
        """The folder that a rank of the result is read from."""
        return self.folder if self.relaid else self.ranks[rank]


@dataclass(frozen=True, slots=True, kw_only=True)
class BackPrepared:
    """One rank, ready to run: what goes into each of its files, and its metadata."""

    files: tuple[MindSporeFile, ...]
    entries: tuple[Entry, ...]
    metadata: Mapping[str, bytes]
    evidence: str
    prefix: str
    """What all names of parameters carried."""
    copies: Twins = ()
    """What other ranks hold of the same, where the layout changes."""

    def moves(self) -> tuple[Move, ...]:
        """Every element read once and written to each copy."""
        first, *others = (file.moves() for file in self.files)
        return tuple(
            replace(move, sinks=tuple(sink for one in (move, *same) for sink in one.sinks))
            for move, *same in zip(first, *others, strict=True)
        )


def survey_back(request: BackRequest) -> BackSurvey:
    """Find the ranks, learn the cut from the arguments and the layers from the names, and check that all ranks agree."""
    iteration_path = source_folder(request.source, request.iteration)
    folders = rank_folders(iteration_path)
    inputs = {rank: _inputs(request, folder, rank) for rank, folder in folders.items()}
    first = read_rank(folders[0, 0], optimizer=False, allow=request.rules.pickle_globals)
    cut = _topology(request, first, folders)
    empty: set[int] = set()
    broken: dict[Rank, tuple[Unmet, ...]] = {}
    for (tp, pp), folder in folders.items():
        rank = read_rank(folder, optimizer=False, allow=request.rules.pickle_globals)
        # Metadata of a run without the distributed optimizer is for parameters alone.
        broken[tp, pp] = unmet_of_rank(rank, folders, full=request.full and _has_distributed_optimizer(rank))
        _agree(rank, first, cut)
        if not tp:
            names = {vpp: [name for name, _ in chunk] for vpp, chunk in enumerate(rank.chunks)}
            empty |= missing_layers(names, cut, pp=pp, where=str(folder))
    if request.noop is None:
        cut = replace(cut, noop=frozenset(empty))
    iteration = _iteration(first)
    layout, every = request.layout(cut), [one for each in inputs.values() for one in each]
    return BackSurvey(
        folder=iteration_path,
        ranks=folders,
        topology=cut,
        layout=layout,
        iteration=iteration,
        samples=samples if type(samples := first.template.args.get("consumed_train_samples")) is int else None,
        identity=digest(
            {"options": request.identity_options(layout), "iteration": iteration, "inputs": [*inputs.values()]}
        ),
        inputs=inputs if layout == cut else dict.fromkeys(layout.ranks(), every),
        unmet=broken,
    )


def pipeline_of(request: BackRequest) -> int:
    """How many pipeline stages the result has: as asked for, which has to agree, or by the checkpoint's folders."""
    asked = request.target_pipeline or request.pipeline
    return asked or parallel_sizes(rank_folders(source_folder(request.source, request.iteration)))[1]


def _topology(request: BackRequest, first: MegatronRank, folders: Mapping[Rank, Path]) -> Topology:
    args = first.template.args
    tensor, pipeline = parallel_sizes(folders)
    found = {
        "parallelism.tensor": (request.tensor, tensor),
        "parallelism.pipeline": (request.pipeline, pipeline),
        "parallelism.virtualPipeline": (request.virtual, len(first.chunks)),
        "model.numLayers": (request.num_layers, args.get("num_layers")),
    }
    for path, (asked, there) in found.items():
        if asked is not None and asked != there:
            raise TopologyError(
                f"{ref(path)} is {asked}, the checkpoint has {there!r}",
                where=first.folder,
                hint=f"leave {ref(path)} out, or give {there!r}",
                field=path,
            )
    layers = args.get("num_layers")
    if type(layers) is not int:
        raise FormatError("the arguments have no num_layers", where=first.folder, hint="give another checkpoint")
    return Topology(
        num_layers=layers,
        tensor=tensor,
        pipeline=pipeline,
        virtual=len(first.chunks),
        data=request.data,
        context=request.context,
        noop=request.noop or frozenset(),
        layers_per_stage=request.layers_per_stage,
    )


def _iteration(rank: MegatronRank) -> int:
    value = rank.template.tree.get("iteration")
    if type(value) is not int or value < 0:
        raise FormatError(f"iteration is {value!r}", where=rank.folder, hint="give a checkpoint of a training run")
    return value


def _agree(rank: MegatronRank, first: MegatronRank, cut: Topology) -> None:
    if _iteration(rank) != _iteration(first) or len(rank.chunks) != cut.virtual:
        raise FormatError(
            f"iteration {_iteration(rank)} in {len(rank.chunks)} chunks, the first rank is at iteration "
            f"{_iteration(first)} in {cut.virtual}",
            where=rank.folder,
            hint="copy one whole iteration",
        )


def _has_distributed_optimizer(rank: MegatronRank) -> bool:
    """Whether the optimizer lies in a file of its own; a rank without the one that its arguments promise is refused."""
    distributed = rank.template.args.get("use_distributed_optimizer") is True
    if is_file(rank.folder / OPTIM_FILE, ref("source.path")):
        return True
    if rank.has_plain_optimizer:
        return False
    raise MissingInputError(
        f"{OPTIM_FILE} is not there" if distributed else f"{MODEL_FILE} holds no optimizer",
        where=rank.folder,
        hint=f"save the checkpoint with its optimizer, or import weights alone{aside('mode')}",
    )


def prove_unchanged_back(request: BackRequest, found: BackSurvey, rank: Rank) -> None:
    """Refuse what was read of files that are not those that were surveyed."""
    read = found.ranks if found.relaid else {rank: found.ranks[rank]}
    now = [one for source, folder in read.items() for one in _inputs(request, folder, source)]
    if now != found.inputs[rank]:
        raise changed(next(iter(read.values())))


def _inputs(request: BackRequest, folder: Path, rank: Rank) -> Sequence[Json]:
    """What a rank is read from: large files by size and time, its param maps by content."""
    found: list[Json] = []
    for name in [MODEL_FILE, OPTIM_FILE] if request.full else [MODEL_FILE]:
        try:
            seen = (folder / name).stat()
        except FileNotFoundError as error:
            if name == OPTIM_FILE:  # a run without the distributed optimizer has none
                continue
            raise access_error(error, folder / name, "examining", option=ref("source.path")) from error
        except OSError as error:
            raise access_error(error, folder / name, "examining", reading=True) from error
        found.append({"source": f"{folder.name}/{name}", "nbytes": seen.st_size, "mtime_ns": seen.st_mtime_ns})
    if request.full and request.maps:
        maps = param_map_files(request.maps, *rank)
        found.extend({"metadata": path.name, "sha256": sha256(path, ref("metadata.path"))} for path in maps)
    return found


def prepare_back(request: BackRequest, found: BackSurvey, rank: Rank) -> BackPrepared:
    """Read a rank's headers, prove its buffers, and plan every copy."""
    if found.relaid:
        return _prepare_relaid(request, found, rank)
    tp, pp = rank
    stored, layout = _proved(request, found.ranks[rank], rank)
    entries = (
        *tensor_entries(
            _chunks(stored, layout.buffers, full=request.full),
            found.topology,
            NameTable(request.rules),
            pp=pp,
            kinds=request.contents,
            full=request.full,
            sizes={name: value for name, value in stored.template.args.items() if isinstance(value, int)},
            where=str(stored.folder),
        ),
        *scalars_of(stored, found.iteration),
    )
    files = files_of(request, found.topology, rank, entries)
    metadata = render([rank_files(stored, tp, pp, layout.buffers)], with_maps=stored.buffers is not None)
    return BackPrepared(files=files, entries=entries, metadata=metadata, evidence=layout.evidence, prefix=stored.prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """The headers of the whole checkpoint, for an import into another layout."""

    first: MegatronRank
    tensors: Index
    metadata: Mapping[str, bytes]
    evidence: str


def _read(request: BackRequest, found: BackSurvey) -> _Read:
    collector = Collector(found.topology.tensor, str(request.source))
    metadata: dict[str, bytes] = {}
    first, evidence = None, ""
    for rank, folder in found.ranks.items():
        stored, layout = _proved(request, folder, rank)
        collect_rank(collector, rank, stored, found.topology, layout.buffers)
        metadata |= render([rank_files(stored, *rank, layout.buffers)], with_maps=stored.buffers is not None)
        first, evidence = first or stored, evidence or layout.evidence
    return _Read(first=cast("MegatronRank", first), tensors=collector.index(), metadata=metadata, evidence=evidence)


def held_for(request: BackRequest, found: BackSurvey, rank: Rank) -> tuple[MegatronRank, Index]:
    """The checkpoint's tensors, for the proof of a rank: those of the rank alone, or all where the layout changes."""
    if found.relaid:
        read = kept(found.identity, partial(_read, request, found))
        return read.first, read.tensors
    stored, layout = _proved(request, found.ranks[rank], rank)
    collector = Collector(1, str(stored.folder))
    collect_rank(collector, (0, rank[1]), stored, found.topology, layout.buffers)
    return stored, collector.index()


def _prepare_relaid(request: BackRequest, found: BackSurvey, rank: Rank) -> BackPrepared:
    """The same for a rank of another layout.  The metadata of all of the checkpoint's ranks comes with the first."""
    read = kept(found.identity, partial(_read, request, found))
    entries, copies = relaid(request, read.tensors, found.topology, found.layout, rank, read.first)
    entries = (*entries, *scalars_of(read.first, found.iteration, entries))
    return BackPrepared(
        files=files_of(request, found.layout, rank, entries),
        entries=entries,
        metadata=read.metadata if rank == (0, 0) else {},
        evidence=read.evidence,
        prefix=read.first.prefix,
        copies=copies,
    )


def _proved(request: BackRequest, folder: Path, rank: Rank) -> tuple[MegatronRank, Layout]:
    """A rank's headers, and where its parameters lie in its buffers."""
    stored = read_rank(folder, optimizer=request.full, copies=request.full, allow=request.rules.pickle_globals)
    return stored, _layout(request, stored, rank) if request.full else Layout(
        buffers=(), bucket_numel=None, evidence=""
    )


def _layout(request: BackRequest, stored: MegatronRank, rank: Rank) -> Layout:
    """The buffers by the maps given, else by Megatron's rules; either way proved by samples of the checkpoint itself."""
    if stored.copies is not None:
        return Layout(buffers=(), bucket_numel=None, evidence=prove_copies(stored, at_most=SAMPLE_NUMEL))
    if request.maps is None:
        return lay_out_rank(stored, rank[1], at_most=SAMPLE_NUMEL)
    given = read_param_maps(request.maps, tp=rank[0], pp=rank[1], divisor=data_parallel_size(stored.template))
    return prove_given(stored, given, at_most=SAMPLE_NUMEL, where=request.maps)


def _chunks(stored: MegatronRank, buffers: tuple[tuple[Buffer, ...], ...], *, full: bool) -> tuple[ImportedChunk, ...]:
    if stored.copies is not None:
        return tuple(
            ImportedChunk(vpp=vpp, weights=weights, copies=stored.copies[vpp])
            for vpp, weights in enumerate(stored.chunks)
        )
    if not full:
        return tuple(ImportedChunk(vpp=vpp, weights=weights) for vpp, weights in enumerate(stored.chunks))
    held = iter(stored.buffers or ())
    return tuple(
        ImportedChunk(
            vpp=vpp,
            weights=weights,
            buffers=buffers[vpp],
            buckets=tuple(tuple(bucket.tensors for bucket in next(held)) for _ in buffers[vpp]),
        )
        for vpp, weights in enumerate(stored.chunks)
    )


def scalars_of(stored: MegatronRank, iteration: int, entries: tuple[Entry, ...] = ()) -> tuple[Entry, ...]:
    """Groups and scheduler of the checkpoint, as far as it has them; groups in the order that ``entries`` need."""
    tree = stored.template.tree
    outer = tree.get("optimizer")
    inner = outer.get("optimizer") if isinstance(outer, dict) else None
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    scheduler = tree.get("opt_param_scheduler")
    listed = (
        [cast("dict[str, object]", group) for group in groups if isinstance(group, dict)]
        if isinstance(groups, list)
        else []
    )
    return scalar_entries(
        iteration,
        groups_in_order(listed, entries) if entries else listed,
        cast("dict[str, object]", scheduler) if isinstance(scheduler, dict) else {},
        where=str(stored.folder / MODEL_FILE),
    )


def files_of(
    request: BackRequest, layout: Topology, rank: Rank, entries: tuple[Entry, ...]
) -> tuple[MindSporeFile, ...]:
    """The files of a rank of the result."""
    return tuple(mindspore_file(request.format, name, entries) for name in files_named(request, layout, rank))


def files_named(request: BackRequest, layout: Topology, rank: Rank) -> list[str]:
    """Their names, from the target's folder on."""
    name = f"{request.prefix}.{request.format}"
    return [f"{rank_name(number)}/{name}" for number in _rank_numbers(request, layout, *rank)]


def _rank_numbers(request: BackRequest, cut: Topology, tp: int, pp: int) -> list[int]:
    """Global ranks that get this file: order tp-cp-dp-pp, as :meth:`Topology.source_rank` counts."""
    replicas = cut.data * cut.context if request.copies else 1
    return [cut.source_rank(tp, pp) + cut.tensor * replica for replica in range(replicas)]
