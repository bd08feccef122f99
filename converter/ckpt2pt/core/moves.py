"""RankPlan -> storages of both target files and the moves that fill them.  Pure.

A storage is one contiguous run of elements in a ``.pt`` archive.  ``model_optim_rng.pt`` has one for each weight,
``distrib_optim.pt`` one for each bucket and each of param, exp_avg, exp_avg_sq.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, Gather, TensorRef
from ckpt2pt.core.plan import Copy, copies, covered
from ckpt2pt.core.stage import RankPlan

MODEL_FILE = "model_optim_rng.pt"
OPTIM_FILE = "distrib_optim.pt"
OPTIM_KINDS: tuple[str, ...] = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """``numel`` elements of ``dtype``; ``shape`` is the tensor's that lies in it."""

    dtype: str
    shape: tuple[int, ...]
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes of the record."""
        return self.numel * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sink:
    """Where a move's elements go: ``start`` elements into a storage of a file, as ``dtype``."""

    file: str
    storage: int
    start: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Elements that are read once and written to one sink or two.

    ``role`` is param, exp_avg or exp_avg_sq; ``first`` is the move's first element inside the tensor.
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


def model_storages(plan: RankPlan) -> tuple[Storage, ...]:
    """One storage for each weight, chunk by chunk in registration order."""
    return tuple(Storage(dtype=w.dtype, shape=w.shape, numel=w.source.numel) for w in plan.weights)


def optim_storages(plan: RankPlan) -> tuple[Storage, ...]:
    """Buffers in chunk order; in each: every bucket of param, then of exp_avg, then of exp_avg_sq.  All float32."""
    return tuple(
        Storage(dtype="float32", shape=(bucket.numel,), numel=bucket.numel)
        for chunk in plan.chunks
        if chunk.buffer
        for _ in OPTIM_KINDS
        for bucket in chunk.buffer.buckets
    )


def moves(plan: RankPlan) -> tuple[Move, ...]:
    """Every move of a rank in the order of the source, so that a cold disk is read from front to back."""
    return in_source_order(move for move in _moves(plan) if move.nbytes)


def in_source_order(found: Iterable[Move]) -> tuple[Move, ...]:
    """Moves by the place of their first byte."""
    return tuple(sorted(found, key=lambda move: (move.extents or move.copies[0].storage)[0]))


def _moves(plan: RankPlan) -> Iterator[Move]:
    model_storage = 0
    first_storage = 0
    for chunk in plan.chunks:
        buckets = chunk.buffer.buckets if chunk.buffer else ()
        homes = {
            p.name: (number, p.start - bucket.start) for number, bucket in enumerate(buckets) for p in bucket.placements
        }
        for weight in chunk.weights:
            roles = OPTIM_KINDS if weight.moments else OPTIM_KINDS[:1]
            sources = dict(zip(OPTIM_KINDS, (weight.source, *(weight.moments or ())), strict=False))
            for kind, role in enumerate(roles):
                source = sources[role]
                targets: list[Sink] = []
                if role == "param":
                    targets.append(Sink(file=MODEL_FILE, storage=model_storage, start=0, dtype=weight.dtype))
                if weight.name in homes:
                    number, start = homes[weight.name]
                    storage = first_storage + kind * len(buckets) + number
                    targets.append(Sink(file=OPTIM_FILE, storage=storage, start=start, dtype="float32"))
                yield move_of(weight.name, role, source, 0, source.numel, tuple(targets))
            model_storage += 1
        first_storage += len(OPTIM_KINDS) * len(buckets)


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
    found: list[Extent] = []
    for extent in extents:
        skip = min(start, extent.nbytes)
        take = min(nbytes, extent.nbytes - skip)
        if take:
            found.append(Extent(extent.path, extent.offset + skip, take))
        start -= skip
        nbytes -= take
    return tuple(found)
