"""The items of a ``.distcp`` file: each is an archive of torch.save, whose tensor is located and not read.

item k                                             | item k + 1
data.pkl ... local header | payload | ... directory | data.pkl ...
                          ^ where the elements lie: by directory and headers, which must agree (pt.reader)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import ClassVar, NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, Shape
from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.torch_dist.metadata import Chunk, Item
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import Value, as_tensor, read_pickle
from ckpt2pt.formats.torchfile.reader import PtFile
from ckpt2pt.io.inputs import InputFile

_HINT = "copy the whole folder again from where it was written"
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
    for name, inside in groupby(ordered, key=lambda one: one[1].item.file):
        with InputFile(folder / name, ref("source.path")) as file:
            for dtype, chunk in inside:
                yield chunk, _tensor(file, chunk, dtype)


def _tensor(file: InputFile, chunk: Chunk, dtype: str) -> Located:
    inside = ItemFile(file, chunk.item)
    archive = Archive.read(inside)
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
    return Located((_moved(extent, file, chunk.item),), found.offset, found.stride)


def _moved(extent: Extent, file: InputFile, item: Item) -> Extent:
    return Extent(file.path, item.offset + extent.offset, extent.nbytes)
