"""What a checkpoint file holds, leaf by leaf, whoever wrote it; payload is read in blocks, and only when asked for.

    x.pt                  -> {"/args/seed": 1234, "/model/language_model/encoder/layers.0.mlp...weight": TensorLeaf, ...}
    x.ckpt, x.safetensors -> {"language_model.encoder.layers.0...weight": TensorLeaf, ...}

The second readings (verify, compare, show) stand on this and not on the engine's plans and casts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from ckpt2pt.checksums import Piece, crc32
from ckpt2pt.ckpt import index_file
from ckpt2pt.errors import FormatError
from ckpt2pt.pt.archive import Archive
from ckpt2pt.pt.pickles import (
    MISSING,
    Call,
    Global,
    Persistent,
    StoredTensor,
    as_storage,
    as_tensor,
    enum_member,
    is_namespace,
    namespace_attrs,
    read_pickle,
)
from ckpt2pt.request import Advance, unheard
from ckpt2pt.system.access import access_error
from ckpt2pt.system.files import OpenFiles, read_at
from ckpt2pt.tensors import DTYPE_BYTES, Extent, TensorRef

BLOCK_BYTES = 512 << 10
MAX_NAMES_NBYTES = 64 << 20
"""Bytes that the paths of leaves may take beyond ten times the pickle's: names may be long, and stand in each path below."""
_LEAF_NBYTES = 150
_MAX_SPAN_BYTES = 8 << 20

Bytes: TypeAlias = npt.NDArray[np.uint8]
Scalar: TypeAlias = bool | int | float | str | bytes | None


def width(dtype: str) -> int:
    """Bytes of one element; a text counts in its characters, and a type nobody knows in bytes."""
    return DTYPE_BYTES.get(dtype) or {"complex128": 16, "str": 4}.get(dtype, 1)


class Files(OpenFiles):
    """Files open for reading, a few at a time; closed together.

    ``pieces`` tells what was read of the files that ``summed`` names: first byte, bytes, CRC-32.  ``advance`` hears of
    every byte that was read.
    """

    def __init__(self, summed: Iterable[Path] = (), advance: Advance = unheard) -> None:
        super().__init__()
        self._advance = advance
        self.pieces: dict[str, list[Piece]] = {str(path): [] for path in summed}

    def read(self, path: str, offset: int, out: memoryview) -> None:
        """Fill ``out`` from byte ``offset`` on."""
        read_at(self.get(path)[0], out, offset, path)
        self._advance(len(out))
        pieces = self.pieces.get(path)
        if pieces is not None:
            first, nbytes, crc = pieces[-1] if pieces else (0, 0, 0)
            if pieces and first + nbytes == offset:
                pieces[-1] = first, nbytes + len(out), crc32(out, crc)
            else:
                pieces.append((offset, len(out), crc32(out, 0)))


class Elements(Protocol):
    """The elements of a tensor in C order, whatever holds them."""

    def block(self, files: Files, start: int, stop: int) -> Bytes:
        """The bytes of elements ``[start, stop)``; the caller may keep them."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """Elements of ``itemsize`` bytes that lie one after another in extents of files."""

    itemsize: int
    extents: tuple[Extent, ...]

    def block(self, files: Files, start: int, stop: int) -> Bytes:
        """Read them; an extent may end inside an element."""
        out = np.empty((stop - start) * self.itemsize, np.uint8)
        view, skip = out.data, start * self.itemsize
        for extent in self.extents:
            size = min(extent.nbytes - skip, len(view))
            if size > 0:
                files.read(extent.path, extent.offset + skip, view[:size])
                view = view[size:]
            skip = max(0, skip - extent.nbytes)
            if not view:
                break
        return out


@dataclass(frozen=True, slots=True)
class Strided:
    """Elements of a view that skips or turns around what its storage holds."""

    itemsize: int
    extent: Extent
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def block(self, files: Files, start: int, stop: int) -> Bytes:
        """Read the stretch of storage that holds them, by halves when it is long, and pick them out."""
        where = np.full(stop - start, self.offset, np.int64)
        rest = np.arange(start, stop, dtype=np.int64)
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            where += rest % size * step
            rest //= size
        first, last = int(where.min()), int(where.max()) + 1
        if (last - first) * self.itemsize > _MAX_SPAN_BYTES and stop - start > 1:
            middle = (start + stop) // 2
            return np.concatenate([self.block(files, start, middle), self.block(files, middle, stop)])
        span = np.empty((last - first) * self.itemsize, np.uint8)
        files.read(self.extent.path, self.extent.offset + first * self.itemsize, span.data)
        return span.reshape(-1, self.itemsize)[where - first].reshape(-1)


@dataclass(frozen=True, slots=True, repr=False)
class Symbol:
    """A name: of a type, an enumeration's class, or the kind of container that stands at a path."""

    text: str

    def __repr__(self) -> str:
        return self.text


CONTAINERS = frozenset({Symbol("dict"), Symbol("collections.OrderedDict"), Symbol("list"), Symbol("tuple")})
"""What stands at the path of a plain container; its items follow as leaves of their own."""


@dataclass(frozen=True, slots=True, repr=False)
class TensorLeaf:
    """A tensor that has not been read."""

    dtype: str
    shape: tuple[int, ...]
    elements: Elements
    extents: tuple[Extent, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * width(self.dtype)

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


Leaf: TypeAlias = Scalar | Symbol | TensorLeaf
Leaves: TypeAlias = dict[str, Leaf]


def leaf_of(ref: TensorRef) -> TensorLeaf:
    """A tensor of a MindSpore file.  A text's shape says 0: it counts in the characters that are stored."""
    shape = (ref.nbytes // 4,) if ref.dtype == "str" else ref.shape
    if ref.dtype not in DTYPE_BYTES and ref.dtype != "str":
        shape = (ref.nbytes,)
    if ref.gather:
        from ckpt2pt.verify.gather import Gathered  # noqa: PLC0415 - which reads stretches with what is above

        return TensorLeaf(ref.dtype, shape, Gathered(ref.dtype, *ref.gather))
    return TensorLeaf(ref.dtype, shape, Stored(width(ref.dtype), ref.extents), ref.extents)


def is_archive(path: Path) -> bool:
    """True for a zip, the container of torch.save."""
    with Files() as files:
        head = bytearray(min(4, _size(path)))
        files.read(str(path), 0, memoryview(head))
    return head.startswith(b"PK\x03\x04")


def open_file(path: Path, *, allow: Collection[str] = ()) -> Leaves:
    """Every leaf of a file in its order; its first bytes say what it is."""
    if is_archive(path):
        return open_pt(path, allow=allow)
    return {name: leaf_of(ref) for name, ref in index_file(path, partial=True).items()}


def open_pt(path: Path, *, allow: Collection[str] = ()) -> Leaves:
    """Every leaf of a ``.pt``; nothing in it is executed."""
    archive = Archive.open(path)
    storages = archive.storages

    def translate(value: object) -> object:
        if isinstance(value, Call) and (found := as_tensor(value)):
            return _view(found, storages, path)
        if isinstance(value, Persistent) and (storage := as_storage(value)):
            dtype, key, location, numel = storage
            whole = StoredTensor(
                dtype=dtype, key=key, location=location, storage_numel=numel, offset=0, shape=(numel,), stride=(1,)
            )
            return _view(whole, storages, path)
        return value

    tree = read_pickle(archive.pickle, where=str(path), allow=allow)
    return flatten(tree, translate, where=str(path), nbytes=len(archive.pickle))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise access_error(error, path, "examining", reading=True) from error


def _view(found: StoredTensor, storages: Mapping[str, Extent], path: Path) -> TensorLeaf:
    extent, size = storages.get(found.key), width(found.dtype)
    if extent is None or extent.nbytes < found.storage_numel * size:
        there = "is not there" if extent is None else f"holds {extent.nbytes:,} bytes"
        raise FormatError(
            f"a tensor lies in storage {found.key} of {found.storage_numel * size:,} bytes, the record {there}",
            where=path,
            mend="copy the file again from where it was made",
        )
    if not found.is_contiguous:
        elements = Strided(size, extent, found.offset, found.shape, found.stride)
        return TensorLeaf(found.dtype, found.shape, elements, (extent,))
    part = Extent(extent.path, extent.offset + found.offset * size, found.numel * size)
    return TensorLeaf(found.dtype, found.shape, Stored(size, (part,)), (part,))


def flatten(tree: object, translate: Callable[[object], object], *, where: str, nbytes: int) -> Leaves:
    """Path -> leaf, depth first.  ``translate`` makes nodes of ours from a reader's own, and tensors leaves.

    Each container leaves a :class:`Symbol` at its own path, so that an empty one is seen too.  What an object has
    besides its items is below ``@state``, ``@args`` and ``@items``.  ``nbytes`` is the size of the pickle.
    """
    found: Leaves = {}

    left = MAX_NAMES_NBYTES + 10 * nbytes

    def walk(path: str, value: object) -> None:
        nonlocal left
        left -= len(path) + _LEAF_NBYTES
        if left < 0:
            raise FormatError("more leaves than a file of its size can need", where=where, mend="save the file again")
        value = translate(value)
        if isinstance(value, TensorLeaf | bool | int | float | str | bytes) or value is None:
            found[path or "/"] = value
            return
        kind, children = _children(value)
        found[path or "/"] = Symbol(kind)
        for key, child in children:
            walk(f"{path}/{key}", child)

    walk("", tree)
    return found


def _children(value: object) -> tuple[str, Sequence[tuple[str, object]]]:
    if isinstance(value, Call):
        return _parts(value)
    if isinstance(value, Global):
        return str(value), ()
    if isinstance(value, Persistent):
        return "storage", [(str(number), part) for number, part in enumerate(_as_list(value.id))]
    if isinstance(value, dict):
        pairs = cast("dict[object, object]", value).items()
        return "dict", [(key_text(key), item) for key, item in pairs]
    if not isinstance(value, list | tuple):
        raise TypeError(f"{type(value).__name__} is no node of a tree")
    items = _as_list(cast("object", value))
    return ("tuple" if isinstance(value, tuple) else "list"), [(str(number), item) for number, item in enumerate(items)]


def _parts(value: Call) -> tuple[str, Sequence[tuple[str, object]]]:
    if member := enum_member(value):
        return member, ()
    if is_namespace(value):
        return str(value.func), list(namespace_attrs(value).items())
    children: list[tuple[str, object]] = [(key_text(key), item) for key, item in value.pairs]
    if value.args:
        children.append(("@args", list(value.args)))
    if value.items:
        children.append(("@items", list(value.items)))
    if value.state is not MISSING:
        children.append(("@state", value.state))
    return str(value.func), children


def _as_list(value: object) -> list[object]:
    return list(cast("list[object]", value)) if isinstance(value, tuple | list) else [value]


def key_text(key: object) -> str:
    """A key as one segment of a path; a text that looks like a number is quoted."""
    if isinstance(key, str):
        return repr(key) if key.lstrip("-").isdigit() or not key else key
    if isinstance(key, tuple):
        return f"({', '.join(map(key_text, cast('tuple[object, ...]', key)))})"
    return str(key)


def spans(numel: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Cut ``numel`` elements into blocks of at most :data:`BLOCK_BYTES`."""
    step = max(1, BLOCK_BYTES // itemsize)
    for start in range(0, numel, step):
        yield start, min(numel, start + step)


def bits(data: Bytes, dtype: str) -> npt.NDArray[np.uint64] | npt.NDArray[np.uint32] | npt.NDArray[np.uint16] | Bytes:
    """Bytes as one unsigned integer for each element (two for complex128)."""
    size = min(8, width(dtype))
    view: npt.NDArray[np.uint32] = data.view(f"<u{size}")
    return view


_VALUES = {
    "bool": "u1", "int8": "i1", "uint8": "u1", "int4": "i1", "int16": "<i2", "uint16": "<u2", "int32": "<i4",
    "uint32": "<u4", "int64": "<i8", "uint64": "<u8", "float16": "<f2", "float32": "<f4", "float64": "<f8",
}  # fmt: skip


def values(data: Bytes, dtype: str) -> npt.NDArray[np.float64] | None:
    """Elements as float64, None for a type that is no real number.  Exact but for integers beyond 2**53."""
    if dtype == "bfloat16":
        halves = np.zeros(data.size, "<u2")
        halves[1::2] = data.view("<u2")
        data, dtype = halves.view(np.uint8), "float32"
    code = _VALUES.get(dtype)
    # A signalling NaN makes numpy warn where it is merely widened.
    with np.errstate(invalid="ignore"):
        return None if code is None else data.view(code).astype(np.float64)


def show_element(data: Bytes, dtype: str, index: int) -> str:
    """One element for a message: its value, and its bits for a real number."""
    size = width(dtype)
    one = data[index * size : (index + 1) * size]
    if dtype == "str":
        return repr(one.tobytes().decode("utf-32-le", "replace"))
    number = f"0x{one.tobytes()[::-1].hex()}"
    if dtype in _VALUES and "float" not in dtype:
        return str(one.view(_VALUES[dtype])[0])
    value = values(one, dtype)
    return number if value is None else f"{value[0]:.9g} ({number})"


def same_scalar(left: Leaf, right: Leaf) -> bool:
    """Equal in type and value; a NaN equals a NaN, and -0.0 is not 0.0."""
    return type(left) is type(right) and repr(left) == repr(right)
