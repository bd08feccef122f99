"""Entries of MindSpore files whose elements lie in a file, and the moves that fill them."""

from __future__ import annotations

from collections.abc import Iterable

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.fill import moves_of
from ckpt2pt.core.moves import Move
from ckpt2pt.core.tensor import Key, local_tensor
from ckpt2pt.formats.mindspore.entries import Entry, TensorBox
from ckpt2pt.formats.mindspore.writer import MindSporeFile


def entry_of(ref: TensorRef, dtype: str = "") -> Entry:
    """All of a tensor, in its own type unless ``dtype`` is given."""
    box = (0,) * len(ref.shape), ref.shape
    return Entry(
        name=ref.name, dtype=dtype or ref.dtype, shape=ref.shape, source=TensorBox(Key("param", ref.name), box)
    )


def moves_into(file: MindSporeFile, refs: Iterable[TensorRef]) -> tuple[Move, ...]:
    """What fills a file with tensors."""
    keys = {Key("param", ref.name): ref for ref in refs}
    index = {key: local_tensor(key, ref.dtype, ref.shape, ref.extents) for key, ref in keys.items()}
    return moves_of(index, [file.slots()], "here")
