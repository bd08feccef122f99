"""``metadata.json`` of a sharded checkpoint: the global shape of each tensor, and which file holds which part of it.

    state_dict_metadata   NAME: {properties {dtype}, global_shape, axis_fragmentations, layout, chunk [{global_offset, local_shape}]}
    storage_data          "('NAME', (5,))": [{file_name, storage_rank, rank_group}]

``global_offset`` is one number, whatever the number of axes: the place of the part among all parts in row-major order, not a
number of elements.  MindFormers 2.0.0 and 2.1.0, mindformers/checkpoint/metadata.py (``save_metadata``) and sharded_tensor.py
(``_rank_id_with_slice_id``, which numbers the slices; its docstring says elements).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

from ckpt2pt.core.extents import Shape
from ckpt2pt.core.tensor import dense_strides
from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.mindformers.folder import METADATA, file_kind
from ckpt2pt.io.inputs import quoted, read_whole
from ckpt2pt.io.jsontext import parse_json
from ckpt2pt.io.paths import is_file

_SHARD = re.compile(r"\('([^'\\]+)', \((\d{1,18}),\)\)")
_MAX_BYTES = 1 << 30
_MAX_AXES = 16
_MAX_SIZE = 1 << 48
_HINT = "copy the whole iteration again from where it was written"
_DTYPES = {
    "float32": "float32", "bfloat16": "bfloat16", "float16": "float16", "float64": "float64", "bool": "bool",
    "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64", "uint8": "uint8",
}  # fmt: skip


class Chunk(NamedTuple):
    """A part of a tensor, in elements, and the files that hold it: each of them the same bytes."""

    origin: Shape
    shape: Shape
    files: tuple[str, ...]


class Entry(NamedTuple):
    """A tensor, and the mesh that it is laid out on: sizes by name, and the ranks of its pipeline stage."""

    dtype: str
    shape: Shape
    fragments: Shape
    chunks: tuple[Chunk, ...]
    mesh: Mapping[str, int]
    ranks: Shape


def read_metadata(folder: Path) -> dict[str, Entry] | None:
    """Every tensor by its name; None where there is no ``metadata.json``.

    Raises :class:`FormatError` for parts that leave gaps or overlap, sizes that cannot be, and names of files elsewhere.
    """
    path = folder / METADATA
    if not is_file(path, ref("source.path")):
        return None
    try:
        document = parse_json(read_whole(path, ref("source.path"), _MAX_BYTES))
    except ValueError as error:
        raise FormatError(f"not a JSON document: {str(error)[:200]}", where=path, hint=_HINT) from error
    try:
        top = _mapping(document, "the document")
        files = _files(_mapping(top.get("storage_data"), "storage_data"))
        tensors = _mapping(top.get("state_dict_metadata"), "state_dict_metadata")
        found = {name: _entry(name, _mapping(value, quoted(name)), files) for name, value in tensors.items()}
        if files:
            (name, number), _ = files.popitem()
            raise ValueError(f"storage_data has a part {number} of {quoted(name)}, which state_dict_metadata has not")
    except ValueError as error:
        raise FormatError(str(error), where=path, hint=_HINT) from error
    return found


def _entry(name: str, value: Mapping[str, object], files: dict[tuple[str, int], tuple[str, ...]]) -> Entry:
    shape, fragments = (
        _sizes(value.get(key), f"{key} of {quoted(name)}") for key in ("global_shape", "axis_fragmentations")
    )
    if len(shape) != len(fragments) or any(
        not count or length % count for length, count in zip(shape, fragments, strict=True)
    ):
        raise ValueError(
            f"{quoted(name)} of shape {list(shape)} is in {list(fragments)} fragments, which do not divide it"
        )
    local = tuple(length // count for length, count in zip(shape, fragments, strict=True))
    listed = _list(value.get("chunk"), f"chunk of {quoted(name)}")
    if len(listed) != math.prod(fragments):
        raise ValueError(f"{len(listed)} parts of {quoted(name)} are there, and {math.prod(fragments)} make it up")
    chunks: dict[int, Chunk] = {}
    for one in listed:
        part = _mapping(one, f"a part of {quoted(name)}")
        offset = _sizes(part.get("global_offset"), f"global_offset of {quoted(name)}")
        own = _sizes(part.get("local_shape"), f"local_shape of {quoted(name)}")
        if len(offset) != 1 or offset[0] >= len(listed) or offset[0] in chunks or own != local:
            raise ValueError(
                f"{quoted(name)} has a part {list(offset)} of shape {list(own)}; each number below {len(listed)} is there once, "
                f"and a part has the shape {list(local)}"
            )
        number = offset[0]
        if (name, number) not in files:
            raise ValueError(f"storage_data names no file for part {number} of {quoted(name)}")
        chunks[number] = Chunk(_origin(number, fragments, local), local, files.pop((name, number)))
    properties = _mapping(value.get("properties"), f"properties of {quoted(name)}")
    spelled = str(properties.get("dtype"))
    mesh, ranks = _mesh(value.get("layout"), name)
    dtype = _DTYPES.get(spelled.lower(), spelled)
    return Entry(dtype, shape, fragments, tuple(chunks[number] for number in sorted(chunks)), mesh, ranks)


def _origin(number: int, fragments: Shape, local: Shape) -> Shape:
    strides = dense_strides(fragments)
    return tuple(
        number // stride % count * length for stride, count, length in zip(strides, fragments, local, strict=True)
    )


def _files(storage: Mapping[str, object]) -> dict[tuple[str, int], tuple[str, ...]]:
    """(name, number of the part) -> files."""
    found: dict[tuple[str, int], tuple[str, ...]] = {}
    for key, value in storage.items():
        parsed = _SHARD.fullmatch(key)
        listed = tuple(dict.fromkeys(_names(value, key)))
        if parsed is None or not listed or found.setdefault((parsed[1], int(parsed[2])), listed) is not listed:
            raise ValueError(
                f"storage_data has the key {quoted(key)}, which names no part of a tensor, or one that is there twice"
            )
    return found


def _names(value: object, key: str) -> Iterator[str]:
    for one in _list(value, quoted(key)):
        name = _mapping(one, quoted(key)).get("file_name")
        if not isinstance(name, str) or not file_kind(name):
            raise ValueError(f"{quoted(key)} is in {quoted(str(name))}, which is no name of a file of this folder")
        yield name


def _mesh(value: object, name: str) -> tuple[Mapping[str, int], Shape]:
    """The sizes of a layout's axes by their names, and its ranks; nothing where there is no layout."""
    if value is None:
        return {}, ()
    layout = _mapping(value, f"layout of {quoted(name)}")
    if layout.get("interleaved_parallel") not in {False, None}:
        raise ValueError(f"{quoted(name)} has a layout with interleaved_parallel, which is not read")
    sizes, ranks = (
        _sizes(layout.get(key) or [], f"{key} of {quoted(name)}", most=1 << 24)
        for key in ("device_matrix", "rank_list")
    )
    names = [str(one) for one in _list(layout.get("alias_name") or [], f"alias_name of {quoted(name)}")]
    return dict(zip(names, sizes, strict=False)), ranks


def _mapping(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    return cast("Mapping[str, object]", value)


def _list(value: object, what: str) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list")
    return cast("list[object]", value)


def _sizes(value: object, what: str, *, most: int = _MAX_AXES) -> Shape:
    items = _list(value, what)
    sizes = tuple(item for item in items if type(item) is int and 0 <= item <= _MAX_SIZE)
    if len(sizes) != len(items) or len(items) > most:
        raise ValueError(f"{what} is {quoted(str(items))}, which are no sizes")
    return sizes
