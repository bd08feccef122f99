"""A Megatron checkpoint as the source of a conversion: its ranks, its tensors, and the metadata that it is itself.

mp_rank_*/*.pt --formats.megatron--> tensors, of a rank alone or of all --core.reshard--> entries of a rank of the result
               --ptmeta.capture----> template, buffers --ptmeta.relayout, where the layout changes--> those of that rank
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.extents import DTYPE_BYTES
from ckpt2pt.core.foldernames import parallel_sizes
from ckpt2pt.core.index import Collector, Index, Local
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE, cut
from ckpt2pt.core.names import NameTable, Rules
from ckpt2pt.core.reshard import RankTensors, entry_name, reshard
from ckpt2pt.core.stated import Stated, Statement
from ckpt2pt.core.tensor import Key, Role, Tensor, local_tensor
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.discover.checkpoint import Discovered, Found, RankSource, changed, prove_same, stat_of, step_of, wanted_of
from ckpt2pt.discover.made import chunks_of, meta_of_files, template_of_files
from ckpt2pt.discover.recent import Recent
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import CoverageError, MissingInputError, aside, ref
from ckpt2pt.formats.megatron.headers import MegatronRank, rank_folders, read_rank
from ckpt2pt.formats.megatron.payload import Template, tree_payload
from ckpt2pt.formats.megatron.read import (
    Takes,
    check_ranks,
    collect_rank,
    iteration_of,
    layout_of_ranks,
    with_optimizer,
)
from ckpt2pt.formats.mindspore.filenames import UNNAMED
from ckpt2pt.formats.mindspore.imported import missing_layers
from ckpt2pt.formats.mindspore.ranks import SourceFile
from ckpt2pt.formats.mindspore.source import kept, paths_for
from ckpt2pt.formats.ptmeta.capture import (
    SAMPLE_NUMEL,
    Layout,
    lay_out_again,
    lay_out_rank,
    prove_copies,
    prove_given,
    rank_files,
)
from ckpt2pt.formats.ptmeta.files import render
from ckpt2pt.formats.ptmeta.legacy import as_legacy, check_legacy, is_newer
from ckpt2pt.formats.ptmeta.metadata import RankMeta, data_parallel_size, read_param_maps
from ckpt2pt.formats.ptmeta.relayout import NewLayout, Relayout, relayout
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.trees import with_attrs
from ckpt2pt.io.checksums import Piece
from ckpt2pt.io.files import OpenFiles
from ckpt2pt.io.paths import is_file, status

ROLES: Mapping[bool, Mapping[Role, Role]] = {
    True: {"main_param": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"},
    False: {"param": "param"},
}
"""With and without the optimizer: what is taken of the checkpoint, and as what of the result; weights are rounded from float32."""


def layout_of(folder: Path, rules: Rules, listed: tuple[int, ...] | None = None) -> Topology:
    """The layout of an iteration by its folders, its arguments and its names; ``listed`` are the layers of each stage where they are given."""
    folders = rank_folders(folder)
    tensor, pipeline = parallel_sizes(folders)
    ranks = {rank: _model(folder, rules.pickle_globals) for rank, folder in folders.items() if not rank[0]}
    check_ranks(ranks, (tensor, pipeline))
    found = layout_of_ranks(ranks, tensor, pipeline, listed)
    if found.layers_per_stage and len(set(found.layers_per_stage)) == 1:
        found = replace(found, layers_per_stage=None)
    empty: set[int] = set()
    for (_, pp), rank in ranks.items():
        names = {vpp: [name for name, _ in chunk] for vpp, chunk in enumerate(rank.chunks)}
        empty |= missing_layers(names, found, pp=pp, where=str(rank.folder))
    return replace(found, noop=frozenset(empty))


def find(request: Request, keep: Collection[Rank]) -> Found:
    """The files of every rank of the iteration, whose folder the source is; all ranks have to be at it."""
    folder, layout = request.source, request.source_layout
    folders = rank_folders(folder)
    if parallel_sizes(folders) != (layout.tensor, layout.pipeline):
        raise changed(folder)
    files = {rank: _file(rank_folder, full=request.full) for rank, rank_folder in folders.items()}
    seen = {path: stat_of(path) for file in files.values() for path in file.paths}
    ranks: dict[Rank, MegatronRank] = {}
    for rank, rank_folder in folders.items():
        headers = _model(rank_folder, request.rules.pickle_globals)
        ranks[rank] = _outline(headers) if ranks else headers
    check_ranks(ranks, (layout.tensor, layout.pipeline))
    training_step = step_of(ranks[0, 0].template.args, iteration_of(ranks.values(), folder), request)
    return Found(files, training_step, {}, partial(prove_same, seen))


def _outline(rank: MegatronRank) -> MegatronRank:
    """What all ranks have to agree on: the headers of a thousand would not fit into memory."""
    tree = {key: value for key, value in rank.template.tree.items() if key == "iteration"}
    template = replace(rank.template, tree=tree, storages={})
    return replace(rank, chunks=tuple(() for _ in rank.chunks), template=template)


def _file(folder: Path, *, full: bool) -> SourceFile:
    optim = folder / OPTIM_FILE
    beside = (optim,) if full and is_file(optim) else ()
    return SourceFile(path=folder / MODEL_FILE, when=UNNAMED, merged=False, beside=beside)


def read(request: Request, chosen: Discovered, rank: Rank, meta: RankMeta) -> RankSource:
    """The tensors of the rank of the same place; those of all ranks where the layout changes, cut anew."""
    statement, table = stated(request, chosen, rank), NameTable(request.rules)
    if request.source_topology is None:
        own = _Entries(ROLES[request.full])
        _collect(own, own_of(request), [(rank, (0, rank[1]))])
        return RankSource(RankTensors(index=own, name=partial(entry_name, pp=rank[1], table=table)), statement)
    tensors = carried(tensors_for(request, chosen, rank), full=request.full)
    return RankSource(reshard(tensors, rank, wanted_of(request, meta), table), statement)


def carried(found: Index, *, full: bool) -> Index:
    """What is taken of a checkpoint, as what it is in the result; parameter by parameter, as tensors lie in a file."""
    return {
        (new := Key(role, name)): found[old]._replace(key=new)
        for name in dict.fromkeys(key.name for key in found)
        for stored, role in ROLES[full].items()
        if (old := Key(stored, name)) in found
    }


def stated(request: Request, chosen: Discovered, rank: Rank) -> Statement:
    """What the checkpoint's own template states, where another one takes its place; the template itself otherwise."""
    if request.metadata is None or request.files:
        return Statement()
    return stated_by(own_of(request).arguments((0, 0) if request.source_topology else rank))


def stated_by(template: Template) -> Statement:
    """The settings of optimizer and scheduler in a template."""
    return Statement(scheduler=_stated(template.scheduler), groups=dict(enumerate(map(_stated, template.groups))))


def _stated(values: Mapping[str, object]) -> dict[str, Stated]:
    return {
        key: Stated(value, "float64") for key, value in values.items() if isinstance(value, bool | int | float | str)
    }


def prove_read(
    request: Request, chosen: Discovered, rank: Rank, read: Mapping[str, Sequence[Piece]], *, every_byte: bool
) -> dict[str, int]:
    """By the CRC-32 of each record; what else of a record was not read is read now."""
    found = {"verified": 0, "notChecked": 0, "none": 0}
    for path in paths_for(rank, chosen.files, request):
        pieces = [*read.get(str(path), ())]
        own_template = request.files is not None or request.metadata is None
        if own_template and not request.source_topology and path.name == MODEL_FILE:
            own = own_of(request)
            template = own.headers(rank)[0].template if request.files else own.arguments(rank)
            _, keys = tree_payload(template.tree, template.storages, template.where)
            pieces += [(template.storages[key].offset, 0, 0) for key in keys]  # copied as they are
        if request.verify == "none":
            found["notChecked"] += 1
        elif pieces:
            Archive.prove_read(path, pieces)
            found["verified"] += 1
    return found


class _Entries(dict[Key, Tensor]):
    """Collects what one rank holds of what is carried, as the tensors of a rank of the same place."""

    def __init__(self, roles: Mapping[Role, Role]) -> None:
        self._roles = roles

    def add(self, role: Role, name: str, _: int, local: Local) -> None:
        """Take one tensor, if it is asked for."""
        if role in self._roles:
            width, key = DTYPE_BYTES[local.dtype], Key(self._roles[role], name)
            extents = cut(local.storage, local.first * width, math.prod(local.shape) * width)
            if key in self:
                raise CoverageError(
                    f"{key} is in one file by two names",
                    where=local.storage[0].path if local.storage else name,
                    hint="check the parallel sizes, and that all folders are of one save",
                )
            self[key] = local_tensor(key, local.dtype, local.shape, extents)


def tensors_for(request: Request, chosen: Discovered, rank: Rank) -> Index:
    """What there is for a rank of the result: the tensors of the rank of the same place, or all where the layout changes."""
    own = own_of(request)
    if request.source_topology is None:
        return _tensors(own, 1, [(rank, (0, rank[1]))])
    ranks = [(each, each) for each in own.folders]
    return kept(chosen.identity, partial(_tensors, own, own.layout.tensor, ranks))


def _tensors(own: Own, tensor: int, ranks: Iterable[tuple[Rank, Rank]]) -> Index:
    """Each of ``ranks`` with the place that it takes among ``tensor`` tensor-parallel ranks."""
    collector = Collector(tensor, str(own.where))
    _collect(collector, own, ranks)
    return collector.index()


def _collect(into: Takes, own: Own, ranks: Iterable[tuple[Rank, Rank]]) -> None:
    for rank, place in ranks:
        headers, layout = own.headers(rank)
        # Without the distributed optimizer there is a tensor for each parameter instead of buckets.
        collect_rank(into, place, headers, own.layout, layout.buffers if headers.buffers is not None else ())


# ---------------------------------------------------------------------------------------------------------- the metadata


@dataclass(frozen=True, slots=True)
class Own:
    """What a checkpoint says of itself, as metadata.  ``where`` is the folder of the iteration; nothing is kept open."""

    where: Path
    folders: Mapping[Rank, Path]
    layout: Topology
    full: bool
    target_data: int | None
    allow: tuple[str, ...] = field(default=())
    maps: Path | None = None
    """Param maps that were written by hand; None: computed."""
    described_too: bool = False
    """Whether the metadata of a rank will be asked for as well."""

    def headers(self, rank: Rank) -> tuple[MegatronRank, Layout]:
        """The headers of a rank, and where its parameters lie in its buffers."""
        folder = self.folders[rank]
        key = (
            folder,
            rank,
            self.full,
            self.allow,
            self.maps,
            *_state(folder / MODEL_FILE),
            *_state(folder / OPTIM_FILE),
        )
        return _PROVED.get(key, lambda: _headers(self, rank), lambda found: _tensors_in(found[0]))

    def described(
        self, rank: Rank, read: tuple[MegatronRank, Layout] | None = None, among: OpenFiles | None = None
    ) -> dict[str, bytes]:
        """The files of ``pt_meta`` of a rank, whose headers have been ``read``."""
        stored, layout = read or self.headers(rank)
        key, maps = (stored.folder, rank, self.full, self.maps, *_state(stored.folder / MODEL_FILE)), stored.buffers
        made = [rank_files(stored, *rank, layout.buffers)]
        files = partial(render, made, with_maps=maps is not None, among=among)
        return _DESCRIBED.get(key, files, lambda found: sum(map(len, found.values())))

    def arguments(self, rank: Rank) -> Template:
        """The template of one rank; Megatron writes and reads the optimizer of the result as distributed."""
        stored, layout = self.headers(rank)
        if stored.copies is None and not is_newer(stored):
            return stored.template
        made = rank_files(stored, *rank, layout.buffers)
        if stored.copies is not None:
            args = with_attrs(made.tree["args"], {"use_distributed_optimizer": True})
            made = replace(made, tree={**made.tree, "args": args})
        return template_of_files(made, self.where)

    def buffers(self, pp: int) -> Sequence[Buffer]:
        """The buffers of the first rank of a stage, as those of Megatron-LM 0.6."""
        stored, layout = self.headers((0, pp))
        check_legacy(stored)
        return [buffer for chunk in rank_files(stored, 0, pp, layout.buffers).buffers for buffer in chunk]

    def meta(self, rank: Rank) -> RankMeta:
        """Of a rank of the same place."""
        stored, layout = self.headers(rank)
        buffers, old = rank_files(stored, *rank, layout.buffers).buffers, as_legacy(stored)
        if self.full and self.target_data:
            buffers = lay_out_again(old, rank[1], divisor=self.target_data, bucket_size=layout.bucket_numel)
        names = [tuple(name for name, _ in chunk) for chunk in old.chunks]
        return RankMeta(template=self.arguments(rank), chunks=chunks_of(names, buffers, self.where))


def _headers(own: Own, rank: Rank) -> tuple[MegatronRank, Layout]:
    stored = _model(own.folders[rank], own.allow)
    if not own.full:
        return stored, Layout(buffers=(), bucket_numel=None, evidence="")
    with (
        OpenFiles() as files
    ):  # each once, for its header, the samples that prove it, and what the metadata takes of it
        stored = with_optimizer(stored, own.allow, files)
        layout = _layout(own, rank, stored, files)
        if own.described_too:
            own.described(rank, (stored, layout), files)
    return stored, layout


def _layout(own: Own, rank: Rank, stored: MegatronRank, files: OpenFiles) -> Layout:
    if stored.buffers is None and stored.copies is None:
        distributed = stored.template.args.get("use_distributed_optimizer") is True
        raise MissingInputError(
            f"{OPTIM_FILE} is not there" if distributed else f"{MODEL_FILE} holds no optimizer",
            where=stored.folder,
            hint=f"copy the whole iteration with its optimizer, or convert weights alone{aside('mode')}",
        )
    if stored.copies is not None:
        layout = lay_out_rank(stored, rank[1], at_most=SAMPLE_NUMEL)
        return replace(layout, evidence=prove_copies(stored, at_most=SAMPLE_NUMEL))
    if own.maps is None:
        return lay_out_rank(stored, rank[1], at_most=SAMPLE_NUMEL, files=files)
    given = read_param_maps(own.maps, tp=rank[0], pp=rank[1], divisor=data_parallel_size(stored.template))
    return prove_given(stored, given, at_most=SAMPLE_NUMEL, where=own.maps, files=files)


def _model(folder: Path, allow: tuple[str, ...]) -> MegatronRank:
    """The headers of a rank without its optimizer."""
    key = (folder, allow, *_state(folder / MODEL_FILE))
    return _MODELS.get(key, lambda: read_rank(folder, optimizer=False, allow=allow), _tensors_in)


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written; nothing where there is none."""
    seen = status(path, ref("source.path"))
    return (seen.st_ino, seen.st_size, seen.st_mtime_ns) if seen else ()


def _tensors_in(rank: MegatronRank) -> int:
    buckets = sum(len(buffer) for buffer in rank.buffers or ())
    copies = sum(len(tensors) for chunk in rank.copies or () for tensors in chunk.values())
    return sum(map(len, rank.chunks)) + 3 * buckets + copies


_DESCRIBED: Recent[dict[str, bytes]] = Recent(1 << 20)
_MAX_KEPT = 1 << 14  # tensors, about 8 MiB
_MODELS: Recent[MegatronRank] = Recent(_MAX_KEPT)
_PROVED: Recent[tuple[MegatronRank, Layout]] = Recent(_MAX_KEPT)


def own_of(request: Request) -> Own:
    """What the source of a request says of itself."""
    layout = request.source_topology or request.topology
    folders = rank_folders(request.source)
    maps = request.metadata if request.files else None
    return Own(
        request.source,
        folders,
        layout,
        request.full,
        request.target_data,
        request.rules.pickle_globals,
        maps,
        bool(request.files),
    )


def own_meta(request: Request, rank: Rank) -> RankMeta:
    """What the source says of a rank of the result, or what follows for it from what it says of all."""
    own = own_of(request)
    check_legacy(own.headers((0, 0) if request.source_topology else rank)[0])
    if request.source_topology is None:
        return own.meta(rank)
    return meta_of_files(_relaid(request, own).rank(rank), own.where)


def own_assumptions(request: Request) -> dict[str, object]:
    """What that rests on besides the checkpoint."""
    own = own_of(request)
    found = {} if request.source_topology is None else dict(_relaid(request, own).assumed)
    if request.full and own.headers((0, 0))[0].copies is not None:
        found["optimizer"] = "that of a run without --use-distributed-optimizer; the result is for one with it"
    return found


def _relaid(request: Request, own: Own) -> Relayout:
    state = tuple(tuple(stat_of(own.folders[0, pp] / MODEL_FILE).values()) for pp in range(own.layout.pipeline))
    key = own.where, own.layout, request.topology, own.full, own.target_data, own.allow, state

    def make() -> Relayout:
        wanted = request.topology
        new = NewLayout(
            tensor=wanted.tensor,
            pipeline=wanted.pipeline,
            virtual=wanted.virtual,
            data=own.target_data,
            noop=wanted.noop,
            layers_per_stage=wanted.layers_per_stage,
            bucket_size=own.headers((0, 0))[1].bucket_numel,
        )
        return relayout(own, new)

    return _RELAID.get(key, make, lambda _: 1)


_RELAID: Recent[Relayout] = Recent(1)
"""The last one, by all that it is made from."""
