"""A file as payloads and the frame around them: what every writer promises the engine, and how a frame is written last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ckpt2pt.core.extents import Extent
from ckpt2pt.io.checksums import crc32, crc32_combine
from ckpt2pt.io.files import write_all


class Layout(Protocol):
    """Where every byte of a file lies: storages that moves fill, and a frame around them."""

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        ...

    @property
    def storages(self) -> int:
        """Number of storages."""
        ...

    def storage_offset(self, index: int, /) -> int:
        """Absolute offset of a storage."""
        ...

    def storage_nbytes(self, index: int, /) -> int:
        """Size of a storage."""
        ...

    def finish(self, fd: int, crcs: Sequence[int], /) -> int:
        """Write the frame, given the CRC-32 of each storage; return that of the whole file."""
        ...


class Payload(Protocol):
    """A file to be written: a ``.pt`` archive, a ``.ckpt``, a ``.safetensors``."""

    @property
    def name(self) -> str:
        """Its name in its folder."""
        ...

    @property
    def mode(self) -> int:
        """Its permissions once it is whole."""
        ...

    @property
    def copied(self) -> Sequence[Extent | bytes]:
        """What fills the last storages as it is: small stretches of a file of metadata, or bytes."""
        ...

    def lay_out(self) -> Layout:
        """Say where every byte lies.  Pure."""
        ...


class Framer:
    """Writes forwards around payloads that are in place; ``crc`` is that of all it has passed, payloads included."""

    __slots__ = ("_crc", "_fd", "_pending", "offset")

    def __init__(self, fd: int) -> None:
        self._fd, self._pending = fd, bytearray()
        self.offset = self._crc = 0

    @property
    def position(self) -> int:
        """Where the next byte goes."""
        return self.offset + len(self._pending)

    @property
    def crc(self) -> int:
        """CRC-32 of every byte so far."""
        return crc32(self._pending, self._crc)

    def put(self, data: bytes | bytearray) -> None:
        """Write ``data`` next.  An ``OSError`` of any method passes through: the caller knows the path."""
        self._pending += data

    def skip(self, nbytes: int, crc: int) -> None:
        """Pass over bytes that are in place and have this CRC-32."""
        if nbytes:
            self.flush()
            self._crc = crc32_combine(self._crc, crc, nbytes)
            self.offset += nbytes

    def flush(self) -> None:
        """Have everything written that was put."""
        self._crc = crc32(self._pending, self._crc)
        with memoryview(self._pending) as view:
            write_all(self._fd, view, self.offset)
        self.offset += len(self._pending)
        self._pending.clear()
