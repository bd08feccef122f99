"""Optimizer state as Megatron-LM 0.15 and newer keep it by default, ``dp_reshardable``: buckets of buffers, each a flat tensor.

dp_group_idx_3.gbuf_idx_0.<types>.bucket_idx_1.exp_avg      model-parallel rank 3 (tp fastest), model chunk 0, its second bucket

Which parameter lies where follows from the order of the parameters alone: a buffer is filled in reverse order of registration,
each parameter begins at a multiple of 64, and a bucket is stored up to the end of its last one
(megatron/core/distributed/param_and_grad_buffer.py; core/optimizer/distrib_optimizer.py,
``sharded_param_state_dp_reshardable``).  How many layers a chunk has is what fills its buckets to the last element; the weights
prove it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, Shape
from ckpt2pt.core.index import Collector, Index, Local
from ckpt2pt.core.params import HEAD, expert_count, is_buffer, kind_of, layer_of
from ckpt2pt.core.tensor import Role, Tensor
from ckpt2pt.errors import FormatError, aside
from ckpt2pt.formats.megatron.order import Style, registered
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.torch_dist.items import Located
from ckpt2pt.formats.torch_dist.metadata import Chunk, Entry

_KEY = re.compile(
    r"optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)\.dtype_\(.*\)\.bucket_idx_(\d+)\.(param|exp_avg|exp_avg_sq)"
)
_ROLES: Mapping[str, Role] = {"param": "main_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_ALIGN = 64


class _Place(NamedTuple):
    """A bucket: of a model-parallel rank, a model chunk, and its number."""

    rank: int
    chunk: int
    bucket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """The flat tensors of all buckets by role, each of them as the pieces that lie in files, in order."""

    tensors: Mapping[Role, Mapping[_Place, Entry]]

    @classmethod
    def of(cls, tensors: Mapping[str, Entry]) -> tuple[Buckets | None, list[str]]:
        """Those among tensors, None for none; and the keys of the others."""
        found: dict[Role, dict[_Place, Entry]] = {role: {} for role in _ROLES.values()}
        others: list[str] = []
        for key, entry in tensors.items():
            if match := _KEY.fullmatch(key):
                found[_ROLES[match[4]]][_Place(int(match[1]), int(match[2]), int(match[3]))] = entry
            else:
                others.append(key)
        return cls(tensors=found) if any(found.values()) else None, others

    def read(self, weights: Index, located: Mapping[Chunk, Located], common: Template, folder: Path) -> Index:
        """Main parameters and moments of every weight; :class:`FormatError` where the buckets do not hold exactly these."""
        layout = _Layout(weights, common, folder)
        numels = {place: _numel(entry, folder) for place, entry in self.tensors["main_param"].items()}
        for role, held in self.tensors.items():
            if {place: _numel(entry, folder) for place, entry in held.items()} != numels:
                _refuse(f"the buckets of {role} are not those of the main parameters", folder)
        collector = Collector(layout.tensor, str(folder))
        for (rank, chunk), names in layout.chunks(numels).items():
            for name, place, start in layout.placed(names, rank, chunk, numels):
                shape = layout.local(name)
                for role, held in self.tensors.items():
                    storage = tuple(_storage(held[place], located, start, math.prod(shape), folder))
                    collector.add(role, name, rank % layout.tensor, Local("float32", shape, 0, storage))
        return collector.index(partial=True)


class _Layout:
    """Which parameters a chunk has, in which order, and where they lie."""

    def __init__(self, weights: Index, common: Template, folder: Path) -> None:
        args = common.args
        self._folder, self._weights = (
            folder,
            {key.name: tensor for key, tensor in weights.items() if key.role == "param" and not is_buffer(key.name)},
        )
        self.tensor, self._pipeline = (
            _size(args.get(f"{name}_model_parallel_size"), folder) for name in ("tensor", "pipeline")
        )
        fused = args.get("transformer_impl") == "transformer_engine"
        self._style = Style(transformer_engine=fused, grouped=fused and args.get("moe_grouped_gemm") is True)
        self._experts = range(expert_count(self._weights))
        if self._experts and args.get("expert_model_parallel_size", 1) != 1:
            _refuse("experts of expert parallel ranks have buckets of their own", folder)
        for name in self._weights:
            if kind_of(name) is None:
                _refuse(f"the place of {name} in them is not known", folder)
        layers = {layer_of(name) for name in self._weights} - {None}
        self._layers = len(layers)
        if layers != set(range(self._layers)):
            _refuse(f"{self._layers} layers are there, not numbered 0, 1, 2, ...", folder)

    def local(self, name: str) -> Shape:
        """The shape of a rank's part."""
        return _local(self._weights[name], self.tensor)

    def chunks(self, numels: Mapping[_Place, int]) -> dict[tuple[int, int], list[str]]:
        """(rank, chunk) -> names in order of registration; layers are counted through the chunks, stage after stage."""
        virtual = 1 + max(place.chunk for place in numels)
        stages = [(pp, chunk) for chunk in range(virtual) for pp in range(self._pipeline)]
        found: dict[tuple[int, int], list[str]] = {}
        done = 0
        for number, (pp, chunk) in enumerate(stages):
            names: list[str] | None = None
            for count in range(self._layers - done + 1):
                tried = self._names(range(done, done + count), first=not number, last=number == len(stages) - 1)
                if self._fits(tried, pp * self.tensor, chunk, numels):
                    names, done = tried, done + count
                    break
            if names is None:
                _refuse(f"no number of layers fills those of pipeline stage {pp}, model chunk {chunk}", self._folder)
            found |= {(pp * self.tensor + tp, chunk): names for tp in range(self.tensor)}
        if done != self._layers or {(place.rank, place.chunk) for place in numels} - found.keys():
            _refuse(f"they hold {done} of {self._layers} layers", self._folder)
        return found

    def placed(
        self, names: Sequence[str], rank: int, chunk: int, numels: Mapping[_Place, int]
    ) -> Iterator[tuple[str, _Place, int]]:
        """Each parameter with its bucket and its first element there."""
        place, at = _Place(rank, chunk, 0), 0
        for name in reversed(names):
            start = -(-at // _ALIGN) * _ALIGN
            if at and at == numels.get(place):
                place, start = place._replace(bucket=place.bucket + 1), 0
            at = start + math.prod(self.local(name))
            if at > numels.get(place, 0):
                _refuse(f"{name} does not fit into bucket {place.bucket} of rank {rank}", self._folder)
            yield name, place, start
        if names and (at != numels.get(place) or place._replace(bucket=place.bucket + 1) in numels):
            _refuse(f"they do not end with the parameters of rank {rank}", self._folder)

    def _fits(self, names: Sequence[str], rank: int, chunk: int, numels: Mapping[_Place, int]) -> bool:
        try:
            found = list(self.placed(names, rank, chunk, numels))
        except FormatError:
            return False
        return bool(found) or _Place(rank, chunk, 0) not in numels

    def _names(self, layers: range, *, first: bool, last: bool) -> list[str]:
        tied = HEAD not in self._weights
        slots = dict(enumerate(layers))
        rows = registered(
            self._weights,
            slots,
            (first, last),
            tied=tied,
            shared=tied and self._pipeline > 1,
            style=self._style,
            experts=self._experts,
        )
        return [row.name for row in rows]


def _local(tensor: Tensor, ranks: int) -> Shape:
    known = kind_of(tensor.key.name)
    axis = known[0].cuts[known[1]] if known else None
    return tuple(length // ranks if number == axis else length for number, length in enumerate(tensor.fused))


def _numel(entry: Entry, folder: Path) -> int:
    if entry.dtype != "float32" or len(entry.shape) != 1:
        _refuse(f"a bucket is {entry.dtype}{list(entry.shape)}", folder)
    at = 0
    for chunk in sorted(entry.chunks):
        if chunk.origin[0] != at:
            _refuse(f"no file, or more than one, holds element {min(at, chunk.origin[0])} of one", folder)
        at += chunk.shape[0]
    if at != entry.shape[0]:
        _refuse(f"one has {entry.shape[0]} elements, and its parts hold {at}", folder)
    return at


def _storage(entry: Entry, located: Mapping[Chunk, Located], start: int, numel: int, folder: Path) -> Iterator[Extent]:
    """The extents of elements ``[start, start + numel)`` of a bucket."""
    width, stop = DTYPE_BYTES[entry.dtype], start + numel
    for chunk in sorted(entry.chunks):
        first, length, here = chunk.origin[0], chunk.shape[0], located[chunk]
        low, high = max(start, first), min(stop, first + length)
        if low >= high:
            continue
        if here.strides != (1,):
            _refuse("a part of one is stored with gaps", folder)
        [extent] = here.storage
        yield Extent(extent.path, extent.offset + (here.first + low - first) * width, (high - low) * width)


def _size(value: object, folder: Path) -> int:
    if type(value) is not int or value < 1:
        _refuse(f"the arguments say a parallel size of {value!r}", folder)
    return value


def _refuse(what: str, folder: Path) -> NoReturn:
    raise FormatError(
        f"the buckets of the optimizer (dp_reshardable) cannot be distinguished: {what}",
        where=folder,
        hint="load the checkpoint with the Megatron-LM that wrote it and save it again with "
        f"--dist-ckpt-optim-fully-reshardable, or convert weights alone{aside('mode')}",
    )
