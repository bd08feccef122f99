"""``.distcp`` files to be written: chunks of global tensors, each an archive of torch.save, one after the other.

    parts --lay_out--> RowLayout --storage_offset(k)--> the engine puts the elements of part k there
                           '-- finish(fd, crcs) -->     the frames of all archives

torch/distributed/checkpoint/filesystem.py (torch 2.3 to 2.15), ``_write_item``: tensors and objects are saved by themselves,
and ``.metadata`` says from which byte on and how long each is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, Shape
from ckpt2pt.formats.torch_dist.metadata import Chunk, Item
from ckpt2pt.formats.torchfile import archive
from ckpt2pt.formats.torchfile.archive import ALIGNMENT, archive_bytes
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import tensor
from ckpt2pt.io.framing import Framer

_STEM = "archive"  # what torch calls an archive that it writes into a stream


class Part(NamedTuple):
    """A box of the tensor ``key``, in C order; ``whole`` is the shape of all of it."""

    key: str
    dtype: str
    whole: Shape
    origin: Shape
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Place(NamedTuple):
    """Where an archive lies in its file."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Archives one after the other: each of one storage, then objects, which are all the same bytes."""

    archives: tuple[archive.Layout, ...]
    places: tuple[Place, ...]
    """Of the archives, and of the objects behind them."""
    last: bytes

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return sum(self.places[-1]) if self.places else 0

    @property
    def storages(self) -> int:
        """Number of storages: one for each archive."""
        return len(self.archives)

    def storage_offset(self, index: int) -> int:
        """Absolute offset of the elements of a part."""
        return self.places[index].offset + self.archives[index].storage_offset(0)

    def storage_nbytes(self, index: int) -> int:
        """Size of the elements of a part."""
        return self.archives[index].storage_nbytes(0)

    def finish(self, fd: int, crcs: Sequence[int]) -> int:
        """Write all but the elements, whose CRC-32 are given; return that of the whole file."""
        out = Framer(fd)
        for number, place in enumerate(self.places):
            out.put(bytes(place.offset - out.position))
            if number < len(self.archives):
                archive.frame(out, self.archives[number], [crcs[number]])
            else:
                out.put(self.last)
        out.flush()
        assert out.offset == self.nbytes, "archives and layout disagree"
        return out.crc


@dataclass(frozen=True, slots=True, kw_only=True)
class DistcpFile:
    """A ``.distcp`` to be written: ``parts`` are filled by moves, each of ``objects`` is ``[None]``."""

    name: str
    parts: tuple[Part, ...]
    objects: tuple[str, ...] = ()
    mode: int = 0o644

    @property
    def copied(self) -> tuple[Extent, ...]:
        """Nothing: every storage is filled by moves."""
        return ()

    def lay_out(self) -> RowLayout:
        """Lay the archives end to end.  Pure.  Each begins on a multiple of 64 bytes, as elements inside archives do."""
        archives = tuple(_archive(part.dtype, part.shape) for part in self.parts)
        places: list[Place] = []
        end = 0
        for nbytes in (*(one.nbytes for one in archives), *(len(no_object()) for _ in self.objects)):
            start = -(-end // ALIGNMENT) * ALIGNMENT
            places.append(Place(start, nbytes))
            end = start + nbytes
        return RowLayout(archives, tuple(places), no_object())

    def chunks(self) -> Iterator[tuple[Part, Chunk]]:
        """Every part, with the item that holds it."""
        for part, place in zip(self.parts, self.lay_out().places, strict=False):
            yield part, Chunk(part.origin, part.shape, Item(self.name, *place))

    def items(self) -> Iterator[tuple[str, Item]]:
        """Every object, with the item that holds it."""
        places = self.lay_out().places[len(self.parts) :]
        for key, place in zip(self.objects, places, strict=True):
            yield key, Item(self.name, *place)


@lru_cache(1024)
def _archive(dtype: str, shape: Shape) -> archive.Layout:
    """The archive of a tensor; layers have the same few shapes."""
    numel = math.prod(shape)
    pickle = write_pickle(tensor(dtype, "0", numel, 0, shape), check=False)
    return archive.lay_out(_STEM, pickle, [numel * DTYPE_BYTES[dtype]])


@lru_cache(1)
def no_object() -> bytes:
    """``torch.save([None])``: what Megatron-LM saves of a module that has no state of its own (``ShardedObject``)."""
    return archive_bytes(_STEM, write_pickle([None]))
