"""float32, bfloat16 and float16 into each other, a block at a time, into a buffer of the caller's.

Down is round to nearest even and keeps NaN a NaN (bfloat16: 0x7fc0 and the sign; torch writes one of several, by CPU path);
up is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Cast = Callable[["npt.NDArray[np.uint8]", "npt.NDArray[np.uint8]"], None]
"""Convert all elements of the first array of bytes into the second, which has the exact size."""

_PLAIN: dict[str, np.dtype[np.float32] | np.dtype[np.float16]] = {
    "float32": np.dtype(np.float32).newbyteorder("<"),
    "float16": np.dtype(np.float16).newbyteorder("<"),
}


def find_cast(source: str, target: str) -> Cast | None:
    """The conversion between two types, None when the bytes are the same."""
    if source == target:
        return None
    if source == "float32" and target == "bfloat16":
        return to_bfloat16
    if source == "bfloat16" and target == "float32":
        return from_bfloat16
    if "bfloat16" in {source, target}:
        return _through_float32(source, target)
    return _plain(source, target)


def to_bfloat16(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
    """float32 -> bfloat16: add half of the last kept bit, and the bit itself, then cut."""
    bits = source.view("<u4")
    out = target.view("<u2")
    rounding = bits >> np.uint32(16)
    rounding &= np.uint32(1)
    rounding += np.uint32(0x7FFF)
    rounding += bits
    # A shift and a narrowing copy are vectorised; taking every second half-word is not, and half as fast.
    rounding >>= np.uint32(16)
    np.copyto(out, rounding, casting="unsafe")
    # Two cheap maxima tell whether the block holds a NaN at all; rounding could have turned one into infinity.
    if bits.size and (source.view("<i4").max() > 0x7F800000 or bits.max() > 0xFF800000):
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[nan] = (bits[nan] >> np.uint32(16)).astype("<u2") & np.uint16(0x8000) | np.uint16(0x7FC0)


def from_bfloat16(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
    """bfloat16 -> float32: the bits are the upper half."""
    halves = target.view("<u2")
    halves[0::2] = 0
    halves[1::2] = source.view("<u2")


def _plain(source: str, target: str) -> Cast:
    def convert(data: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> None:
        with np.errstate(over="ignore"):
            np.copyto(out.view(_PLAIN[target]), data.view(_PLAIN[source]), casting="same_kind")

    return convert


def _through_float32(source: str, target: str) -> Cast:
    first, second = find_cast(source, "float32"), find_cast("float32", target)

    def convert(data: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8]) -> None:
        middle = np.empty(2 * data.size, np.uint8)
        if first and second:
            first(data, middle)
            second(middle, out)

    return convert
