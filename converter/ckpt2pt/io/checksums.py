"""CRC-32 at the speed of the hardware, typed; and the arithmetic that joins checksums without reading a byte again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from isal import isal_zlib  # its stubs leave crc32 half typed

Piece = tuple[int, int, int]
"""(first byte, bytes, CRC-32)"""

crc32 = cast(
    "Callable[[bytes | bytearray | memoryview, int], int]",
    isal_zlib.crc32,  # pyright: ignore[reportUnknownMemberType]
)
"""CRC-32 of a block, continued from that of the blocks before it (0 for none)."""

crc32_combine = isal_zlib.crc32_combine
"""CRC-32 of two joined blocks from both their sums and the length of the second."""


def crc32_of_zeros(nbytes: int) -> int:
    """CRC-32 of ``nbytes`` zero bytes by doubling: no memory, a few dozen steps."""
    crc, power, size = 0, crc32(b"\0", 0), 1
    while nbytes:
        if nbytes & 1:
            crc = crc32_combine(crc, power, size)
        power = crc32_combine(power, power, size)
        size *= 2
        nbytes >>= 1
    return crc


def join(pieces: Sequence[Piece], nbytes: int) -> int:
    """CRC-32 of ``nbytes`` bytes from those of pieces in any order; what no piece covers is zeros."""
    crc = 0
    position = 0
    for start, size, piece in sorted(pieces):
        if start > position:
            crc = crc32_combine(crc, crc32_of_zeros(start - position), start - position)
        crc = crc32_combine(crc, piece, size)
        position = start + size
    if nbytes > position:
        crc = crc32_combine(crc, crc32_of_zeros(nbytes - position), nbytes - position)
    return crc
