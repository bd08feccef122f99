"""``.safetensors`` to be written: whole tensors, each made of parts of the source, in files of at most 5 GB.

weights --divided--> those of a file --ShardFile.lay_out--> header, data; the engine puts the elements that slots name there
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, Shape
from ckpt2pt.core.index import Index
from ckpt2pt.core.slots import FileSlots, Slot
from ckpt2pt.core.tensor import Tensor
from ckpt2pt.io.framing import Framer

SHARD_BYTES = 5 * 10**9
"""As transformers 4 divides what it saves (transformers 4.57.6, src/transformers/modeling_utils.py, ``save_pretrained``)."""
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ALIGNMENT = 8
"""Data begins on a multiple of this (huggingface/safetensors, tensor.rs, ``serialize``)."""


class Weight(NamedTuple):
    """A tensor of the result; ``parts`` follow each other in it, each in C order of its own axes.  Without any it is zeros."""

    name: str
    dtype: str
    shape: Shape
    parts: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The header, and behind it every tensor."""

    header: bytes
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(self.sizes)

    @property
    def storages(self) -> int:
        """Number of tensors."""
        return len(self.sizes)

    def storage_offset(self, index: int) -> int:
        """Absolute offset of a tensor."""
        return self.offsets[index]

    def storage_nbytes(self, index: int) -> int:
        """Size of a tensor."""
        return self.sizes[index]

    def finish(self, fd: int, crcs: Sequence[int]) -> int:
        """Write the header; return the CRC-32 of the whole file."""
        out = Framer(fd)
        out.put(self.header)
        for nbytes, crc in zip(self.sizes, crcs, strict=True):
            out.skip(nbytes, crc)
        out.flush()
        return out.crc


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A file to be written; ``program`` is what its metadata says wrote it: torch, which transformers 4 asks for, or MindSpore."""

    name: str
    weights: tuple[Weight, ...]
    program: Literal["pt", "ms"] = "pt"
    mode: int = 0o644

    @property
    def copied(self) -> tuple[Extent, ...]:
        """Nothing: every storage is filled by moves, or is zeros."""
        return ()

    def lay_out(self) -> ShardLayout:
        """Lay the header out and the data behind it.  Pure."""
        header: dict[str, object] = {"__metadata__": {"format": self.program}}
        starts: list[int] = []
        at = 0
        for weight in self.weights:
            starts.append(at)
            at += weight.nbytes
            header[weight.name] = {
                "dtype": _DTYPES[weight.dtype],
                "shape": list(weight.shape),
                "data_offsets": [starts[-1], at],
            }
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % _ALIGNMENT)
        raw = len(raw).to_bytes(8, "little") + raw
        offsets = tuple(len(raw) + start for start in starts)
        return ShardLayout(raw, offsets, tuple(weight.nbytes for weight in self.weights))

    def slots(self) -> FileSlots:
        """What fills it."""
        found: list[Slot] = []
        for number, weight in enumerate(self.weights):
            start = 0
            for part in weight.parts:
                found.append(Slot(part.key, weight.dtype, number, start, ((0,) * len(part.shape), part.shape)))
                start += part.numel
        return FileSlots(
            name=self.name,
            slots=tuple(found),
            storages=tuple(weight.nbytes for weight in self.weights),
            padded=frozenset(number for number, weight in enumerate(self.weights) if not weight.parts),
        )

    def index(self) -> Index:
        """The tensors that slots name."""
        return {part.key: part for weight in self.weights for part in weight.parts}


def divided(weights: Iterable[Weight], limit: int = SHARD_BYTES) -> list[tuple[Weight, ...]]:
    """Those of each file, at most ``limit`` bytes but for a tensor that is larger; none is cut.

    The widest types come first in a file, so that each tensor is aligned.
    """
    found: list[list[Weight]] = [[]]
    room = limit
    for weight in weights:
        if found[-1] and weight.nbytes > room:
            found.append([])
            room = limit
        found[-1].append(weight)
        room -= weight.nbytes
    return [tuple(sorted(held, key=lambda one: -DTYPE_BYTES[one.dtype])) for held in found]
