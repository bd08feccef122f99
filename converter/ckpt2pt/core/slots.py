"""Slots: what each file to be written holds of the global tensors, and proof that nothing is left out.  Pure.

    Slot   linear_fc1 [0:2, 8:16, 0:8], in C order, from element 64 of storage 0 on, as float32

A writer of a format says nothing but slots; ``core.fill.moves_of`` finds the bytes in the source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Box, Shape, Stored, View, intersection
from ckpt2pt.core.index import Index, find
from ckpt2pt.core.params import is_buffer, is_padded
from ckpt2pt.core.tensor import Key, Role, Tensor, check_coverage, dense_strides
from ckpt2pt.errors import CoverageError, MissingInputError, aside


class Slot(NamedTuple):
    """A box of a global tensor in its natural axes, in C order, ``start`` elements into a storage of a file."""

    key: Key
    dtype: str
    storage: int
    start: int
    box: Box

    @property
    def numel(self) -> int:
        """Number of elements, padding of the vocabulary included."""
        return math.prod(self.box[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSlots:
    """All slots of a file.

    ``storages`` are the bytes of each storage that slots fill, ``padded`` those that may have zeros between and behind them.
    """

    name: str
    slots: tuple[Slot, ...]
    storages: tuple[int, ...]
    padded: frozenset[int] = frozenset()


def source_of(index: Index, key: Key, where: str) -> Tensor:
    """The tensor that a slot of ``key`` is filled from.  Raises :class:`MissingInputError` where the source has none."""
    tensor = find(index, key)
    if tensor is None:
        raise MissingInputError(
            f"the source has no {key}, which the result needs",
            where=where,
            hint="convert a checkpoint that was saved with the optimizer"
            + (f", or weights alone{aside('mode')}" if key.role != "param" else ""),
        )
    return tensor


def check_box(slot: Slot, tensor: Tensor, where: str) -> None:
    """Refuse a slot that reaches beyond its tensor, but for rows that are padding of the vocabulary."""
    if not tensor.views:  # it would be taken for padding, which is zeros
        raise ValueError(f"{tensor}: nothing tells where it lies")
    origin, shape = slot.box
    if shape == tensor.shape and not any(origin):
        return
    inside = len(origin) == len(shape) == len(tensor.shape) and all(
        start >= 0 and (start + length <= size or (axis == 0 and is_padded(tensor.key.name)))
        for axis, (start, length, size) in enumerate(zip(origin, shape, tensor.shape, strict=True))
    )
    if not inside:
        raise CoverageError(
            f"{tensor}: the result asks for {list(shape)} from {list(origin)} on",
            where=where,
            hint="check the parallel sizes of the target",
        )


def check_filled(file: FileSlots, where: str) -> None:
    """Refuse slots that overlap, reach out of their storage, or leave gaps in one that has no padding."""
    held: dict[int, list[Slot]] = {number: [] for number in range(len(file.storages))}
    for slot in file.slots:
        held[slot.storage].append(slot)
    for number, slots in held.items():
        wrong, nbytes, stop, end, room = None, 0, 0, 0, file.storages[number]
        for slot in sorted(slots, key=attrgetter("start")):
            wrong = wrong or (slot if slot.start < end else None)
            end, width = slot.start + slot.numel, DTYPE_BYTES[slot.dtype]
            nbytes += (end - slot.start) * width
            stop = max(stop, end * width)
        if wrong or stop > room or (nbytes != room and number not in file.padded):
            raise CoverageError(
                f"storage {number} of {file.name} has {room} bytes, and its {len(slots)} slots fill {nbytes} of them"
                + (f"; {wrong.key} overlaps the one before it" if wrong else ""),
                where=where,
                hint="check the parallel sizes of the target",
            )


def check_used(
    index: Index, boxes: Mapping[str, Iterable[Box]], roles: Iterable[Role], ignored: Mapping[Key, str], where: str
) -> None:
    """Refuse a result that leaves out an element of a tensor which is not ``ignored`` for a reason.

    ``boxes`` are what its files hold of each parameter by name, the same of each of ``roles``, but of a buffer, which only the
    weights have.  What several ranks hold in the same box counts once.  Raises :class:`CoverageError`, and
    :class:`MissingInputError` for what the source lacks.
    """
    held: dict[Key, tuple[Box, ...]] = {}
    wanted = tuple(roles)
    for name, found in boxes.items():
        own = tuple(dict.fromkeys(found))
        for role in wanted[:1] if is_buffer(name) else wanted:
            held[source_of(index, Key(role, name), where).key] = own
    proved: set[tuple[Shape, tuple[Box, ...]]] = set()  # thousands of experts are cut alike
    for key, tensor in index.items():
        if key in ignored:
            continue
        if key not in held:
            raise CoverageError(
                f"{tensor} has no place in the result",
                where=where,
                hint=f"check the parallel sizes, and that the model is one that the target can hold{aside('target.format')}",
            )
        if (tensor.shape, held[key]) not in proved:
            check_coverage(tensor._replace(views=_views(held[key], tensor)), where)
            proved.add((tensor.shape, held[key]))


def _views(boxes: Iterable[Box], tensor: Tensor) -> tuple[Stored, ...]:
    whole = (0,) * len(tensor.shape), tensor.shape
    shared = (intersection(box, whole) for box in boxes)
    return tuple(View(*box, dense_strides(box[1]), 0, ()) for box in shared if box)


def weights_alone(index: Index) -> dict[Key, str]:
    """What is ignored where weights alone are converted: moments, and main parameters of weights that are there themselves."""
    return {
        key: "weights alone are converted"
        for key in index
        if key.role.startswith("exp_") or (key.role == "main_param" and Key("param", key.name) in index)
    }
