"""Where the elements of a tensor of Hugging Face's belong in Megatron core's: the way back, by arithmetic of its own.  Pure.

q_proj (queries of all groups, hidden), head 5 of 2 queries a group  -->  linear_qkv: group 2, the second of its 4 heads
"""

from __future__ import annotations

from collections.abc import Iterator

from ckpt2pt.core.extents import Extent, Shape, Stored, View
from ckpt2pt.core.tensor import dense_strides
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.huggingface.names import Form
from ckpt2pt.formats.huggingface.views import Heads

Storage = tuple[Extent, ...]


def natural_shape(form: Form, shape: Shape, heads: Heads) -> Shape:
    """The shape of the whole tensor of Megatron core, in its natural axes, that a tensor of ``shape`` is a part of."""
    if form in {"query", "key", "value"}:
        return heads.rows, *shape[1:]
    if form in {"gate", "up"}:
        return 2, *shape
    if form in {"transposed", "attention"}:
        return tuple(reversed(shape))
    return shape


def placed(form: Form, shape: Shape, heads: Heads, storage: Storage) -> Iterator[Stored]:
    """The parts of Megatron core's tensor that a tensor of ``shape``, in C order in ``storage``, holds.

    Raises :class:`FormatError` for rows that are not those of all heads.
    """
    strides = dense_strides(shape)
    if form in {"gate", "up"}:
        half = int(form == "up")
        yield View((half, *(0,) * len(shape)), (1, *shape), (0, *strides), 0, storage)
    elif form == "transposed":
        yield View((0,) * len(shape), tuple(reversed(shape)), tuple(reversed(strides)), 0, storage)
    elif form in {"query", "key", "value"}:
        yield from _heads(form, shape, heads, storage)
    elif form == "attention":
        yield from _attention(shape, heads, storage)
    elif form == "channels" and heads.interleaved:
        yield from _channels((0,), (), 0, heads, storage)
    else:
        yield View((0,) * len(shape), shape, strides, 0, storage)


def _heads(form: Form, shape: Shape, heads: Heads, storage: Storage) -> Iterator[Stored]:
    """Group by group: its queries, its key and its value follow each other in ``linear_qkv``."""
    count, first = {"query": (heads.queries, 0), "key": (1, heads.queries), "value": (1, heads.queries + 1)}[form]
    _check(shape[0], heads.groups * count * heads.channels, heads)
    rest, columns = shape[1:], (0,) * len(shape[1:])
    width = rest[0] if rest else 1
    for group in range(heads.groups):
        row = (group * (heads.queries + 2) + first) * heads.channels
        own = group * count * heads.channels
        if form == "value" or not heads.interleaved:
            rows = count * heads.channels
            yield View((row, *columns), (rows, *rest), dense_strides((rows, *rest)), own * width, storage)
            continue
        for head in range(0, count * heads.channels, heads.channels):
            yield from _channels((row + head, *columns), rest, (own + head) * width, heads, storage)


def _channels(origin: Shape, rest: Shape, first: int, heads: Heads, storage: Storage) -> Iterator[Stored]:
    """A head whose even channels lie in front of the odd ones."""
    width, half = rest[0] if rest else 1, heads.channels // 2
    for channel in range(heads.channels):
        at = channel // 2 + channel % 2 * half
        place = (origin[0] + channel, *origin[1:])
        yield View(place, (1, *rest), dense_strides((1, *rest)), first + at * width, storage)


def _attention(shape: Shape, heads: Heads, storage: Storage) -> Iterator[Stored]:
    """``Conv1D``: a row for each input, columns are all queries, all keys, all values."""
    columns = shape[-1]
    _check(columns, heads.rows, heads)
    rest = tuple(reversed(shape[:-1]))
    for head in range(heads.groups):
        for kind in range(3):
            row = (head * 3 + kind) * heads.channels
            first = (kind * heads.groups + head) * heads.channels
            origin = (row, *(0,) * len(rest))
            yield View(origin, (heads.channels, *rest), (1, *(columns,) * len(rest)), first, storage)


def _check(rows: int, wanted: int, heads: Heads) -> None:
    if rows != wanted:
        raise FormatError(
            f"{rows} rows, and {heads.groups} groups of {heads.queries} heads of {heads.channels} channels have {wanted}",
            where="config.json",
            hint="give a folder whose config.json is that of its tensors",
        )
