"""Read the directory of a zip archive as torch writes it, backwards from its end; payloads are located, not read.

    local header, payload, ...  |  central directory  |  [zip64 end record, locator]  |  end record, comment

A zip file says most things twice, and lenient readers disagree about which one counts.  Here both must agree: nothing is
compressed, doubled, overlapping or outside the file, and there is one end record only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, NoReturn

from ckpt2pt.core.extents import Extent
from ckpt2pt.errors import FormatError
from ckpt2pt.io.foreign import HEAD_BYTES, READS, TORCH_LEGACY, recognise
from ckpt2pt.io.inputs import InputFile, quoted

LOCAL = struct.Struct("<4s2x2H4x3I2H")
CENTRAL = struct.Struct("<4s4x2H4x3I4H6xI")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")
"""The five kinds of header of a zip file, in the order in which they stand (APPNOTE.TXT 4.3).

Skipped are versions, times and attributes: torch writes zeros there, and nothing reads them.
"""

U32_MAX = 0xFFFFFFFF
_U16_MAX = 0xFFFF

COPY_AGAIN = "the file is incomplete or damaged: wait until it is written, or copy it again"
SAVE_AGAIN = "load it with torch.load and write it again with torch.save of torch 1.6 or newer"

_MAX_DIRECTORY_NBYTES = 256 << 20  # two million storages
_ENCRYPTED = 0x2041  # encrypted, strongly encrypted, or with its header masked
_WINDOW_NBYTES = 1 << 12


class Record(NamedTuple):
    """One record: its name without the stem, where its payload lies, the CRC-32 stored for it."""

    name: str
    extent: Extent
    crc32: int


class _Entry(NamedTuple):
    name: bytes
    nbytes: int
    header: int
    crc32: int


class PtFile(InputFile):
    """A .pt file open for reading."""

    __slots__ = ()
    kind = ".pt file"
    option = "the path of the .pt file"
    max_comment: ClassVar[int] = _U16_MAX
    """Bytes that a comment behind the end record may have; torch writes none."""

    def broken(self, what: str, hint: str = COPY_AGAIN) -> NoReturn:
        """Refuse the file."""
        raise FormatError(what, where=self.path, hint=hint)


def read_records(file: PtFile) -> tuple[str, dict[str, Record]]:
    """The stem all names share, and the records by the rest of their names, in the order of the directory."""
    _recognise(file)
    start, stop, count = _find_directory(file)
    entries = list(_entries(file, file.read(start, stop - start), count))
    stem = _stem(file, entries)
    payloads = _payloads(file, entries, start)
    records: dict[str, Record] = {}
    for entry in entries:
        name = entry.name.decode()[len(stem) + 1 :]
        records[name] = Record(name, Extent(file.path, payloads[entry.header], entry.nbytes), entry.crc32)
    return stem, records


def _recognise(file: PtFile) -> None:
    """Refuse by name what is known not to be a torch archive."""
    head = file.read(0, min(HEAD_BYTES, file.size))
    if file.path.endswith(".distcp"):  # a row of archives, each of one tensor
        file.broken("this is a part of a distributed checkpoint (torch_dist)", "name the folder that holds it")
    if head.startswith(b"PK\3\4"):  # torch.load, too, looks at these four bytes
        return
    if not head:
        file.broken("the file is empty")
    if head[2:].startswith(TORCH_LEGACY):
        file.broken("the file has the format of torch before 1.6, a row of pickles", SAVE_AGAIN)
    if head[257:262] == b"ustar":
        file.broken("the file has the format of torch before 0.2, a tar archive", SAVE_AGAIN)
    if head.startswith(b"PYTORCH1"):
        file.broken("the file has the format of a preview of torch 1.0", SAVE_AGAIN)
    if head.startswith(b"\x80"):
        file.broken("the file is a bare pickle, not a torch archive", SAVE_AGAIN)
    if head.startswith(b"PK\5\6"):
        file.broken("the archive holds no record")
    other = recognise(head) or ("a MindSpore checkpoint (.ckpt)" if head.startswith(b"\n") else "")
    if other:
        file.broken(
            f"this is {other}, not a torch archive: it starts with {head[:8].hex(' ')}; {READS}",
            "name a file that torch.save wrote",
        )
    file.broken(f"this is not a torch archive: it starts with {head[:8].hex(' ')}", "name a file that torch.save wrote")


def _find_directory(file: PtFile) -> tuple[int, int, int]:
    """Start and end of the central directory, and how many entries it has."""
    end, count, nbytes, start = _end_record(file)
    stop = end
    if end >= LOCATOR.size:
        locator = LOCATOR.unpack(file.read(end - LOCATOR.size, LOCATOR.size))
        if locator[0] == b"PK\6\7":
            stop, wide = _end64(file, locator, end - LOCATOR.size)
            for small, large, marked in zip((count, nbytes, start), wide, (_U16_MAX, U32_MAX, U32_MAX), strict=True):
                if small not in (large, marked):
                    file.broken(f"the end record says {small} where the one of zip64 says {large}")
            count, nbytes, start = wide
    if start + nbytes != stop:
        file.broken(f"the directory is said to be bytes {start} to {start + nbytes}, but it ends at byte {stop}")
    if count * CENTRAL.size > nbytes:
        file.broken(f"a directory of {nbytes} bytes cannot hold {count} entries")
    if nbytes > _MAX_DIRECTORY_NBYTES:
        file.broken(f"a directory of {nbytes:,} bytes; at most {_MAX_DIRECTORY_NBYTES:,} are read into memory")
    return start, stop, count


def _end_record(file: PtFile) -> tuple[int, int, int, int]:
    """Offset of the end record; entries, size and offset of the directory as it says."""
    base = max(0, file.size - END.size - file.max_comment)
    tail = file.read(base, file.size - base)
    found: list[int] = []
    at = tail.find(b"PK\5\6")
    while at >= 0:
        # A payload may hold these four bytes; an end record ends, with its comment, where the file ends.
        if at + END.size <= len(tail) and at + END.size + END.unpack_from(tail, at)[-1] == len(tail):
            found.append(at)
        at = tail.find(b"PK\5\6", at + 1)
    if not found:
        file.broken("the archive has no end record: it is cut short")
    if len(found) > 1:
        file.broken("the archive has two end records, one inside the comment of the other", SAVE_AGAIN)
    _, disk, first_disk, here, count, nbytes, start, _ = END.unpack_from(tail, found[0])
    if here != count or disk not in (0, _U16_MAX) or first_disk not in (0, _U16_MAX):
        file.broken("the file is one part of a zip archive that was split", SAVE_AGAIN)
    return base + found[0], count, nbytes, start


def _end64(file: PtFile, locator: tuple[bytes, int, int, int], stop: int) -> tuple[int, tuple[int, int, int]]:
    """Offset of the zip64 end record, which ends at ``stop``; entries, size and offset of the directory as it says."""
    _, disk, offset, disks = locator
    if disk or disks > 1:
        file.broken("the file is one part of a zip archive that was split", SAVE_AGAIN)
    if offset + END64.size > stop:
        file.broken(f"the zip64 end record is said to be at byte {offset}, past its place")
    kind, nbytes, _, _, disk, first_disk, here, count, size, start = END64.unpack(file.read(offset, END64.size))
    if kind != b"PK\6\6" or offset + 12 + nbytes != stop:
        file.broken(f"no zip64 end record of the right size is at byte {offset}")
    if disk or first_disk or here != count:
        file.broken("the file is one part of a zip archive that was split", SAVE_AGAIN)
    return offset, (count, size, start)


def _entries(file: PtFile, data: bytes, count: int) -> Iterator[_Entry]:
    """The entries of the directory, each checked on its own."""
    at = 0
    for number in range(count):
        if at + CENTRAL.size > len(data):
            file.broken(f"the directory ends within entry {number} of {count}")
        header = CENTRAL.unpack_from(data, at)
        kind, flags, method, crc, compressed, nbytes, n_name, n_extra, n_comment, disk, offset = header
        begin = at + CENTRAL.size
        at = begin + n_name + n_extra + n_comment
        if kind != b"PK\1\2" or at > len(data):
            file.broken(f"entry {number} of the directory is damaged")
        name = data[begin : begin + n_name]
        if flags & _ENCRYPTED or method or disk:
            _refuse_entry(file, name, flags, method)
        if U32_MAX in (nbytes, compressed, offset):
            extra = data[begin + n_name : begin + n_name + n_extra]
            nbytes, compressed, offset = _widened(file, name, extra, (nbytes, compressed, offset))
        if nbytes != compressed:
            file.broken(f"{_quoted(name)} is stored, but has {nbytes} bytes and takes {compressed}")
        yield _Entry(name, nbytes, offset, crc)
    if at != len(data):
        file.broken(f"the directory goes on for {len(data) - at} bytes after its {count} entries")


def _refuse_entry(file: PtFile, name: bytes, flags: int, method: int) -> NoReturn:
    if flags & _ENCRYPTED:
        file.broken(f"{_quoted(name)} is encrypted", SAVE_AGAIN)
    if method:
        # Also a guard: a compressed record may unpack to a thousand times its size.
        file.broken(f"{_quoted(name)} is compressed (method {method}); torch stores records as they are", SAVE_AGAIN)
    file.broken("the file is one part of a zip archive that was split", SAVE_AGAIN)


def _widened(file: PtFile, name: bytes, extra: bytes, numbers: tuple[int, int, int]) -> list[int]:
    """``numbers`` with those that are all ones replaced from the zip64 field, where they stand in this order."""
    fields: list[bytes] = []
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            fields.append(extra[at + 4 : at + 4 + size])
        at += 4 + size
    wanted = numbers.count(U32_MAX)
    if len(fields) != 1 or len(fields[0]) < 8 * wanted:
        file.broken(f"{_quoted(name)} lacks the zip64 field with its {wanted} large numbers")
    wide = iter(struct.unpack_from(f"<{wanted}Q", fields[0]))
    return [next(wide) if number == U32_MAX else number for number in numbers]


def _stem(file: PtFile, entries: list[_Entry]) -> str:
    """The folder all names begin with; refuses names twice, names that climb, and more than one folder."""
    seen: set[bytes] = set()
    stem = entries[0].name.partition(b"/")[0] if entries else b""
    for entry in entries:
        name = entry.name
        if name in seen:
            file.broken(f"the archive holds {_quoted(name)} twice", SAVE_AGAIN)
        seen.add(name)
        parts = name.split(b"/")
        if b"" in parts or b"." in parts or b".." in parts or b"\\" in name or b"\0" in name:
            file.broken(f"{_quoted(name)} is not a name that torch gives to a record", SAVE_AGAIN)
        if len(parts) < 2 or parts[0] != stem:
            file.broken(f"{_quoted(name)} does not lie in the folder {_quoted(stem)} with the others", SAVE_AGAIN)
        if not _is_text(name):
            file.broken(f"{_quoted(name)} is not UTF-8")
    if not stem:
        file.broken("the archive holds no record")
    return stem.decode()


def _payloads(file: PtFile, entries: list[_Entry], limit: int) -> dict[int, int]:
    """Offset of the local header -> offset of the payload.  Records lie before ``limit`` and do not touch each other."""
    window = _Window(file)
    ordered = sorted(entries, key=lambda entry: entry.header)
    stops = [entry.header for entry in ordered[1:]] + [limit]
    payloads: dict[int, int] = {}
    for entry, stop in zip(ordered, stops, strict=True):
        payload = entry.header + LOCAL.size + len(entry.name)
        if payload + entry.nbytes <= stop:
            payload = _local_payload(file, window, entry)
        if payload + entry.nbytes > stop:
            file.broken(
                f"{_quoted(entry.name)} with {entry.nbytes} bytes at {entry.header} reaches beyond byte {stop}, "
                "where something else begins"
            )
        payloads[entry.header] = payload
    return payloads


def _local_payload(file: PtFile, window: _Window, entry: _Entry) -> int:
    """Where the payload begins, by the local header, which must not contradict the directory."""
    header = window.read(entry.header, LOCAL.size + len(entry.name))
    kind, flags, method, crc, _, nbytes, n_name, n_extra = LOCAL.unpack_from(header)
    if kind != b"PK\3\4" or n_name != len(entry.name) or header[LOCAL.size :] != entry.name:
        file.broken(f"no local header for {_quoted(entry.name)} is at byte {entry.header}")
    # Zero where the numbers follow the payload, all ones where a zip64 field has them.
    if flags & _ENCRYPTED or method or nbytes not in (0, U32_MAX, entry.nbytes) or crc not in (0, entry.crc32):
        file.broken(f"the local header of {_quoted(entry.name)} contradicts the directory")
    extra: int = n_extra
    return entry.header + LOCAL.size + len(entry.name) + extra


class _Window:
    """Reads ahead, so that small records cost one call for many; offsets rise from call to call."""

    __slots__ = ("_data", "_file", "_start")

    def __init__(self, file: PtFile) -> None:
        self._file, self._data, self._start = file, b"", 0

    def read(self, offset: int, nbytes: int) -> bytes:
        at = offset - self._start
        if at + nbytes > len(self._data):
            # The caller has checked that offset + nbytes lies in the file.
            size = min(max(nbytes, _WINDOW_NBYTES), self._file.size - offset)
            self._data, self._start, at = self._file.read(offset, size), offset, 0
        return self._data[at : at + nbytes]


def _is_text(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _quoted(name: bytes) -> str:
    return quoted(name.decode(errors="backslashreplace"))
