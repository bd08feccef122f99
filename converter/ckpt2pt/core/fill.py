"""Slots of files to be written -> the moves that fill them.  Pure.

index, files' slots --core.slots: proof--> one Move for each box of a tensor, with a sink in every file that wants it
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ckpt2pt.core.extents import DTYPE_BYTES, Box, TensorRef
from ckpt2pt.core.index import Index
from ckpt2pt.core.moves import Move, Sink, cut, in_source_order, move_of
from ckpt2pt.core.plan import gather_box
from ckpt2pt.core.slots import FileSlots, Slot, check_box, check_filled, source_of
from ckpt2pt.core.tensor import Key, Tensor, box_of, dense_strides


def moves_of(index: Index, files: Sequence[FileSlots], where: str) -> tuple[Move, ...]:
    """Every move that fills the files of one unit, in the order of the source; each source element is read once.

    A weight is rounded from its float32 main parameter where the source has only that.  ``where`` names the source.  Raises
    :class:`MissingInputError` for a slot that no tensor fills, and :class:`CoverageError` for slots that overlap, leave gaps
    or reach beyond their tensor.
    """
    wanted: dict[tuple[Key, Box], list[tuple[str, Slot]]] = {}
    for file in files:
        check_filled(file, where)
        for slot in file.slots:
            tensor = source_of(index, slot.key, where)
            check_box(slot, tensor, where)
            wanted.setdefault((tensor.key, slot.box), []).append((file.name, slot))
    return in_source_order(move for move in _moves(index, wanted) if move.nbytes)


def bytes_read(index: Index, files: Sequence[FileSlots], where: str) -> int:
    """What is read for files: a weight and its main parameter may be of one tensor, which is read once."""
    read: dict[tuple[Key, Box], int] = {}
    for slot in (slot for file in files for slot in file.slots):
        tensor = index.get(slot.key) or source_of(index, slot.key, where)
        read[tensor.key, slot.box] = _held(tensor, slot.box) * DTYPE_BYTES[tensor.dtype]
    return sum(read.values())


def _held(tensor: Tensor, box: Box) -> int:
    """Elements of a box but for those that are padding of the vocabulary."""
    origin, shape = box
    if origin and origin[0] + shape[0] > tensor.shape[0]:
        shape = (max(0, tensor.shape[0] - origin[0]), *shape[1:])
    return math.prod(shape)


def _moves(index: Index, wanted: dict[tuple[Key, Box], list[tuple[str, Slot]]]) -> Iterator[Move]:
    """``first`` counts on through the boxes of a tensor: its digest is that of all of them, one after the other."""
    first: dict[Key, int] = {}
    for (key, box), slots in wanted.items():
        sinks = tuple(Sink(file=name, storage=slot.storage, start=slot.start, dtype=slot.dtype) for name, slot in slots)
        ref = box_ref(index[key], box)
        numel = ref.numel
        move = move_of(key.name, key.role, ref, 0, numel, sinks)
        yield replace(move, first=first[key]) if key in first else move
        first[key] = first.get(key, 0) + numel


def box_ref(tensor: Tensor, box: Box) -> TensorRef:
    """A box of a tensor, wherever its elements lie: what a rank holds is most often all of a view, in one stretch."""
    for view in tensor.views:
        if view.shape == box[1] and view.origin == box[0] and view.strides == dense_strides(view.shape):
            width = DTYPE_BYTES[tensor.dtype]
            extents = cut(view.storage, view.first * width, view.numel * width)
            return TensorRef(tensor.key.name, tensor.dtype, view.shape, extents)
    return TensorRef(tensor.key.name, tensor.dtype, box[1], (), gather_box(tensor.views, box))


def replicas_of(tensor: Tensor) -> Iterator[tuple[TensorRef, TensorRef]]:
    """Pairs that must hold the same bytes: what is converted, and what another rank of the source holds of it."""
    for view in tensor.replicas:
        box = box_of(view)
        yield box_ref(tensor, box), box_ref(tensor._replace(views=(view,)), box)
