"""Where Megatron-LM 0.6 to 0.19 puts each parameter of a model chunk: the param map, computed instead of captured.  Pure.

Megatron-LM, megatron/core/distributed/param_and_grad_buffer.py (``ParamAndGradBuffer.__init__``; since 0.18
core/optimizer/distrib_optimizer.py, ``_compute_per_buffer_param_layout``) and distributed_data_parallel.py: one buffer for
each type of parameter, filled in reverse order of registration; a bucket ends when it has ``bucket_numel`` elements, a
shared embedding has one of its own, and each is padded.  What differs between releases is a :class:`Policy`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

from ckpt2pt.core.buckets import Bucket, Buffer, Placement
from ckpt2pt.errors import InputError, aside

BUCKET_NUMEL = 40_000_000
"""Elements after which Megatron-LM 0.6 ends a bucket (``DistributedDataParallel.__init__``; there is no flag)."""
BUCKET_NUMEL_A_RANK = 1_000_000
"""Since 0.7 the same, or as many for each data-parallel rank if that is more."""
BUSBW_BASE = 1 << 16
"""Instead of :attr:`Policy.base` with ``--ddp-pad-buckets-for-high-nccl-busbw`` (since 0.12)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a family of releases fills a buffer; numbers are elements.

    A parameter begins at a multiple of ``align``, a bucket at one of the least common multiple of ``base`` and the
    data-parallel size.  The bucket before a shared embedding ends where it is filled: ``moves_on`` says that the embedding
    then begins where a bucket may begin, ``fills_up`` that the bucket counts its padding where the size does not divide it.
    Without either a release stops, or writes what it cannot read, where a bucket cannot begin there.  ``coalesced``:
    ``distrib_optim.pt`` holds a buffer as one tensor, without the padding behind its buckets.
    """

    releases: str
    align: int = 1
    base: int = 1
    fills_up: bool = False
    moves_on: bool = False
    coalesced: bool = True


MEGATRON_06 = Policy(releases="0.6", coalesced=False)
COALESCED = (
    Policy(releases="0.13 to 0.19", align=64, base=128, moves_on=True),
    Policy(releases="0.9 to 0.12", align=64, base=128, fills_up=True),
    Policy(releases="0.8", align=64, base=128),
    Policy(releases="0.7", base=128),
)
"""Newest first."""


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


class Shaped(Protocol):
    """Anything with the name and the shape of a parameter."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102


def weight_decay_groups(parameters: Iterable[Shaped]) -> tuple[bool, ...]:
    """Whether the weights of each parameter group decay, in Megatron's order: that of the groups' first parameters.

    Biases and vectors do not (core/optimizer/__init__.py, ``_get_param_groups``).  ``parameters`` are those of all
    chunks of a rank in order of registration.
    """
    kinds = (not (one.name.endswith(".bias") or len(one.shape) == 1) for one in parameters)
    return tuple(dict.fromkeys(kinds))


def bucket_numel(*, overlap: bool, pp: int, chunk: int, size: int | None = None) -> int | None:
    """When a bucket of this chunk ends; None for never: no ``--overlap-grad-reduce``, a later stage or a later chunk.

    ``size`` replaces the built-in number: of a Megatron that was changed, or of ``--ddp-bucket-size``.
    """
    return (size or BUCKET_NUMEL) if overlap and not pp and not chunk else None


def lay_out(
    parameters: Sequence[Parameter], *, divisor: int, bucket_numel: int | None, policy: Policy = MEGATRON_06
) -> tuple[Buffer, ...]:
    """The buffers of one chunk, one for each type in order of its first parameter.

    ``parameters`` are in order of registration; ``divisor`` is the size of the data x context parallel group.  Raises
    :class:`InputError` for a layout at which Megatron-LM itself stops.
    """
    types = dict.fromkeys(parameter.dtype for parameter in parameters)
    return tuple(
        _buffer([p for p in parameters if p.dtype == dtype], dtype, divisor, bucket_numel, policy) for dtype in types
    )


def _buffer(
    parameters: Sequence[Parameter], dtype: str, divisor: int, bucket_numel: int | None, policy: Policy
) -> Buffer:
    buckets: list[Bucket] = []
    held: list[Placement] = []
    start = at = 0
    multiple = math.lcm(divisor, policy.base)

    def close(stop: int) -> int:
        nonlocal start
        padded = _up(stop, multiple)
        buckets.append(
            Bucket(
                index=len(buckets),
                start=start,
                placements=tuple(held),
                numel=padded - start,
                filled=stop - start if stop > held[-1].stop else 0,
                gaps=policy.align > 1,
            )
        )
        held.clear()
        start = padded
        return padded

    for parameter in reversed(parameters):
        at = _up(at, policy.align)
        if parameter.shared and held:
            if policy.fills_up and at % divisor:
                at = _up(at, multiple)
            if at % multiple and not policy.moves_on:
                raise InputError(
                    f"the bucket before the shared {parameter.name} ends at element {at}, which a data-parallel group of {divisor} "
                    f"pads to a multiple of {multiple}: Megatron-LM {policy.releases} stops there",
                    where="the layout of the optimizer's buffer",
                    hint=f"choose a data-parallel size that divides it{aside('target.dataParallel')}, or untie the embeddings",
                )
            at = close(at)
        stop = at + parameter.numel
        held.append(Placement(name=parameter.name, shape=parameter.shape, start=at, stop=stop))
        full = bucket_numel is not None and stop - start >= bucket_numel
        at = close(stop) if full or parameter.shared else stop
    if held:
        close(at)
    return Buffer(dtype=dtype, buckets=tuple(buckets))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def coalesce(buffer: Buffer) -> Buffer:
    """A buffer as ``distrib_optim.pt`` of 0.7 and newer holds it: one bucket, without the padding behind each bucket.

    Megatron-LM, megatron/core/optimizer/distrib_optimizer.py, ``get_parameter_state_dp_zero``.
    """
    ends = [*accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)]
    placements = tuple(
        replace(placed, start=placed.start + shift, stop=placed.stop + shift)
        for bucket, begin in zip(buffer.buckets, ends, strict=False)
        for shift in (begin - bucket.start,)
        for placed in bucket.placements
    )
    whole = Bucket(index=0, start=0, placements=placements, numel=ends[-1], filled=ends[-1], gaps=True)
    return replace(buffer, buckets=(whole,))


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
