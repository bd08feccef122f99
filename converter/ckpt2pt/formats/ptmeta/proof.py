"""Prove a computed layout against a checkpoint that Megatron wrote: sizes first, then every slice against its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.extents import DTYPE_BYTES, TensorRef
from ckpt2pt.core.progress import Advance, no_progress
from ckpt2pt.engine.casts import find_cast
from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.megatron.distributed import StoredBucket
from ckpt2pt.io.files import OpenFiles, read_at

_BLOCK_NUMEL = 1 << 17
_HINT = (
    "make sure that both files are of one checkpoint of Megatron-LM 0.6, saved with --use-distributed-optimizer; "
    f"give {ref('bucketSize')} if that Megatron's number of elements for a bucket was changed"
)


def check_sizes(buffer: Buffer, stored: Sequence[StoredBucket], *, where: str) -> None:
    """Compare the buckets with the header, padded and unpadded."""
    computed = [(bucket.numel_unpadded, bucket.numel) for bucket in buffer.buckets]
    found = [(bucket.numel_unpadded, bucket.numel) for bucket in stored]
    if computed != found:
        raise FormatError(
            f"the buckets are {_few(found)} (elements, padded); computed are {_few(computed)}", where=where, hint=_HINT
        )


def check_views(buffer: Buffer, weights: Sequence[tuple[str, TensorRef]], *, where: str) -> bool:
    """Compare offsets where the weights of the model file are views into one storage, as in Megatron's own files.

    Returns False when each has a storage of its own, as in converted files, and nothing can be said.
    """
    homes = {placement.name: placement for placement in buffer.placements}
    width = DTYPE_BYTES[buffer.dtype]
    found = [(homes[name], ref) for name, ref in weights if name in homes and ref.extents]
    bases = {ref.extents[0].offset - placement.start * width for placement, ref in found}
    if len(bases) == 1:
        return len(found) > 1
    spread = max(ref.extents[0].offset for _, ref in found) - min(ref.extents[0].offset for _, ref in found)
    if spread + DTYPE_BYTES[buffer.dtype] * max(p.stop - p.start for p, _ in found) <= buffer.numel * width:
        raise FormatError("the weights lie in the model file in another order", where=where, hint=_HINT)
    return False


def check_slices(
    buffer: Buffer,
    stored: Sequence[StoredBucket],
    weights: Sequence[tuple[str, TensorRef]],
    *,
    where: str,
    at_most: int | None = None,
    advance: Advance = no_progress,
    files: OpenFiles | None = None,
) -> int:
    """Compare every float32 slice, rounded, with the weight of the model file; returns the elements compared.

    ``at_most`` elements at the beginning, in the middle and at the end of each weight are enough to know whether the two
    files belong together, and in which order the weights lie.  ``advance`` is called with every byte that was read.
    """
    refs = dict(weights)
    count = 0
    with ExitStack() as stack:
        read = _reader(files or stack.enter_context(OpenFiles()), advance)
        for bucket, held in zip(buffer.buckets, stored, strict=True):
            for placement in bucket.placements:
                param = held.tensors["param"]
                start, weight = placement.start - bucket.start, refs[placement.name]
                count += _check_slice(weight, param, start, at_most, read, where)
    return count


def check_copies(
    copies: Mapping[str, Mapping[str, TensorRef]],
    weights: Sequence[tuple[str, TensorRef]],
    *,
    where: str,
    at_most: int | None,
) -> int:
    """The same for float32 copies that are tensors of their own, of a run without the distributed optimizer."""
    count = 0
    with ExitStack() as stack:
        read = _reader(stack.enter_context(OpenFiles()), no_progress)
        for name, weight in weights:
            count += _check_slice(weight, copies[name]["param"], 0, at_most, read, where)
    return count


_Read = Callable[[TensorRef, int, int], "npt.NDArray[np.uint8]"]


def _check_slice(weight: TensorRef, param: TensorRef, start: int, at_most: int | None, read: _Read, where: str) -> int:
    """Compare elements of ``param`` from ``start`` on, rounded, with those of ``weight``; how many."""
    width, stretches = DTYPE_BYTES[weight.dtype], _stretches(weight.numel, at_most)
    for first, size in stretches:
        main = read(param, (start + first) * 4, size * 4)
        if not rounds_to(main, read(weight, first * width, size * width), weight.dtype):
            raise FormatError(
                f"{weight.name} is not what the optimizer holds of it, from element {start} on",
                where=where,
                hint=_HINT,
            )
    return sum(size for _, size in stretches)


def _stretches(numel: int, at_most: int | None) -> Sequence[tuple[int, int]]:
    """First element and size of what is compared: three samples, or everything, a block at a time."""
    if at_most is not None and 3 * at_most < numel:
        return [(first, at_most) for first in (0, (numel - at_most) // 2, numel - at_most)]
    return [(first, min(_BLOCK_NUMEL, numel - first)) for first in range(0, numel, _BLOCK_NUMEL)]


def rounds_to(main: npt.NDArray[np.uint8], weight: npt.NDArray[np.uint8], dtype: str) -> bool:
    """Whether float32 elements, rounded, are those of a weight of type ``dtype``, byte by byte."""
    cast, rounded, width = find_cast("float32", dtype), main, DTYPE_BYTES[dtype]
    if cast is not None:
        rounded = np.empty(len(main) // 4 * width, np.uint8)
        cast(main.data, rounded.data)
    return np.array_equal(rounded, weight) or _same_but_nan(rounded, weight, main, width)


def _same_but_nan(
    one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8], main: npt.NDArray[np.uint8], width: int
) -> bool:
    """A NaN is rounded to one of several by different CPUs."""
    rows = (one.reshape(-1, width) != other.reshape(-1, width)).any(axis=1)
    return bool(np.isnan(main.view("<f4")[rows]).all())


def _reader(files: OpenFiles, advance: Advance) -> _Read:
    def read(ref: TensorRef, start: int, nbytes: int) -> npt.NDArray[np.uint8]:
        extent, data = ref.extents[0], np.empty(nbytes, np.uint8)
        read_at(files.get(extent.path)[0], data.data, extent.offset + start, extent.path)
        advance(nbytes)
        return data

    return read


def _few(items: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{numel} ({padded})" for numel, padded in items[:4])
    return shown + (f" and {len(items) - 4} more" if len(items) > 4 else "")
