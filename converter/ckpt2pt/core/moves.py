"""Moves: elements that are read once, and where each of them goes.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, Gather, TensorRef
from ckpt2pt.core.plan import Copy, copies, covered

MODEL_FILE = "model_optim_rng.pt"
OPTIM_FILE = "distrib_optim.pt"
OPTIM_KINDS: tuple[str, ...] = ("param", "exp_avg", "exp_avg_sq")


class Sink(NamedTuple):
    """Where a move's elements go: ``start`` elements into a storage of a file, as ``dtype``."""

    file: str
    storage: int
    start: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Elements that are read once and written to every sink.

    ``role`` is that of the tensor; ``first`` is the move's first element inside the tensor.
    """

    name: str
    role: str
    dtype: str
    extents: tuple[Extent, ...]
    first: int
    sinks: tuple[Sink, ...]
    copies: tuple[Copy, ...] = ()
    """Instead of extents, where the elements are not joined stretches of files."""
    numel: int = 0
    """Elements that ``copies`` and the zeros between them make up."""

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        if self.copies:
            return covered(self.copies) * DTYPE_BYTES[self.dtype]
        return sum(extent.nbytes for extent in self.extents)


def in_source_order(found: Iterable[Move]) -> tuple[Move, ...]:
    """Moves by the place of their first byte."""
    return tuple(sorted(found, key=lambda move: (move.extents or move.copies[0].storage)[0]))


def move_of(name: str, role: str, source: TensorRef, first: int, numel: int, sinks: tuple[Sink, ...]) -> Move:
    """A move of ``numel`` elements of a tensor from element ``first`` on."""
    width = DTYPE_BYTES[source.dtype]
    gathered: tuple[Copy, ...] = ()
    if source.gather:
        extents, gathered = _gathered(source.gather, width, first, numel)
    else:
        extents = cut(source.extents, first * width, numel * width)
    return Move(
        name=name,
        role=role,
        dtype=source.dtype,
        extents=extents,
        first=first,
        sinks=sinks,
        copies=gathered,
        numel=numel if gathered else 0,
    )


def _gathered(gather: Gather, width: int, first: int, numel: int) -> tuple[tuple[Extent, ...], tuple[Copy, ...]]:
    """A few runs are joined extents, which is the faster way; many are copies.  Zeros behind the last run are not written."""
    found = tuple(
        piece._replace(target_start=piece.target_start - first)
        for copy in copies(gather)
        for piece in copy.between(first, first + numel)
    )
    joined: list[Extent] = []
    end = 0
    for copy in found:
        if copy.target_start != end or copy.runs > 1:
            return (), found
        joined += cut(copy.storage, copy.source_start * width, copy.run * width)
        end += copy.run
    return tuple(joined), ()


def cut(extents: tuple[Extent, ...], start: int, nbytes: int) -> tuple[Extent, ...]:
    """The ``nbytes`` bytes of joined extents from byte ``start`` on."""
    if not start and len(extents) == 1 and extents[0].nbytes == nbytes > 0:
        return extents
    found: list[Extent] = []
    for extent in extents:
        skip = min(start, extent.nbytes)
        take = min(nbytes, extent.nbytes - skip)
        if take:
            found.append(Extent(extent.path, extent.offset + skip, take))
        start -= skip
        nbytes -= take
    return tuple(found)
