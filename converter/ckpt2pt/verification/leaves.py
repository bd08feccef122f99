"""What a checkpoint file holds, leaf by leaf, whoever wrote it; payload is read in blocks, and only when asked for.

    x.pt                  -> {"/args/seed": 1234, "/model/language_model/encoder/layers.0.mlp...weight": TensorLeaf, ...}
    x.ckpt, x.safetensors -> {"language_model.encoder.layers.0...weight": TensorLeaf, ...}

The second readings (verify, compare, show) stand on this and not on the engine's plans and casts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef, View
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.msadapter import read_tree
from ckpt2pt.formats.torchfile.pickles import read_pickle
from ckpt2pt.formats.torchfile.trees import (
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
)
from ckpt2pt.io.access import access_error
from ckpt2pt.verification.gather import Elements, Files, Gathered, stored, strided, width

MAX_NAMES_NBYTES = 64 << 20
"""Bytes that the paths of leaves may take beyond ten times the pickle's: names may be long, and stand in each path below."""
_LEAF_NBYTES = 150

Scalar: TypeAlias = bool | int | float | str | bytes | None


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
    elements = Gathered(ref.dtype, *ref.gather) if ref.gather else stored(ref.dtype, shape, ref.extents)
    return TensorLeaf(ref.dtype, shape, elements, ref.extents)


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


def open_pt(path: Path, *, allow: Collection[str] = (), foreign: bool = True) -> Leaves:
    """Every leaf of a ``.pt``; nothing in it is executed.  Without ``foreign`` it has to be one that torch reads."""
    archive = Archive.open(path)
    storages = archive.storages

    def translate(value: object) -> object:
        if isinstance(value, Call | StoredTensor) and (found := as_tensor(value)):
            return _view(found, storages, path)
        if isinstance(value, Persistent) and (storage := as_storage(value)):
            dtype, key, location, numel = storage
            whole = StoredTensor(
                dtype=dtype, key=key, location=location, storage_numel=numel, offset=0, shape=(numel,), stride=(1,)
            )
            return _view(whole, storages, path)
        return value

    tree = read_tree(archive, allow=allow) if foreign else read_pickle(archive.pickle, where=str(path), allow=allow)
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
            hint="copy the file again from where it was made",
        )
    elements = strided(found.dtype, View((0,) * len(found.shape), found.shape, found.stride, found.offset, (extent,)))
    # What lies in the file as it is can be named, the rest is somewhere in its storage.
    part = Extent(extent.path, extent.offset + found.offset * size, found.numel * size)
    return TensorLeaf(found.dtype, found.shape, elements, (part if found.is_contiguous else extent,))


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
            raise FormatError("more leaves than a file of its size can need", where=where, hint="save the file again")
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


def same_scalar(left: Leaf, right: Leaf) -> bool:
    """Equal in type and value; a NaN equals a NaN, and -0.0 is not 0.0."""
    return type(left) is type(right) and repr(left) == repr(right)
