"""Where Megatron-LM 0.6 puts each parameter of a model chunk: the param map, computed instead of captured.  Pure.

Megatron-LM cac60ce4, megatron/core/distributed/param_and_grad_buffer.py (``ParamAndGradBuffer.__init__``) and
distributed_data_parallel.py: one buffer for each type of parameter, filled in reverse order of registration; a bucket
ends when it has ``bucket_numel`` elements, a shared embedding has one of its own, and each is padded to a multiple of
the data-parallel group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckpt2pt.core.buckets import Bucket, Buffer, Placement
from ckpt2pt.core.extents import TensorRef
from ckpt2pt.errors import InputError, aside

BUCKET_NUMEL = 40_000_000
"""Elements after which Megatron-LM 0.6 ends a bucket (``DistributedDataParallel.__init__``; there is no flag)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a chunk; ``shared`` marks an embedding that the first and the last stage both hold."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shared: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_decay_groups(parameters: Iterable[Parameter | Placement | TensorRef]) -> tuple[bool, ...]:
    """Whether the weights of each parameter group decay, in Megatron's order: that of the groups' first parameters.

    Biases and vectors do not (core/optimizer/__init__.py, ``_get_param_groups``).  ``parameters`` are those of all
    chunks of a rank in order of registration.
    """
    kinds = (not (one.name.endswith(".bias") or len(one.shape) == 1) for one in parameters)
    return tuple(dict.fromkeys(kinds))


def bucket_numel(*, overlap: bool, pp: int, chunk: int, size: int | None = None) -> int | None:
    """When a bucket of this chunk ends; None for never: no ``--overlap-grad-reduce``, a later stage or a later chunk.

    ``size`` replaces the built-in number, for a Megatron that was changed.
    """
    return (size or BUCKET_NUMEL) if overlap and not pp and not chunk else None


def lay_out(parameters: Sequence[Parameter], *, divisor: int, bucket_numel: int | None) -> tuple[Buffer, ...]:
    """The buffers of one chunk, one for each type in order of its first parameter.

    ``parameters`` are in order of registration; ``divisor`` is the size of the data x context parallel group.  Raises
    :class:`InputError` for a layout at which Megatron-LM 0.6 itself stops.
    """
    types = dict.fromkeys(parameter.dtype for parameter in parameters)
    return tuple(_buffer([p for p in parameters if p.dtype == dtype], dtype, divisor, bucket_numel) for dtype in types)


def _buffer(parameters: Sequence[Parameter], dtype: str, divisor: int, bucket_numel: int | None) -> Buffer:
    buckets: list[Bucket] = []
    held: list[Placement] = []
    start = at = 0

    def close(stop: int) -> int:
        nonlocal start
        padded = -(-stop // divisor) * divisor
        buckets.append(Bucket(index=len(buckets), start=start, placements=tuple(held), numel=padded - start))
        held.clear()
        start = padded
        return padded

    for parameter in reversed(parameters):
        if parameter.shared and held:
            if at % divisor:
                raise InputError(
                    f"the bucket before the shared {parameter.name} ends at element {at}, "
                    f"which a data-parallel group of {divisor} does not divide: Megatron-LM 0.6 stops there",
                    where="the layout of the optimizer's buffer",
                    hint=f"choose a data-parallel size that divides it{aside('target.dataParallel')}, or untie the embeddings",
                )
            close(at)
        stop = at + parameter.numel
        held.append(Placement(name=parameter.name, shape=parameter.shape, start=at, stop=stop))
        full = bucket_numel is not None and stop - start >= bucket_numel
        at = close(stop) if full or parameter.shared else stop
    if held:
        close(at)
    return Buffer(dtype=dtype, buckets=tuple(buckets))


def find_bucket_numel(
    parameters: Sequence[Parameter], *, divisor: int, unpadded: Sequence[Sequence[int]]
) -> int | None:
    """The smallest size of bucket that gives these sizes for each buffer; None when no size does.

    A bucket that was ended by its size is itself a size that ends it there.
    """
    for size in sorted({numel for sizes in unpadded for numel in sizes}):
        try:
            buffers = lay_out(parameters, divisor=divisor, bucket_numel=size)
        except InputError:
            continue
        if [[bucket.numel_unpadded for bucket in buffer.buckets] for buffer in buffers] == [*map(list, unpadded)]:
            return size
    return None


def param_map(buffer: Buffer) -> dict[str, list[object]]:
    """The document that ``parse_param_map`` reads, as the patched Megatron writes it.

    ``module.`` is the prefix of Megatron's half-precision wrapper; a pure float32 model has none.
    """
    prefix = "" if buffer.dtype == "float32" else "module."
    return {
        f"{prefix}{placement.name}": [
            f"torch.{buffer.dtype}",
            list(placement.shape),
            placement.start,
            placement.stop,
            bucket.index,
        ]
        for bucket in buffer.buckets
        for placement in bucket.placements
    }
