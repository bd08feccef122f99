"""The .pt container: a zip archive without compression, laid out before its payload is known, byte for byte as torch does.

    lay_out(stem, pickle, sizes) -> Layout --storage_offset(i)--> the engine writes payloads there, in any order
                                      |
    frame(out, layout, crcs)          v
    data.pkl  .format_version  .storage_alignment  byteorder  data/0 ... data/N-1  version  .data/serialization_id
    central directory, zip64 end record, locator, end record

    each record:  local header, name, zip64 field, "FB" filler | payload, on a multiple of 64 | data descriptor

The CRC-32 of a record stands behind its payload and in the directory, nowhere before it: that is what lets us stream.
From pytorch ``caffe2/serialize/inline_container.cc`` (getPadding, writeRecord, writeSerializationId) and
``third_party/miniz-3.0.2/miniz.c`` (mz_zip_writer_add_mem_ex_v2), checked against what torch 2.15 writes.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import NamedTuple, Self

from ckpt2pt.core.extents import Extent
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.torchfile.reader import (
    CENTRAL,
    COPY_AGAIN,
    END,
    END64,
    LOCAL,
    LOCATOR,
    SAVE_AGAIN,
    U32_MAX,
    PtFile,
    Record,
    read_records,
)
from ckpt2pt.io.checksums import Piece, crc32
from ckpt2pt.io.digests import blake2b
from ckpt2pt.io.files import write_all
from ckpt2pt.io.framing import Framer
from ckpt2pt.io.inputs import InputFile

ALIGNMENT = 64
"""Payloads begin on multiples of this many bytes, so that torch can map them."""

_U16_MAX = 0xFFFF
_DATA_FOLLOWS, _UTF8 = 0x0008, 0x0800
_ID_NBYTES = 40
_DESCRIPTOR, _DESCRIPTOR64 = struct.Struct("<4s3I"), struct.Struct("<4sI2Q")
_FILLERS = tuple(b"FB" + struct.pack("<H", size) + b"Z" * size for size in range(ALIGNMENT))

_BEFORE = ("data.pkl", ".format_version", ".storage_alignment", "byteorder")
_AFTER = ("version", ".data/serialization_id")
_FORMAT_VERSION, _BYTEORDER, _VERSION = b"1", b"little", b"3\n"

_MAX_PICKLE_NBYTES = 512 << 20


class Slot(NamedTuple):
    """The place of one record: its full name, the size of its payload, the offsets of local header and payload."""

    name: bytes
    nbytes: int
    header: int
    payload: int

    @property
    def is_wide(self) -> bool:
        """Whether its numbers need zip64: a size or an offset that 32 bits cannot hold (all ones is a mark)."""
        return self.nbytes >= U32_MAX or self.header >= U32_MAX


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each record of an archive lies; made by :func:`lay_out`."""

    pickle: bytes
    slots: tuple[Slot, ...]
    directory: int
    nbytes: int
    """Size of the whole file."""

    @property
    def storages(self) -> int:
        """Number of storages."""
        return len(self.slots) - len(_BEFORE) - len(_AFTER)

    def storage_offset(self, index: int) -> int:
        """Absolute offset of the payload of ``data/{index}``."""
        return self._storage(index).payload

    def storage_nbytes(self, index: int) -> int:
        """Size of the payload of ``data/{index}``."""
        return self._storage(index).nbytes

    def finish(self, fd: int, crcs: Sequence[int]) -> int:
        """:func:`finish` with a serialization id of our own."""
        return finish(fd, self, crcs)

    def _storage(self, index: int) -> Slot:
        if not 0 <= index < self.storages:
            raise IndexError(f"storage {index} of {self.storages}")
        return self.slots[len(_BEFORE) + index]


def lay_out(stem: str, pickle: bytes, storage_nbytes: Sequence[int]) -> Layout:
    """Lay the records of an archive end to end.  Pure.

    ``stem`` prefixes each name; torch takes the file's name without suffix.
    """
    if not stem or "/" in stem or "\\" in stem:
        raise ValueError(f"the stem is the name of a file without its suffix, not {stem!r}")
    names = chain(_BEFORE, map("data/{}".format, range(len(storage_nbytes))), _AFTER)
    small = (len(pickle), len(_FORMAT_VERSION), len(str(ALIGNMENT)), len(_BYTEORDER))
    sizes = chain(small, storage_nbytes, (len(_VERSION), _ID_NBYTES))
    prefix = f"{stem}/".encode()
    slots: list[Slot] = []
    offset = directory_nbytes = 0
    for record, nbytes in zip(names, sizes, strict=True):
        if nbytes < 0:
            raise ValueError(f"{record}: a storage of {nbytes} bytes")
        name = prefix + record.encode()
        # A field of zip64 is counted where the numbers need it, and at the same place again in the directory.
        extra = _zip64_nbytes(nbytes, offset)
        start = offset + LOCAL.size + len(name) + extra + len(_FILLERS[0])
        payload = -(-start // ALIGNMENT) * ALIGNMENT
        slots.append(Slot(name, nbytes, offset, payload))
        directory_nbytes += CENTRAL.size + len(name) + extra
        offset = payload + nbytes + _descriptor_nbytes(nbytes, wide=extra > 0)
    return Layout(bytes(pickle), tuple(slots), offset, offset + directory_nbytes + END64.size + LOCATOR.size + END.size)


def finish(fd: int, layout: Layout, crcs: Sequence[int], *, serialization_id: str | None = None) -> int:
    """Write everything but the payloads of the storages, which are in place; return the CRC-32 of the whole file.

    ``crcs`` are those of the storages. Nothing is read back. Without ``serialization_id`` one is derived from
    names and CRCs, so that the same content is the same file. An ``OSError`` passes through: the caller knows the path.
    """
    out = Framer(fd)
    frame(out, layout, crcs, serialization_id=serialization_id)
    out.flush()
    return out.crc


def frame(out: Framer, layout: Layout, crcs: Sequence[int], *, serialization_id: str | None = None) -> None:
    """The same from where ``out`` stands: archives may follow each other in one file."""
    if len(crcs) != layout.storages:
        raise ValueError(f"{len(crcs)} CRCs for {layout.storages} storages")
    before = (layout.pickle, _FORMAT_VERSION, str(ALIGNMENT).encode(), _BYTEORDER)
    known = [*(crc32(record, 0) for record in before), *crcs, crc32(_VERSION, 0)]
    identity = (serialization_id or _serialization_id(layout.slots, known)).encode()
    if len(identity) != _ID_NBYTES:
        raise ValueError(f"a serialization id has {_ID_NBYTES} digits, not {len(identity)}")
    known.append(crc32(identity, 0))
    contents: Iterable[bytes | None] = chain(before, repeat(None, layout.storages), (_VERSION, identity))

    begin, directory = out.position, bytearray()
    for slot, crc, content in zip(layout.slots, known, contents, strict=True):
        if crc and not slot.nbytes:
            raise ValueError(f"{slot.name.decode()} is empty, and its CRC-32 is {crc:08x}")
        out.put(_local_header(slot))
        if content is None:
            out.skip(slot.nbytes, crc)
        else:
            out.put(content)
        out.put(_descriptor(slot, crc))
        directory += _central_header(slot, crc)
    out.put(directory)
    out.put(_end_records(len(layout.slots), len(directory), layout.directory))
    assert out.position - begin == layout.nbytes, "headers and layout disagree"


def archive_bytes(stem: str, pickle: bytes, payloads: Sequence[bytes] = ()) -> bytes:
    """A whole archive that is small, in memory and not in a temporary folder: a pod's root may be read-only."""
    layout = lay_out(stem, pickle, [len(payload) for payload in payloads])
    with open(os.memfd_create(stem), "r+b") as file:
        fd = file.fileno()
        os.truncate(fd, layout.nbytes)
        for number, payload in enumerate(payloads):
            write_all(fd, memoryview(payload), layout.storage_offset(number))
        finish(fd, layout, [crc32(payload, 0) for payload in payloads])
        file.seek(0)
        return file.read()


def _zip64_nbytes(nbytes: int, header: int) -> int:
    """Size of the zip64 field of a record: as miniz, two sizes if they need it, the offset if it does."""
    numbers = 2 * (nbytes >= U32_MAX) + (header >= U32_MAX)
    return 4 + 8 * numbers if numbers else 0


def _zip64_field(slot: Slot, compressed: int) -> bytes:
    """That field of a record that is wide."""
    numbers = [slot.nbytes, compressed] if slot.nbytes >= U32_MAX else []
    if slot.header >= U32_MAX:
        numbers.append(slot.header)
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def _local_header(slot: Slot) -> bytes:
    # miniz builds this field before it has compressed anything: the compressed size is still zero.
    extra = _zip64_field(slot, compressed=0) if slot.is_wide else b""
    extra += _FILLERS[slot.payload - slot.header - LOCAL.size - len(slot.name) - len(extra) - len(_FILLERS[0])]
    flags = _UTF8 | _DATA_FOLLOWS if slot.nbytes else _UTF8
    return LOCAL.pack(b"PK\3\4", flags, 0, 0, 0, 0, len(slot.name), len(extra)) + slot.name + extra


def _descriptor_nbytes(nbytes: int, *, wide: bool) -> int:
    if not nbytes:
        return 0
    return _DESCRIPTOR64.size if wide else _DESCRIPTOR.size


def _descriptor(slot: Slot, crc: int) -> bytes:
    if not slot.nbytes:  # an empty storage has a record, but no descriptor
        return b""
    return (_DESCRIPTOR64 if slot.is_wide else _DESCRIPTOR).pack(b"PK\7\x08", crc, slot.nbytes, slot.nbytes)


def _central_header(slot: Slot, crc: int) -> bytes:
    extra = _zip64_field(slot, slot.nbytes) if slot.is_wide else b""
    flags = _UTF8 | _DATA_FOLLOWS if slot.nbytes else _UTF8
    nbytes, header = min(slot.nbytes, U32_MAX), min(slot.header, U32_MAX)
    fixed = CENTRAL.pack(b"PK\1\2", flags, 0, crc, nbytes, nbytes, len(slot.name), len(extra), 0, 0, header)
    return fixed + slot.name + extra


def _end_records(entries: int, nbytes: int, offset: int) -> bytes:
    """The three end records.  torch asks miniz for zip64 always, also where 32 bits would do."""
    few = min(entries, _U16_MAX)
    return (
        # "Made by" 0x031e and "needed" 45 are what miniz puts here; the size counts from the next field on.
        END64.pack(b"PK\6\6", END64.size - 12, 0x031E, 45, 0, 0, entries, entries, nbytes, offset)
        + LOCATOR.pack(b"PK\6\7", 0, offset + nbytes, 1)
        + END.pack(b"PK\5\6", 0, 0, few, few, min(nbytes, U32_MAX), min(offset, U32_MAX), 0)
    )


def _serialization_id(slots: Sequence[Slot], crcs: Sequence[int]) -> str:
    """40 digits: 20 from the names of the records, 20 from their CRCs.

    The second half is torch's own (c10::hash_combine over the data descriptors as they are written, hence without empty
    records). Its first half follows the order of a C++ hash table; ours is a digest of the names.
    """
    combined, mask = 0, (1 << 64) - 1
    for slot, crc in zip(slots, crcs, strict=False):  # the last record, the id itself, has no CRC yet
        if slot.nbytes:
            combined ^= (crc + 0x9E3779B9 + (combined << 6) + (combined >> 2)) & mask
    names = blake2b(b"\0".join(slot.name for slot in slots), digest_size=8).digest()
    return f"{int.from_bytes(names, 'little'):020}{combined:020}"


@dataclass(frozen=True, slots=True)
class Archive:
    """What the directory of a ``.pt`` file says, and its pickle.  Payloads are located, not read; no file stays open."""

    path: str
    stem: str
    nbytes: int
    records: dict[str, Record]
    """By name without the stem."""
    storages: dict[str, Extent]
    """By key, as the pickle names them: the payload of ``data/{key}``."""
    pickle: bytes

    @classmethod
    def open(cls, path: Path, option: str = "") -> Self:
        """Read directory and pickle of the file; one of metadata, which ``option`` names, is read once a process."""
        with PtFile(path, option, keep=bool(option)) as file:
            return cls.read(file)

    @classmethod
    def read(cls, file: PtFile) -> Self:
        """The same of a file that is open."""
        stem, records = read_records(file)
        pickle = _read_pickle(file, records)
        _check_byteorder(file, records)
        storages = {name.removeprefix("data/"): r.extent for name, r in records.items() if name.startswith("data/")}
        return cls(file.path, stem, file.size, records, storages, pickle)

    def verify_crcs(self, read: Sequence[Piece] = (), advance: Callable[[int], None] = lambda _: None) -> None:
        """Compare the CRC-32 of every record with the stored one.  ``FormatError`` names the first that differs.

        ``read`` are pieces of the file, sorted, that were read already; ``advance`` is called with the bytes that are read now.
        """
        with PtFile(Path(self.path)) as file:
            for record in sorted(self.records.values(), key=lambda record: record.extent.offset):
                first, stop = record.extent.offset, record.extent.offset + record.extent.nbytes
                found = file.crc32(first, stop, read=read)
                if found != record.crc32:
                    raise _wrong_crc(file, record, found)
                known = read[bisect_left(read, (first, 0, 0)) : bisect_left(read, (stop, 0, 0))]
                advance(max(0, stop - first - sum(nbytes for _, nbytes, _ in known)))

    @classmethod
    def prove_read(cls, path: Path, pieces: Iterable[Piece]) -> None:
        """Compare the stored CRC-32 of each record with that of its bytes; those that ``pieces`` tell of are not read again.

        A piece's first byte counts from the start of the file.  Records that no piece is of are left out, and those of an
        archive that was written without checksums.  ``FormatError`` names the first that differs.
        """
        with PtFile(path) as file:
            prove_records(file, cls.read(file).records.values(), sorted(pieces))


def prove_records(
    file: InputFile, records: Iterable[Record], read: Sequence[Piece], *, every_byte: bool = True
) -> bool:
    """The same for records of a file that is open; ``read`` are sorted, and a piece may be of several records.

    Unless ``every_byte`` a record that was read in part is not read for the sake of its checksum; False if there is one.
    """
    complete = True
    ends = [*accumulate((first + nbytes for first, nbytes, _ in read), max, initial=0)]
    for record in records:
        first, stop = record.extent.offset, record.extent.offset + record.extent.nbytes
        since, until = bisect_left(read, (first, 0, 0)), bisect_left(read, (stop, 0, 0))
        if not record.crc32 or (since == until and ends[since] <= first):
            continue
        if not every_byte and not _covered(stop, max(first, ends[since]), read[since:until]):
            complete = False
            continue
        crc = file.crc32(first, stop, read=read[since:until])
        if crc != record.crc32:
            raise _wrong_crc(file, record, crc)
    return complete


def _covered(stop: int, position: int, pieces: Iterable[Piece]) -> bool:
    """Whether sorted pieces hold every byte from ``position`` up to ``stop``."""
    for first, nbytes, _ in pieces:
        if first > position:
            return False
        position = max(position, first + nbytes)
    return position >= stop


def _read_pickle(file: PtFile, records: dict[str, Record]) -> bytes:
    record = records.get("data.pkl")
    if record is None:
        script = "constants.pkl" in records
        raise FormatError(
            "this is a TorchScript archive, not a checkpoint" if script else "the archive holds no data.pkl",
            where=file.path,
            hint="save the state dict itself with torch.save",
        )
    if record.extent.nbytes > _MAX_PICKLE_NBYTES:
        raise FormatError(
            f"data.pkl has {record.extent.nbytes:,} bytes; at most {_MAX_PICKLE_NBYTES:,} are read into memory",
            where=file.path,
            hint="keep tensors in the checkpoint, not lists of numbers: they lie outside the pickle",
        )
    data = file.read(record.extent.offset, record.extent.nbytes)
    found = crc32(data, 0)
    # torch.serialization.set_crc32_options(False) leaves zeros; such a file is whole all the same.
    if found != record.crc32 and record.crc32:
        raise _wrong_crc(file, record, found)
    return data


def _check_byteorder(file: PtFile, records: dict[str, Record]) -> None:
    record = records.get("byteorder")  # torch writes it since 2.1
    if record is None:
        return
    order = file.read(record.extent.offset, min(record.extent.nbytes, len(_BYTEORDER) + 1))
    if order != _BYTEORDER:
        raise FormatError(
            f"the tensors are stored in byte order {order.decode(errors='replace')!r}, expected 'little'",
            where=file.path,
            hint=f"on a little-endian machine, {SAVE_AGAIN}",
        )


def _wrong_crc(file: InputFile, record: Record, found: int) -> FormatError:
    if not record.crc32:
        return FormatError(
            f"no CRC-32 is stored for {record.name} (torch.serialization.set_crc32_options(False))",
            where=file.path,
            hint=SAVE_AGAIN,
        )
    return FormatError(
        f"the CRC-32 of {record.name} is {found:08x}, but {record.crc32:08x} is stored",
        where=file.path,
        hint=COPY_AGAIN,
    )
