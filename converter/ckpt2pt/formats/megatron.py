"""A checkpoint of Megatron-LM 0.6 in the ``torch`` format, read as global tensors.

mp_rank_01_003/model_optim_rng.pt   weights: param
               distrib_optim.pt     buckets: main_param, exp_avg, exp_avg_sq, by the layout of the buffers
                                    both  --names, layers--> (role, canonical name) --core.index--> tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ckpt2pt.core.index import Collector, Local
from ckpt2pt.core.params import EMBEDDING, canonical_name
from ckpt2pt.core.tensor import Role
from ckpt2pt.errors import FormatError, MissingInputError, TopologyError
from ckpt2pt.folders import iteration_folder
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.mapping.names import Rules, is_tied_head, local_layer
from ckpt2pt.mapping.topology import Rank, Topology
from ckpt2pt.plan.buckets import Buffer
from ckpt2pt.pt.megatron import MegatronRank, StoredBucket, rank_folders, read_rank
from ckpt2pt.ptmeta.capture import lay_out_rank
from ckpt2pt.system.paths import is_folder

_SAMPLE_NUMEL = 1 << 10
_ROLES: Mapping[str, Role] = {"param": "main_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def open_megatron(
    path: Path, *, tensor: int | None, pipeline: int | None, iteration: int | None, rules: Rules
) -> Checkpoint:
    """Read the headers of every rank of one iteration: that of the tracker unless ``iteration`` names another."""
    folder = iteration_folder(path) if iteration is None else _of_iteration(path, iteration)
    folders = rank_folders(folder)
    degrees = tuple(1 + max(rank[axis] for rank in folders) for axis in (0, 1))
    for what, asked, there in zip(("tensor", "pipeline"), (tensor, pipeline), degrees, strict=True):
        if asked not in {None, there}:
            raise TopologyError(
                f"the {what} parallel size is {there}, not {asked}",
                where=folder,
                mend="leave it out: the checkpoint states it",
            )
    collector = Collector(degrees[0], str(folder))
    steps: dict[int, Path] = {}
    layout: Topology | None = None
    for (tp, pp), rank_folder in folders.items():
        rank = read_rank(rank_folder, allow=rules.pickle_globals)
        if rank.buffers is None and rank.has_plain_optimizer:
            rank = read_rank(rank_folder, copies=True, allow=rules.pickle_globals)
        step = rank.template.tree.get("iteration")
        if type(step) is int:
            steps.setdefault(step, rank_folder)
        layout = layout or _layout(rank, *degrees)
        buffers = lay_out_rank(rank, pp, at_most=_SAMPLE_NUMEL).buffers if rank.buffers is not None else ()
        collect_rank(collector, (tp, pp), rank, layout, buffers)
    if len(steps) != 1:
        raise FormatError(
            "the ranks are of iterations " + ", ".join(map(str, steps)) if steps else "the files state no iteration",
            where=folder,
            mend="copy one whole iteration",
        )
    return Checkpoint(
        path=folder,
        format="megatron",
        iteration=next(iter(steps)),
        tensor=degrees[0],
        pipeline=degrees[1],
        index=collector.index(),
    )


def _of_iteration(path: Path, iteration: int) -> Path:
    folder = path / f"iter_{iteration:07d}"
    if not is_folder(folder, "the checkpoint's path"):
        raise MissingInputError(
            f"there is no iteration {iteration}",
            where=folder,
            mend="leave the iteration out for the one that the tracker names",
        )
    return folder


def _layout(rank: MegatronRank, tensor: int, pipeline: int) -> Topology:
    layers = rank.template.args.get("num_layers")
    if type(layers) is not int:
        raise FormatError("the arguments have no num_layers", where=rank.folder, mend="give another checkpoint")
    return Topology(num_layers=layers, tensor=tensor, pipeline=pipeline, virtual=len(rank.chunks))


def collect_rank(
    collector: Collector, where: Rank, rank: MegatronRank, layout: Topology, buffers: Sequence[Sequence[Buffer]]
) -> None:
    """Add what a rank holds; ``buffers`` are those of each of its chunks, none for its weights alone."""
    stored = iter(rank.buffers or ())
    tp, pp = where
    for vpp, chunk in enumerate(rank.chunks):
        named = _Names(layout.slots(pp, vpp), rank.folder)
        for name, ref in chunk:
            collector.add("param", named(name), tp, Local(ref.dtype, ref.shape, 0, ref.extents))
        for name, kind, local in chain(_copies(rank, vpp), _slices(buffers[vpp] if buffers else (), stored)):
            collector.add(_ROLES[kind], named(name), tp, local)


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
                f"{name} is there, and the chunk has {len(self.slots)} layers by the arguments",
                where=self.folder,
                mend="uneven stages need an explicit layout, which the arguments of Megatron-LM 0.6 do not hold",
            )
        return canonical_name(name, self.slots)


def _copies(rank: MegatronRank, vpp: int) -> Iterator[tuple[str, str, Local]]:
    """The optimizer of a run without the distributed one: a tensor for each parameter."""
    for name, tensors in rank.copies[vpp].items() if rank.copies is not None else ():
        for kind, ref in tensors.items():
            yield name, kind, Local(ref.dtype, ref.shape, 0, ref.extents)


def _slices(buffers: Sequence[Buffer], stored: Iterator[tuple[StoredBucket, ...]]) -> Iterator[tuple[str, str, Local]]:
    """Each parameter's part of its bucket; a bucket's tensor begins at the bucket's start."""
    for buffer in buffers:
        for bucket, held in zip(buffer.buckets, next(stored), strict=True):
            for placement in bucket.placements:
                for kind, ref in held.tensors.items():
                    first = placement.start - bucket.start
                    yield placement.name, kind, Local(ref.dtype, placement.shape, first, ref.extents)
