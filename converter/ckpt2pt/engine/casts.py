"""float32, bfloat16 and float16 into each other, a block at a time, into a buffer of the caller's.

Down is round to nearest even and keeps NaN a NaN (bfloat16: 0x7fc0 and the sign; torch writes one of several, by CPU path);
up is exact.  numpy is loaded by the first block that needs it: it takes as long as copying half a GB.
"""

from __future__ import annotations

from collections.abc import Callable

Cast = Callable[[memoryview, memoryview], None]
"""Convert all elements of the first bytes into the second, which have the exact size."""

_PLAIN = {"float32": "<f4", "float16": "<f2"}


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


def to_bfloat16(source: memoryview, target: memoryview) -> None:
    """float32 -> bfloat16: add half of the last kept bit, and the bit itself, then cut."""
    import numpy as np  # noqa: PLC0415

    bits = np.frombuffer(source, "<u4")
    out = np.frombuffer(target, "<u2")
    rounding = bits >> np.uint32(16)
    rounding &= np.uint32(1)
    rounding += np.uint32(0x7FFF)
    rounding += bits
    # A shift and a narrowing copy are vectorised; taking every second half-word is not, and half as fast.
    rounding >>= np.uint32(16)
    np.copyto(out, rounding, casting="unsafe")
    # The maximum is NaN if the block holds one; rounding could have turned it into infinity.
    if bits.size and np.isnan(bits.view("<f4").max()):
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[nan] = (bits[nan] >> np.uint32(16)).astype("<u2") & np.uint16(0x8000) | np.uint16(0x7FC0)


def from_bfloat16(source: memoryview, target: memoryview) -> None:
    """bfloat16 -> float32: the bits are the upper half."""
    import numpy as np  # noqa: PLC0415

    halves = np.frombuffer(target, "<u2")
    halves[0::2] = 0
    halves[1::2] = np.frombuffer(source, "<u2")


def _plain(source: str, target: str) -> Cast:
    def convert(data: memoryview, out: memoryview) -> None:
        import numpy as np  # noqa: PLC0415

        with np.errstate(over="ignore"):
            to = np.frombuffer(out, _PLAIN[target])
            np.copyto(to, np.frombuffer(data, _PLAIN[source]), casting="same_kind")

    return convert


def _through_float32(source: str, target: str) -> Cast:
    first, second = find_cast(source, "float32"), find_cast("float32", target)

    def convert(data: memoryview, out: memoryview) -> None:
        middle = memoryview(bytearray(2 * len(data)))
        if first and second:
            first(data, middle)
            second(middle, out)

    return convert
