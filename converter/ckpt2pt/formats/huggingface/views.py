"""Tensors of Megatron core as a class of Hugging Face has them: other boxes and orders of the same bytes.  Pure.

linear_qkv (rows, hidden) = (groups, queries of a group + key + value, channels, hidden)  -->  q_proj (groups, queries, channels, hidden)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckpt2pt.core.extents import Shape, Stored, View, intersection
from ckpt2pt.core.tensor import Key, Tensor, boxes, dense_strides
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.huggingface.names import Form


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """``groups`` of ``queries`` heads each that share a key and a value, of ``channels`` channels.

    ``interleaved``: rotary embeddings turn neighbouring channels of the source, and halves of each head in transformers.
    """

    groups: int
    queries: int
    channels: int
    interleaved: bool = False

    @property
    def rows(self) -> int:
        """Rows of ``linear_qkv``."""
        return self.groups * (self.queries + 2) * self.channels


def view_of(tensor: Tensor, own: str, form: Form, *, heads: Heads, vocabulary: int) -> Tensor:
    """The tensor ``own`` of a class of Hugging Face, in the bytes of Megatron core's that it is a part of.

    Raises :class:`FormatError` where that one has not the shape for it.
    """
    tensor = tensor._replace(key=Key("param", own), replicas=())
    if form == "whole":
        return tensor
    if form == "transposed":
        return ordered(tensor, tuple(reversed(range(len(tensor.shape)))))
    if form == "vocabulary":
        return _part(tensor, 0, 0, _at_least(tensor, vocabulary))
    if form in {"gate", "up"}:
        if len(tensor.shape) == len(tensor.fused):
            raise FormatError(f"{tensor} is not gated", where=own, hint="check swiglu of the arguments")
        return _fused(_part(tensor, 0, int(form == "up"), 1), tensor.shape[1:])
    if form == "channels":
        return _halves(_split(tensor, (1, 1, heads.channels)), heads, tensor.fused)
    return _attention(tensor, form, heads)


def _attention(tensor: Tensor, form: Form, heads: Heads) -> Tensor:
    """What is of ``linear_qkv``; ``rest`` are the columns of a weight, and of a bias nothing."""
    rest = tensor.shape[1:]
    found = _split(tensor, (heads.groups, heads.queries + 2, heads.channels))
    if form == "attention":
        if heads.queries != 1:
            raise FormatError(
                f"{tensor} has several queries to a key", where=tensor.key.name, hint="check num_query_groups"
            )
        found = ordered(found, (1, 0, 2, *range(3, 3 + len(rest))))
        found = _fused(found, (heads.rows, *rest))
        if not rest:
            return found
        return ordered(found, (3, 0, 1, 2))._replace(fused=(*rest, heads.rows))
    first, count = {"query": (0, heads.queries), "key": (heads.queries, 1), "value": (heads.queries + 1, 1)}[form]
    found = _part(found, 1, first, count)
    fused = (heads.groups * count * heads.channels, *rest)
    return _fused(found, fused) if form == "value" else _halves(found, heads, fused)


def _halves(tensor: Tensor, heads: Heads, fused: Shape) -> Tensor:
    """Even channels of each head in front of the odd ones, where rotary embeddings ask for it."""
    if heads.interleaved:
        groups, count, channels, *rest = tensor.shape
        tensor = _split(_joined(tensor), (groups, count, channels // 2, 2))
        tensor = ordered(tensor, (0, 1, 3, 2, *range(4, 4 + len(rest))))
    return _fused(tensor, fused)


def _joined(tensor: Tensor) -> Tensor:
    """The first three axes as one.  A view reaches over whole channels, so that each of its heads is a view of rows."""
    return tensor._replace(shape=(math.prod(tensor.shape[:3]), *tensor.shape[3:]), views=tuple(_rows(tensor)))


def _rows(tensor: Tensor) -> Iterator[Stored]:
    _, count, channels, *_ = tensor.shape
    for view in tensor.views:
        for group in range(view.shape[0]):
            for head in range(view.shape[1]):
                row = ((view.origin[0] + group) * count + view.origin[1] + head) * channels + view.origin[2]
                first = view.first + group * view.strides[0] + head * view.strides[1]
                yield View((row, *view.origin[3:]), view.shape[2:], view.strides[2:], first, view.storage)


def _split(tensor: Tensor, factors: Shape) -> Tensor:
    """The first axis as several, of which the last runs fastest."""
    rows, *rest = tensor.shape
    if math.prod(factors) != rows:
        raise FormatError(
            f"{tensor.key.name} is made of {rows} rows, and {math.prod(factors)} are {' x '.join(map(str, factors))}",
            where=tensor.key.name,
            hint="check num_attention_heads, num_query_groups and kv_channels of the arguments",
        )
    return tensor._replace(shape=(*factors, *rest), views=tuple(_factored(tensor.views, factors)))


def _factored(views: Iterable[Stored], factors: Shape) -> Iterator[Stored]:
    steps = dense_strides(factors)
    for view in views:
        start, stride = view.origin[0], view.strides[0]
        for origin, shape in boxes(factors, start, start + view.shape[0]):
            row = sum(at * step for at, step in zip(origin, steps, strict=True))
            yield View(
                (*origin, *view.origin[1:]),
                (*shape, *view.shape[1:]),
                (*(step * stride for step in steps), *view.strides[1:]),
                view.first + (row - start) * stride,
                view.storage,
            )


def _part(tensor: Tensor, axis: int, first: int, count: int) -> Tensor:
    """``count`` of an axis from ``first`` on."""
    shape = _with(tensor.shape, axis, count)
    whole = _with((0,) * len(shape), axis, first), shape
    views: list[Stored] = []
    for view in tensor.views:
        shared = intersection((view.origin, view.shape), whole)
        if shared:
            low, size = shared
            skipped = sum((at - o) * stride for at, o, stride in zip(low, view.origin, view.strides, strict=True))
            views.append(
                View(_with(low, axis, low[axis] - first), size, view.strides, view.first + skipped, view.storage)
            )
    fused = shape if len(tensor.shape) == len(tensor.fused) else tensor.fused
    return tensor._replace(shape=shape, fused=fused, views=tuple(views))


def _at_least(tensor: Tensor, rows: int) -> int:
    if rows > tensor.shape[0]:
        raise FormatError(
            f"{tensor.key.name} has {tensor.shape[0]} rows, and the vocabulary {rows} tokens",
            where=tensor.key.name,
            hint="give the number of tokens of the tokenizer",
        )
    return rows


def ordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same elements with the axes in another order."""

    def of(values: Sequence[int]) -> Shape:
        return tuple(values[axis] for axis in order)

    views = tuple(
        View(of(view.origin), of(view.shape), of(view.strides), view.first, view.storage) for view in tensor.views
    )
    shape = of(tensor.shape)
    return tensor._replace(shape=shape, fused=shape, views=views)


def _fused(tensor: Tensor, fused: Shape) -> Tensor:
    return tensor._replace(fused=fused)


def _with(values: Shape, axis: int, value: int) -> Shape:
    return (*values[:axis], value, *values[axis + 1 :])
