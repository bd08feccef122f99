"""Write MindSpore's own files: laid out before a byte of payload is known, filled by moves, finished around them.

    entries --lay_out--> Layout --storage_offset(i)--> the engine puts slices there, in any order
                           '-- finish(fd, crcs) -->    names, types, shapes, small values, checksum

A ``.ckpt`` is what mindspore 2.10.0 writes for the same parameters in the same order, byte for byte
(``mindspore/train/serialization.py``, ``_exec_save``: entries of more than 512 MiB in slices of exactly that many bytes).
A ``.safetensors`` is what the safetensors library lays out for it: widest types first, then by name.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Extent
from ckpt2pt.core.slots import FileSlots
from ckpt2pt.errors import InputError, aside
from ckpt2pt.formats.mindspore.entries import Entry, slices, slots_of
from ckpt2pt.io.framing import Framer

SLICE_BYTES = 512 << 20
"""An entry of more is cut (mindspore 2.10.0, serialization.py, ``_exec_save``)."""

FILE_MODE = 0o400
"""What mindspore leaves a finished checkpoint with."""

_TRAILER_MARK, _TRAILER_BYTES = b"crc_num", 17
_CKPT_DTYPES = {
    "bool": "Bool", "int4": "Int4", "int8": "Int8", "uint8": "UInt8", "int16": "Int16", "uint16": "UInt16",
    "int32": "Int32", "uint32": "UInt32", "int64": "Int64", "uint64": "UInt64", "float16": "Float16",
    "bfloat16": "BFloat16", "float32": "Float32", "float64": "Float64", "str": "str",
}  # fmt: skip
_SAFE_DTYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32", "int32": "I32",
    "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16", "int8": "I8", "int4": "I8", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
"""In the order in which the library lays the data out (huggingface/safetensors, tensor.rs, ``prepare``)."""

_SAFE_ORDER = {spelled: number for number, spelled in enumerate(dict.fromkeys(_SAFE_DTYPES.values()))}
_RESERVED = ("__metadata__", "format", "crc_num", "remove_redundancy")


class _Stretch(NamedTuple):
    """Bytes that are known, then the storage that follows them, None when none does."""

    frame: bytes
    storage: int | None


@dataclass(frozen=True, slots=True)
class MindSporeLayout:
    """Where each storage of a file lies, and everything around them."""

    stretches: tuple[_Stretch, ...]
    places: tuple[Extent, ...]
    nbytes: int
    """Size of the whole file."""
    crc: bool = False

    @property
    def storages(self) -> int:
        """Number of storages: slices of streamed entries."""
        return len(self.places)

    def storage_offset(self, index: int) -> int:
        """Absolute offset of a storage."""
        return self.places[index].offset

    def storage_nbytes(self, index: int) -> int:
        """Size of a storage."""
        return self.places[index].nbytes

    def finish(self, fd: int, crcs: Sequence[int]) -> int:
        """Write what is around the storages, whose CRC-32 are given; return the CRC-32 of the whole file."""
        out = Framer(fd)
        for frame, storage in self.stretches:
            out.put(frame)
            if storage is not None:
                out.skip(self.places[storage].nbytes, crcs[storage])
        if self.crc:
            out.put(_TRAILER_MARK + out.crc.to_bytes(_TRAILER_BYTES - len(_TRAILER_MARK), "big"))
        out.flush()
        if out.offset != self.nbytes:
            raise AssertionError(f"{out.offset} bytes written, {self.nbytes} laid out")
        return out.crc


@dataclass(frozen=True, slots=True, kw_only=True)
class CkptFile:
    """A ``.ckpt`` to be written; ``crc`` adds the trailer of ``crc_check=True``."""

    name: str
    entries: tuple[Entry, ...]
    crc: bool = False
    slice_bytes: int = SLICE_BYTES
    mode: int = FILE_MODE

    @property
    def copied(self) -> tuple[Extent, ...]:
        """Nothing: every storage is filled by moves."""
        return ()

    def lay_out(self) -> MindSporeLayout:
        """Lay the entries end to end.  Pure.  ``ValueError`` for entries that contradict themselves."""
        _check(self.entries, _CKPT_DTYPES)
        stretches: list[_Stretch] = []
        places: list[Extent] = []
        pending, offset = b"", 0
        for entry in self.entries:
            # mindspore 2.10.0 does not join the slices of a text.
            for start, nbytes in slices(entry.nbytes, None if entry.dtype == "str" else self.slice_bytes):
                pending += _entry_head(entry, nbytes)
                if isinstance(entry.source, bytes):
                    pending += entry.source[start : start + nbytes]
                    continue
                offset += len(pending)
                stretches.append(_Stretch(pending, len(places)))
                places.append(Extent(self.name, offset, nbytes))
                pending, offset = b"", offset + nbytes
        stretches.append(_Stretch(pending, None))
        nbytes = offset + len(pending) + (_TRAILER_BYTES if self.crc else 0)
        return MindSporeLayout(tuple(stretches), tuple(places), nbytes, self.crc)

    def slots(self) -> FileSlots:
        """What fills the storages."""
        return slots_of(self.name, self.entries, self.slice_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsFile:
    """A ``.safetensors`` to be written.  It has no checksum: mindspore itself cannot save one beside bfloat16."""

    name: str
    entries: tuple[Entry, ...]
    mode: int = FILE_MODE

    @property
    def copied(self) -> tuple[Extent, ...]:
        """Nothing: every storage is filled by moves."""
        return ()

    def lay_out(self) -> MindSporeLayout:
        """Lay the header out and the data behind it.  Pure.

        Raises :class:`InputError` for names and types that the format, or mindspore reading it, cannot take.
        """
        _check_safe(self.entries, self.name)
        _check(self.entries, _SAFE_DTYPES)
        order = sorted(self.entries, key=lambda entry: (_SAFE_ORDER[_SAFE_DTYPES[entry.dtype]], entry.name.encode()))
        texts = {entry.name: "Int4" for entry in self.entries if entry.dtype == "int4"} | {"format": "ms"}
        header: dict[str, object] = {"__metadata__": texts}
        at = 0
        for entry in order:
            spelled = _SAFE_DTYPES[entry.dtype]
            header[entry.name] = {
                "dtype": spelled,
                "shape": list(entry.shape),
                "data_offsets": [at, at + entry.nbytes],
            }
            at += entry.nbytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        return self._place(order, len(raw).to_bytes(8, "little") + raw)

    def _place(self, order: Sequence[Entry], head: bytes) -> MindSporeLayout:
        numbers = {
            entry.name: n
            for n, entry in enumerate(entry for entry in self.entries if not isinstance(entry.source, bytes))
        }
        stretches: list[_Stretch] = []
        places: dict[int, Extent] = {}
        pending, offset = head, 0
        for entry in order:
            if isinstance(entry.source, bytes):
                pending += entry.source
                continue
            offset += len(pending)
            number = numbers[entry.name]
            stretches.append(_Stretch(pending, number))
            places[number] = Extent(self.name, offset, entry.nbytes)
            pending, offset = b"", offset + entry.nbytes
        stretches.append(_Stretch(pending, None))
        return MindSporeLayout(
            tuple(stretches), tuple(places[number] for number in range(len(places))), offset + len(pending)
        )

    def slots(self) -> FileSlots:
        """What fills the storages."""
        return slots_of(self.name, self.entries, None)


MindSporeFile = CkptFile | SafetensorsFile
"""Either, as the engine takes it."""


def mindspore_file(suffix: str, name: str, entries: Sequence[Entry], *, crc: bool = False) -> MindSporeFile:
    """A file of a format spelled ``ckpt`` or ``safetensors``."""
    if suffix == "safetensors":
        return SafetensorsFile(name=name, entries=tuple(entries))
    return CkptFile(name=name, entries=tuple(entries), crc=crc)


def _check(entries: Sequence[Entry], known: dict[str, str]) -> None:
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice")
    for entry in entries:
        if entry.dtype not in known:
            raise ValueError(f"{entry.name}: type {entry.dtype} cannot be written")
        given = isinstance(entry.source, bytes)
        held = len(entry.source) if isinstance(entry.source, bytes) else math.prod(entry.source.box[1])
        width = DTYPE_BYTES.get(entry.dtype, 1) if given else 1
        if entry.dtype != "str" and held != math.prod(entry.shape) * width:
            raise ValueError(f"{entry.name}: {held // width} elements for {entry.dtype}{list(entry.shape)}")


def _check_safe(entries: Sequence[Entry], where: str) -> None:
    for entry in entries:
        if entry.name in _RESERVED or entry.dtype not in _SAFE_DTYPES:
            what = (
                f"a parameter named {entry.name}" if entry.name in _RESERVED else f"{entry.name} of type {entry.dtype}"
            )
            raise InputError(
                f"{what} cannot be kept in a .safetensors file that mindspore loads",
                where=where,
                hint=f"write .ckpt instead{aside('target.format')}",
            )


def _entry_head(entry: Entry, nbytes: int) -> bytes:
    """Everything of an entry before its ``nbytes`` bytes of payload; all lengths are counted from the inside."""
    # A text has dims [0] whatever its length.
    dims = (0,) if entry.dtype == "str" else entry.shape
    kind = _CKPT_DTYPES[entry.dtype].encode()
    inner = b"".join(b"\x08" + _varint(dim) for dim in dims) + _chunk_head(0x12, len(kind)) + kind
    inner += _chunk_head(0x1A, nbytes)
    name = entry.name.encode()
    outer = _chunk_head(0x0A, len(name)) + name + _chunk_head(0x12, len(inner) + nbytes)
    return _chunk_head(0x0A, len(outer) + len(inner) + nbytes) + outer + inner


def _chunk_head(key: int, nbytes: int) -> bytes:
    return bytes([key]) + _varint(nbytes)


def _varint(number: int) -> bytes:
    return bytes(_digits(number))


def _digits(number: int) -> Iterator[int]:
    while number > 0x7F:
        yield number & 0x7F | 0x80
        number >>= 7
    yield number
