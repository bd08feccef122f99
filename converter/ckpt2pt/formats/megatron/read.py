"""A checkpoint of Megatron-LM 0.6 to 0.19 in the ``torch`` format, read as global tensors.

mp_rank_01_003/model_optim_rng.pt   weights: param
               distrib_optim.pt     buckets: main_param, exp_avg, exp_avg_sq, by the layout of the buffers
                                    both  --names, layers--> (role, canonical name) --core.index--> tensors
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, product
from pathlib import Path
from typing import Protocol

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.extents import Shape, TensorRef
from ckpt2pt.core.foldernames import expert_ranks, parallel_sizes
from ckpt2pt.core.index import Collector, Index, Local, ordered
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE
from ckpt2pt.core.names import is_tied_head, local_layer
from ckpt2pt.core.params import EMBEDDING, axes_of, canonical_name, expert_of, is_buffer, is_gated, with_expert
from ckpt2pt.core.tensor import Key, Role, Tensor
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.errors import CoverageError, FormatError, MissingInputError, TopologyError, ref
from ckpt2pt.formats.checkpoint import Checkpoint, Selection, agreed
from ckpt2pt.formats.folders import source_folder
from ckpt2pt.formats.megatron.distributed import StoredBucket, read_buffers
from ckpt2pt.formats.megatron.headers import MegatronRank, is_expert_parallel, rank_folders, read_rank
from ckpt2pt.io.files import OpenFiles
from ckpt2pt.io.paths import is_file, listing

ROLES: Mapping[str, Role] = {"param": "main_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""What the kinds of tensors in ``distrib_optim.pt`` are."""

Ranks = Mapping[Rank, MegatronRank]
"""(tp, pp) -> what its files hold."""


Folders = Mapping[tuple[int, int, int], Path]
"""(tp, pp, ep) -> the folder of a rank."""
_Read = Mapping[tuple[int, int, int], MegatronRank]


def open_megatron(path: Path, wanted: Selection) -> Checkpoint:
    """Read the headers of every rank of one iteration: that of the tracker unless ``wanted`` names another.

    The layout of the optimizer's buffers is proved by a few elements of each parameter, which are read as well;
    weights alone leave the optimizer alone.  Types and shapes are those that the first rank of each stage tells.
    """
    folder = source_folder(path, wanted.iteration)
    folders, first = _folders(folder, wanted)
    heads = _read_ranks({rank: folders[rank] for rank in folders if not rank[0] and not rank[2]}, wanted, first)
    there = parallel_sizes([rank[:2] for rank in folders])
    agreed((wanted.tensor, wanted.pipeline), there, folder)
    dense = {(tp, pp): rank for (tp, pp, _), rank in heads.items()}
    check_ranks(dense, there)
    layout = layout_of_ranks(dense, *there)
    expert = 1 + max(ep for *_, ep in folders)
    index = _described(heads, layout, expert)
    locate = partial(_locate, folders, heads, layout, wanted)
    template = heads[0, 0, 0].template
    samples = template.args.get("consumed_train_samples")
    names = (MODEL_FILE,) if wanted.weights_alone else (MODEL_FILE, OPTIM_FILE)
    return Checkpoint(
        path=folder,
        format="megatron",
        expert=expert,
        iteration=iteration_of(heads.values(), folder),
        tensor=there[0],
        pipeline=there[1],
        index=index if wanted.described else locate(index, None),
        template=template,
        samples=samples if type(samples) is int else None,
        files=[str(place / name) for place in folders.values() for name in names if is_file(place / name)],
        locate=locate if wanted.described else None,
    )


def _folders(folder: Path, wanted: Selection) -> tuple[Folders, _Read]:
    """The folder of each rank, and what the files of the first one hold.

    Whether a second number in a folder's name is that of a stage or of experts, only the arguments tell.
    """
    folders = expert_ranks(listing(folder), pipelined=True)
    if not any(ep for *_, ep in folders):
        folders = {(*rank, 0): path for rank, path in rank_folders(folder).items()}
    read = _read_ranks({rank: path for rank, path in folders.items() if rank == (0, 0, 0)}, wanted)
    first = read.get((0, 0, 0))
    if first and is_expert_parallel(first) and not any(ep for *_, ep in folders):
        folders = {(tp, 0, number): path for (tp, number, _), path in folders.items()}
    sizes = [1 + max(numbers) for numbers in zip(*folders, strict=True)]
    missing = [numbers for numbers in product(*map(range, sizes)) if numbers not in folders]
    args = first.template.args if first else {}
    experts = args.get("expert_model_parallel_size")
    if missing or (isinstance(experts, int) and experts > sizes[2]):
        tp, pp, ep = missing[0] if missing else (0, 0, sizes[2])
        raise MissingInputError(
            f"the rank tp {tp} pp {pp} ep {ep} is missing", where=folder, hint="copy the whole iteration"
        )
    return folders, read


def _read_ranks(
    folders: Folders, wanted: Selection, known: _Read | None = None
) -> dict[tuple[int, int, int], MegatronRank]:
    """What the files of these ranks hold; ``known`` were read before."""
    optimizer, allow = not wanted.weights_alone, wanted.rules.pickle_globals
    return {
        rank: (known or {}).get(rank)
        or read_rank(path, optimizer=optimizer, copies=optimizer, experts=True, allow=allow)
        for rank, path in folders.items()
    }


def _described(heads: _Read, layout: Topology, expert: int) -> Index:
    """Every tensor without its views, by the first rank of each stage: the others hold parts of the same shapes, and as many experts.

    Ranks that do not are refused when their headers are read.
    """
    local: dict[Key, tuple[str, Shape]] = {}
    counts: dict[str, int] = {}
    for (_, pp, _), rank in heads.items():
        count = _experts_of(rank)
        for vpp, chunk in enumerate(rank.chunks):
            named = _Names(layout.slots(pp, vpp), rank.folder)
            for spelled, weight in chunk:
                name = named(spelled)
                counts[name] = count
                local.setdefault(Key("param", name), (weight.dtype, weight.shape))
                copies = rank.copies[vpp].get(spelled) if rank.copies is not None else None
                if rank.buffers is not None and not is_buffer(name):
                    local |= {Key(role, name): ("float32", weight.shape) for role in ROLES.values()}
                local |= {Key(ROLES[kind], name): (one.dtype, one.shape) for kind, one in (copies or {}).items()}
    where = str(heads[0, 0, 0].folder.parent)
    gated = is_gated({key.name: shape for key, (_, shape) in local.items()}, where)
    found: dict[Key, Tensor] = {}
    for (role, name), (dtype, shape) in local.items():
        axes = axes_of(name, shape, layout.tensor, gated=gated)
        for ep in range(1 if expert_of(name) is None else expert):
            key = Key(role, with_expert(name, ep * counts[name]))
            found[key] = Tensor(key, dtype, axes.shape, axes.fused, ())
    return ordered(found, where)


def _locate(
    folders: Folders, heads: _Read, layout: Topology, wanted: Selection, index: Index, names: Collection[str] | None
) -> Index:
    """The index with the views of ``names``, and of all that lies in the same stages."""
    from ckpt2pt.formats.ptmeta.capture import SAMPLE_NUMEL, lay_out_rank  # noqa: PLC0415 - much, and a proof needs none of it

    where = str(heads[0, 0, 0].folder.parent)
    homes = _Homes(heads, layout)
    stages = {pp for name in (homes.stages if names is None else names) for pp in homes(name)}
    ranks = _read_ranks({rank: path for rank, path in folders.items() if rank[1] in stages}, wanted, heads)
    every = {**heads, **ranks}
    check_ranks({(tp, pp): rank for (tp, pp, ep), rank in every.items() if not ep}, (layout.tensor, layout.pipeline))
    _check_cut(every.values(), layout.tensor)
    iteration_of(every.values(), Path(where))
    collector = Collector(layout.tensor, where)
    for (tp, pp, ep), rank in sorted(ranks.items(), key=lambda item: item[0][2]):
        buffers = lay_out_rank(rank, pp, at_most=SAMPLE_NUMEL).buffers if rank.buffers is not None else ()
        collect_rank(Shifted(collector, ep, ep * homes.experts), (tp, pp), rank, layout, buffers)
    found = collector.index()
    for key, tensor in index.items():
        one = found.get(key)
        if (one is None and stages.intersection(homes(key.name))) or (
            one and (one.dtype, one.shape) != (tensor.dtype, tensor.shape)
        ):
            raise CoverageError(
                f"{tensor} is {one or 'missing'}, as the ranks of experts differ from the first one",
                where=where,
                hint="check that all ranks are of one save, and complete",
            )
    return {key: found.get(key, tensor) for key, tensor in index.items()}


@dataclass(frozen=True)
class _Homes:
    """Gives the stages of the source that hold a parameter: two for a tied embedding."""

    heads: _Read
    layout: Topology

    @cached_property
    def stages(self) -> Mapping[str, Collection[int]]:
        """Those of each parameter of the first rank of a stage."""
        found: dict[str, set[int]] = {}
        for (_, pp, _), rank in self.heads.items():
            for vpp, chunk in enumerate(rank.chunks):
                named = _Names(self.layout.slots(pp, vpp), rank.folder)
                for name, _ in chunk:
                    found.setdefault(named(name), set()).add(pp)
        return found

    @cached_property
    def experts(self) -> int:
        """Experts of each layer on a rank."""
        return max(map(_experts_of, self.heads.values()))

    def __call__(self, name: str) -> Collection[int]:
        expert = expert_of(name)
        first = name if expert is None else with_expert(name, expert % self.experts - expert)
        return self.stages.get(first, ())


def _check_cut(ranks: Iterable[MegatronRank], tensor: int) -> None:
    """Refuse experts that are cut over another number of tensor-parallel ranks than dense parameters."""
    for rank in ranks:
        own = rank.template.args.get("expert_tensor_parallel_size")
        if isinstance(own, int) and own != tensor and _experts_of(rank):
            raise FormatError(
                f"experts are cut over {own} tensor-parallel ranks, and the dense parameters over {tensor}",
                where=rank.folder.parent,
                hint="give a checkpoint of which both have one tensor parallel size",
            )


def _experts_of(rank: MegatronRank) -> int:
    """Experts of each layer of a rank: all ranks hold as many (moe_layer.py, ``local_expert_indices``)."""
    numbers = (number for chunk in rank.chunks for name, _ in chunk if (number := expert_of(name)) is not None)
    return 1 + max(numbers, default=-1)


@dataclass(frozen=True, slots=True)
class Shifted:
    """Collects what the rank ``ep`` of experts holds, whose first one is ``first``; dense parameters all such ranks hold."""

    collector: Collector
    ep: int
    first: int

    def add(self, role: Role, name: str, tp: int, local: Local) -> None:
        """Take what the rank holds, with the global number of its expert."""
        replica = self.ep > 0 and expert_of(name) is None
        self.collector.add(role, with_expert(name, self.first), tp, local, replica=replica)


def with_optimizer(rank: MegatronRank, allow: tuple[str, ...], files: OpenFiles | None = None) -> MegatronRank:
    """A rank whose model file was read, with its optimizer; without any it stays as it is.  ``files`` stay open."""
    if is_file(rank.folder / OPTIM_FILE, ref("source.path")):
        return replace(rank, buffers=read_buffers(rank.folder / OPTIM_FILE, files))
    return read_rank(rank.folder, copies=True, allow=allow) if rank.has_plain_optimizer else rank


def check_ranks(ranks: Ranks, there: tuple[int, int]) -> None:
    """Refuse folders that are not all of one checkpoint, or whose optimizer is not there."""
    first = ranks[0, 0]
    keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    for key, count in zip(keys, there, strict=True):
        stated = first.template.args.get(key)
        if type(stated) is int and stated != count:
            kind = MissingInputError if stated > count else TopologyError
            raise kind(
                f"the arguments say {key} {stated}, and there are folders for {count}",
                where=first.folder.parent,
                hint="copy the whole iteration, and nothing else",
            )
    for rank in ranks.values():
        if len(rank.chunks) != len(first.chunks):
            raise TopologyError(
                f"the rank holds {len(rank.chunks)} model chunks, and {first.folder.name} holds {len(first.chunks)}",
                where=rank.folder,
                hint="copy one whole iteration",
            )
        if rank.buffers is None and any(other.buffers is not None for other in ranks.values()):
            raise MissingInputError(
                f"{OPTIM_FILE} is not there, and other ranks have one",
                where=rank.folder,
                hint="copy the whole iteration",
            )


def iteration_of(ranks: Collection[MegatronRank], folder: Path) -> int:
    """The one iteration that all ranks state."""
    stated = [step for rank in ranks if type(step := rank.template.tree.get("iteration")) is int]
    steps = sorted(set(stated))
    if len(steps) != 1 or len(stated) != len(ranks):
        raise FormatError(
            f"{len(stated)} of {len(ranks)} ranks state an iteration"
            + (f": {', '.join(map(str, steps))}" if steps else ""),
            where=folder,
            hint="copy one whole iteration",
        )
    return steps[0]


def layout_of_ranks(ranks: Ranks, tensor: int, pipeline: int, listed: tuple[int, ...] | None = None) -> Topology:
    """Which layers a chunk has; ``listed`` are their numbers where somebody knows them.

    Local numbers tell the least that each chunk can have.  Where these add up to all layers, the stages may be uneven; else
    there are no-op layers, and the stages are even.
    """
    first = ranks[0, 0]
    layers, virtual = first.template.args.get("num_layers"), len(first.chunks)
    if type(layers) is not int or layers < 1:
        raise FormatError(
            f"the arguments say num_layers {layers!r}", where=first.folder, hint="give another checkpoint"
        )
    least = tuple(_slots(ranks[0, pp].chunks[vpp]) for vpp in range(virtual) for pp in range(pipeline))
    if listed or sum(least) == layers:
        return Topology(
            num_layers=layers, tensor=tensor, pipeline=pipeline, virtual=virtual, layers_per_stage=listed or least
        )
    if layers % len(least) or max(least) > layers // len(least):
        raise TopologyError(
            f"of {layers} layers by the arguments, the {len(least)} model chunks hold {', '.join(map(str, least))}",
            where=first.folder.parent,
            hint="uneven stages with no-op layers cannot be distinguished: import it with the layout given (ckpt2pt import --stage-list)",
        )
    return Topology(num_layers=layers, tensor=tensor, pipeline=pipeline, virtual=virtual)


def _slots(chunk: Sequence[tuple[str, TensorRef]]) -> int:
    """Layers of a chunk up to its last that has parameters."""
    return 1 + max((layer for name, _ in chunk if (layer := local_layer(name)) is not None), default=-1)


class Takes(Protocol):
    """What collects the tensors of ranks, as :class:`Collector`."""

    def add(self, role: Role, name: str, tp: int, local: Local, /) -> None:
        """Take what rank ``tp`` holds of a parameter."""
        ...


def collect_rank(
    collector: Takes, where: Rank, rank: MegatronRank, layout: Topology, buffers: Sequence[Sequence[Buffer]]
) -> None:
    """Add what a rank holds; ``buffers`` are those of each of its chunks, none for its weights alone."""
    stored = iter(rank.buffers or ())
    tp, pp = where
    for vpp, chunk in enumerate(rank.chunks):
        named = _Names(layout.slots(pp, vpp), rank.folder)
        for name, weight in chunk:
            collector.add("param", named(name), tp, Local(weight.dtype, weight.shape, 0, weight.extents))
        for name, kind, local in chain(_copies(rank, vpp), _slices(buffers[vpp] if buffers else (), stored)):
            collector.add(ROLES[kind], named(name), tp, local)


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of one chunk, with global numbers of layers."""

    slots: range
    folder: Path

    def __call__(self, name: str) -> str:
        if is_tied_head(name):
            return EMBEDDING
        layer = local_layer(name)
        if layer is not None and layer >= len(self.slots):
            raise TopologyError(
                f"{name} is there, and the chunk has {len(self.slots)} layers on the first tensor-parallel rank",
                where=self.folder,
                hint="copy one whole iteration",
            )
        return canonical_name(name, self.slots)


def _copies(rank: MegatronRank, vpp: int) -> Iterator[tuple[str, str, Local]]:
    """The optimizer of a run without the distributed one: a tensor for each parameter."""
    for name, tensors in rank.copies[vpp].items() if rank.copies is not None else ():
        for kind, one in tensors.items():
            yield name, kind, Local(one.dtype, one.shape, 0, one.extents)


def _slices(buffers: Sequence[Buffer], stored: Iterator[tuple[StoredBucket, ...]]) -> Iterator[tuple[str, str, Local]]:
    """Each parameter's part of its bucket; a bucket's tensor begins at the bucket's start."""
    for buffer in buffers:
        for bucket, held in zip(buffer.buckets, next(stored), strict=True):
            for placement in bucket.placements:
                for kind, one in held.tensors.items():
                    first = placement.start - bucket.start
                    yield placement.name, kind, Local(one.dtype, placement.shape, first, one.extents)
