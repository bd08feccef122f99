"""The items of a ``.distcp`` file: each is an archive of torch.save, whose tensor is located and not read.

item k                                             | item k + 1
data.pkl ... local header | payload | ... directory | data.pkl ...
                          ^ where the elements lie: by directory and headers, which must agree (pt.reader)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import ClassVar, NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, Shape
from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.torch_dist.metadata import Chunk, Item
from ckpt2pt.formats.torchfile.archive import Archive, prove_records
from ckpt2pt.formats.torchfile.pickles import read_pickle
from ckpt2pt.formats.torchfile.reader import CENTRAL, PtFile
from ckpt2pt.formats.torchfile.trees import Value, as_tensor
from ckpt2pt.io.checksums import Piece
from ckpt2pt.io.inputs import InputFile

_HINT = "copy the whole folder again from where it was written"
_ID, _DESCRIPTOR, _CRC_OFFSET = ".data/serialization_id", b"PK\7\x08", 16
_HEAD_BYTES, _TAIL_BYTES = 2 << 10, 2 << 10


class Located(NamedTuple):
    """Where the elements of a chunk lie: from element ``first`` of the storage on, with strides in elements."""

    storage: tuple[Extent, ...]
    first: int
    strides: Shape


class ItemFile(PtFile):
    """One item, as a file of its own: its two ends are read at once, its payload is not."""

    __slots__ = ("_base", "_file", "_head", "_tail")
    kind = "part of a distributed checkpoint"
    max_comment: ClassVar[int] = 0

    def __init__(self, file: InputFile, item: Item) -> None:
        self._file, self._base, self._fd = file, item.offset, -1
        self.path, self.size = f"{file.path}, from byte {item.offset} on", item.nbytes
        whole = item.nbytes <= _HEAD_BYTES + _TAIL_BYTES
        self._head = file.read(item.offset, item.nbytes if whole else _HEAD_BYTES)
        self._tail = b"" if whole else file.read(item.offset + item.nbytes - _TAIL_BYTES, _TAIL_BYTES)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly ``nbytes`` bytes of the item from ``offset`` on."""
        behind = offset - (self.size - len(self._tail))
        if behind >= 0 and self._tail:
            return self._tail[behind : behind + nbytes]
        if offset + nbytes <= len(self._head):
            return self._head[offset : offset + nbytes]
        return self._file.read(self._base + offset, nbytes)

    def frame(self, payload: Extent) -> bytearray | None:
        """What stands before and behind a payload; None where that is more than was read at once."""
        stop, start = payload.offset + payload.nbytes, self.size - len(self._tail)
        if payload.offset > len(self._head) or (self._tail and stop < start):
            return None
        return bytearray(
            self._head[: payload.offset] + (self._tail[stop - start :] if self._tail else self._head[stop:])
        )


class _Form(NamedTuple):
    """An item that was read whole: others of its frame, but for the ``changing`` bytes of checksums, are alike."""

    frame: bytearray
    changing: tuple[slice, ...]
    payload: Extent
    first: int
    strides: Shape

    def fits(self, inside: ItemFile) -> bool:
        """Whether an item is framed like this one."""
        frame = inside.frame(self.payload)
        if frame is None or len(frame) != len(self.frame):
            return False
        for part in self.changing:
            frame[part] = self.frame[part]
        return frame == self.frame


def read_object(folder: Path, item: Item, allow: tuple[str, ...] = ()) -> tuple[Value, dict[str, Extent]]:
    """What an item holds that is no tensor, and the storages that it names."""
    with InputFile(folder / item.file, ref("source.path")) as file:
        archive = Archive.read(ItemFile(file, item))
        storages = {key: _moved(extent, file, item) for key, extent in archive.storages.items()}
        return read_pickle(archive.pickle, where=archive.path, allow=allow), storages


def locate(folder: Path, chunks: Iterable[tuple[str, Chunk]]) -> Iterator[tuple[Chunk, Located]]:
    """Where the elements of chunks lie, each given with its type; in the order of the files.

    Raises :class:`FormatError` for an item that is not a tensor of the chunk's type and shape.
    """
    ordered = sorted(chunks, key=lambda one: one[1].item)
    forms: dict[tuple[str, Shape, int], _Form] = {}
    for name, inside in groupby(ordered, key=lambda one: one[1].item.file):
        with InputFile(folder / name, ref("source.path")) as file:
            for dtype, chunk in inside:
                yield chunk, _located(file, chunk, dtype, forms)


def prove_items(path: Path, items: Iterable[Item], pieces: Sequence[Piece], *, every_byte: bool = True) -> bool:
    """Compare the stored CRC-32 of each record that ``pieces`` of a file are of with that of its bytes.

    What was not read of a record is read now; unless ``every_byte`` such a record is left out, and False is returned if there
    is one.  Raises :class:`FormatError` for the first that differs.
    """
    complete = True
    ordered = sorted(pieces)
    ends = [*accumulate((first + nbytes for first, nbytes, _ in ordered), max, initial=0)]
    with InputFile(path, ref("source.path")) as file:
        for item in items:
            stop = bisect_left(ordered, (item.offset + item.nbytes, 0, 0))
            if ends[stop] > item.offset:
                records = Archive.read(ItemFile(file, item)).records.values()
                moved = [one._replace(extent=_moved(one.extent, file, item)) for one in records]
                complete &= prove_records(file, moved, ordered, every_byte=every_byte)
    return complete


def _located(file: InputFile, chunk: Chunk, dtype: str, forms: dict[tuple[str, Shape, int], _Form]) -> Located:
    inside, key = ItemFile(file, chunk.item), (dtype, chunk.shape, chunk.item.nbytes)
    form = forms.get(key)
    if form is None or not form.fits(inside):
        archive = Archive.read(inside)
        storage, first, strides = _tensor(archive, chunk, dtype)
        frame = inside.frame(storage)
        form = _Form(frame or bytearray(), _checksums(archive, frame or b"", storage), storage, first, strides)
        if frame:
            forms[key] = form
    return Located((_moved(form.payload, file, chunk.item),), form.first, form.strides)


def _checksums(archive: Archive, frame: bytes | bytearray, payload: Extent) -> tuple[slice, ...]:
    """The bytes of a frame that tell the CRC-32 of the payload, and an id that torch makes of it with its own CRC-32."""
    found: list[slice] = []
    identity = archive.records.get(_ID)
    if identity and identity.extent.offset > payload.offset:
        start = identity.extent.offset - payload.nbytes
        found.append(slice(start, start + identity.extent.nbytes))
    for record in archive.records.values():
        if record is identity or record.extent == payload:
            stop = payload.offset if record.extent == payload else found[0].stop
            if frame[stop : stop + len(_DESCRIPTOR)] == _DESCRIPTOR:
                found.append(slice(stop + len(_DESCRIPTOR), stop + len(_DESCRIPTOR) + 4))
            listed = frame.rfind(f"{archive.stem}/{record.name}".encode()) - CENTRAL.size
            found.append(slice(listed + _CRC_OFFSET, listed + _CRC_OFFSET + 4))
    return tuple(found)


def _tensor(archive: Archive, chunk: Chunk, dtype: str) -> tuple[Extent, int, Shape]:
    """The storage in the item, the first element, and the strides."""
    found = as_tensor(read_pickle(archive.pickle, where=archive.path))
    width = DTYPE_BYTES[dtype]
    if found is None or found.dtype != dtype or found.shape != chunk.shape:
        raise FormatError(
            f"found {f'{found.dtype}{list(found.shape)}' if found else 'no tensor'}, expected {dtype}{list(chunk.shape)}",
            where=archive.path,
            hint=_HINT,
        )
    extent = archive.storages.get(found.key)
    if extent is None or extent.nbytes != found.storage_numel * width:
        raise FormatError(
            f"the storage has {extent.nbytes if extent else 0} bytes, expected {found.storage_numel * width}",
            where=archive.path,
            hint=_HINT,
        )
    return extent, found.offset, found.stride


def _moved(extent: Extent, file: InputFile, item: Item) -> Extent:
    return Extent(file.path, item.offset + extent.offset, extent.nbytes)
