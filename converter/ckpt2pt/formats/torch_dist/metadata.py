"""``.metadata``: the tensors of a distributed checkpoint, their chunks, and the item of a file that holds each chunk.

A pickle of ``torch.distributed.checkpoint.metadata.Metadata`` (torch 2.1 to 2.15), read inert.  Megatron-LM adds
``mcore_data`` up to 0.15, whose class is then one of its own (megatron/core/dist_checkpointing/strategies/torch.py,
``MCoreMetadata``): the shape that a tensor had before it was flattened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

from ckpt2pt.core.extents import DTYPE_BYTES, Shape
from ckpt2pt.errors import CoverageError, FormatError, MissingInputError, ref
from ckpt2pt.formats.torchfile.pickles import Records, Shorten, read_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Record, Value
from ckpt2pt.io.inputs import read_whole
from ckpt2pt.io.jsontext import parse_json
from ckpt2pt.io.paths import is_there, listing, status

METADATA = ".metadata"
METADATA_JSON = "metadata.json"
SUFFIX = ".distcp"

_HINT = "copy the whole folder again from where it was written"
_MODULE = "torch.distributed.checkpoint.metadata"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_FILE = re.compile(r"[\w-][\w.-]*\.distcp", re.ASCII)
_WHOLE_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+\.param_state/shard_\S+")
_MAX_AXES = 16
_MAX_OPCODES = 150_000_000
"""About 73 for each chunk: two million chunks, as many as 256 MiB hold."""


class Item(NamedTuple):
    """``nbytes`` bytes of a file from ``offset`` on: an archive of torch.save."""

    file: str
    offset: int
    nbytes: int


class Chunk(NamedTuple):
    """A box of a tensor, and the item that holds it."""

    origin: Shape
    shape: Shape
    item: Item


class Entry(NamedTuple):
    """A tensor; its chunks cover it, which is not checked here.  ``unflattened`` is the shape it had before it was flattened."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]
    unflattened: Shape | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """``tensors`` by key as Megatron names them; ``objects`` are what was pickled whole.

    ``extra`` are ``.distcp`` files that hold no part of the checkpoint.
    """

    folder: Path
    tensors: Mapping[str, Entry]
    objects: Mapping[str, Item]
    extra: tuple[str, ...]

    @property
    def items(self) -> dict[str, list[Item]]:
        """The items that hold tensors, by the name of their file."""
        found: dict[str, list[Item]] = {}
        for chunk in (chunk for entry in self.tensors.values() for chunk in entry.chunks):
            found.setdefault(chunk.item.file, []).append(chunk.item)
        return found

    @property
    def whole_states(self) -> bool:
        """Whether the optimizer's state of a model-parallel rank is one object, as with ``dp_zero_gather_scatter``."""
        return any(_WHOLE_STATE.fullmatch(key) for key in self.objects)


def is_distributed(folder: Path) -> bool:
    """Whether a folder holds a distributed checkpoint, or what is left of one."""
    option = ref("source.path")
    return is_there(folder / METADATA, option) or bool(listing(folder, f"*{SUFFIX}", option))


def read_metadata(folder: Path) -> Metadata:
    """Read ``.metadata`` and compare it with the files that are there.

    Raises :class:`MissingInputError` where a file is missing, :class:`FormatError` where one was cut or is of another format,
    :class:`CoverageError` where a part is claimed twice.
    """
    _check_format(folder)
    path = folder / METADATA
    if not is_there(path, ref("source.path")):
        raise MissingInputError(
            "there is no .metadata, which is written last: the checkpoint was not saved to its end, or not copied whole",
            where=folder,
            hint=f"{_HINT}, with its hidden files",
        )
    data = read_whole(path, ref("source.path"))
    tree = read_pickle(data, where=str(path), opcodes=_MAX_OPCODES, shorten=_SHORTEN, records=_RECORDS)
    name, module = ("MCoreMetadata", _MCORE) if _is(tree, "MCoreMetadata", _MCORE) else ("Metadata", _MODULE)
    state = _state(tree, name, path, module)
    items = _items(_dictionary(state.get("storage_data"), path), path)
    shapes = _unflattened(state.get("mcore_data"), path)
    tensors: dict[str, Entry] = {}
    objects: dict[str, Item] = {}
    for key, value in _dictionary(state.get("state_dict_metadata"), path).items():
        if not isinstance(key, str):
            _refuse("a tensor has no name", path)
        if _is(value, "BytesStorageMetadata"):
            objects[key] = _take(items, (key, None), path)
            continue
        held = _state(value, "TensorStorageMetadata", path)
        shape = _sizes(held.get("size"), path)
        chunks = tuple(
            Chunk(origin, box, _take(items, (key, origin), path)) for origin, box in _boxes(held.get("chunks"), path)
        )
        tensors[key] = Entry(_dtype(held.get("properties"), key, path), shape, chunks, shapes.get(key))
    if items:
        key, origin = next(iter(items))
        _refuse(f"{len(items)} items are of no known tensor, such as {key} at {origin}", path)
    found = [entry.item for tensor in tensors.values() for entry in tensor.chunks]
    files = _check_files(folder, [*found, *objects.values()])
    extra = tuple(file.name for file in listing(folder, f"*{SUFFIX}") if file.name not in files)
    return Metadata(folder=folder, tensors=tensors, objects=objects, extra=extra)


def _check_format(folder: Path) -> None:
    """``metadata.json`` names the format, where it is there: nothing else tells zarr from torch_dist."""
    path = folder / METADATA_JSON
    if not is_there(path, ref("source.path")):
        return
    try:
        stated = parse_json(read_whole(path, ref("source.path"), 1 << 20))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"cannot be read as JSON: {error}", where=path, hint=_HINT) from error
    facts = cast("dict[str, object]", stated) if isinstance(stated, dict) else {}
    backend, version = facts.get("sharded_backend"), facts.get("sharded_backend_version")
    if (backend, version) != ("torch_dist", 1):
        raise FormatError(
            f"the format is {backend!r}, version {version!r}; ckpt2pt reads 'torch_dist', version 1",
            where=path,
            hint="load the checkpoint with Megatron-LM and save it again with --ckpt-format torch_dist",
        )


def _items(stored: Mapping[Value, Value], path: Path) -> dict[tuple[str, Shape | None], Item]:
    """(key, origin of the chunk) -> item; the origin of an object is None."""
    found: dict[tuple[str, Shape | None], Item] = {}
    for index, value in stored.items():
        key, origin, _ = _fields(index, _INDEX, path)
        file, offset, nbytes, transformed = _fields(value, _INFO, path)
        if not isinstance(key, str) or not isinstance(file, str) or not _FILE.fullmatch(file):
            _refuse("an item has no name, or no file of the folder itself", path)
        if type(offset) is not int or type(nbytes) is not int or offset < 0 or nbytes < 1:
            _refuse(f"an item of {key} is at no place of a file", path)
        if transformed:
            _refuse(f"{key} is compressed or encrypted ({transformed!r})", path)
        where = key, None if origin is None else _sizes(origin, path)
        if where in found:
            raise CoverageError(f"{key} is claimed twice at {where[1]}", where=path, hint=_HINT)
        found[where] = Item(file, offset, nbytes)
    return found


def _take(items: dict[tuple[str, Shape | None], Item], where: tuple[str, Shape | None], path: Path) -> Item:
    found = items.pop(where, None)
    if found is None:
        raise CoverageError(
            f"no file holds {where[0]}" + ("" if where[1] is None else f" from {list(where[1])} on"),
            where=path,
            hint=_HINT,
        )
    return found


def _check_files(folder: Path, items: list[Item]) -> set[str]:
    """Items lie one behind the other and end where their file ends."""
    held: dict[str, list[Item]] = {}
    for item in items:
        held.setdefault(item.file, []).append(item)
    for name, inside in held.items():
        inside.sort(key=lambda item: item.offset)
        seen = status(folder / name, ref("source.path"))
        if seen is None:
            raise MissingInputError(
                f"{name} is not there, which holds {len(inside)} parts of the checkpoint", where=folder, hint=_HINT
            )
        stop = inside[-1].offset + inside[-1].nbytes
        if seen.st_size != stop:
            raise FormatError(
                f"the file has {seen.st_size} bytes, and {METADATA} says that it ends at byte {stop}",
                where=folder / name,
                hint=_HINT,
            )
        for one, other in pairwise(inside):
            if one.offset + one.nbytes > other.offset:
                raise CoverageError(
                    f"two parts of the checkpoint claim byte {other.offset}", where=folder / name, hint=_HINT
                )
    return set(held)


def _unflattened(value: Value, path: Path) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for key, facts in _dictionary(value, path).items() if value is not None else ():
        shape = facts.get("nd_reformulated_orig_global_shape") if isinstance(facts, dict) else None
        if isinstance(key, str) and shape is not None:
            found[key] = _sizes(shape, path)
    return found


def _boxes(value: Value, path: Path) -> Iterator[tuple[Shape, Shape]]:
    if not isinstance(value, list):
        _refuse("a tensor has no list of chunks", path)
    for chunk in value:
        origin, shape = _fields(chunk, _CHUNK, path)
        yield _sizes(origin, path), _sizes(shape, path)


def _dtype(value: Value, key: str, path: Path) -> str:
    """The first of the properties: torch pickles them as a tuple of five, or of six since 2.9."""
    properties = value.state if _is(value, "TensorProperties") and isinstance(value, Call) else None
    first = properties[0] if isinstance(properties, tuple) and properties else None
    if not isinstance(first, Global) or first.module != "torch" or first.name not in DTYPE_BYTES:
        _refuse(f"{key} is of a type that cannot be read: {first!r:.80}", path)
    return first.name


def _sizes(value: Value, path: Path) -> Shape:
    """A ``torch.Size``, or a plain tuple."""
    if not isinstance(value, tuple) or len(value) > _MAX_AXES:
        _refuse("a size is not a tuple of integers", path)
    found = tuple(number for number in value if type(number) is int and 0 <= number < 1 << 62)
    if len(found) != len(value):
        _refuse("a size is not a tuple of integers", path)
    return found


def _is(value: Value, name: str, module: str = _MODULE) -> bool:
    return isinstance(value, Call) and value.func == Global(module, name)


def _state(value: Value, name: str, path: Path, module: str = _MODULE) -> Mapping[Value, Value]:
    """The attributes of an object of a class."""
    if not isinstance(value, Call) or not _is(value, name, module) or not isinstance(value.state, dict):
        _refuse(f"there is no {name} where one has to be", path)
    return value.state


def _fields(value: Value, kind: Global, path: Path) -> tuple[Value, ...]:
    """The attributes of an object of a class that :data:`_RECORDS` lists."""
    if isinstance(value, Record) and value[0] == kind:
        return value[1:]
    if not isinstance(value, Call) or value.func != kind or not isinstance(value.state, tuple):
        _refuse(f"there is no {kind.name} where one has to be", path)
    return value.state


def _attributes(*names: str) -> Callable[[Value], Value]:
    """The values of these attributes; the dictionary, which the pickle could recall, is emptied."""

    def shorten(state: Value) -> Value:
        if not isinstance(state, dict):
            return None
        found = tuple(state.get(name) for name in names)
        state.clear()
        return found

    return shorten


def _size(args: Value) -> Value:
    return args[0] if isinstance(args, tuple) and len(args) == 1 else None


_INDEX, _CHUNK = Global(_MODULE, "MetadataIndex"), Global(_MODULE, "ChunkStorageMetadata")
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
# Three objects for each chunk; with their dictionaries they would take twice the memory.
_RECORDS: Records = {
    _INDEX: ("fqn", "offset", "index"),
    _CHUNK: ("offsets", "sizes"),
    _INFO: ("relative_path", "offset", "length", "transform_descriptors"),
}
# Those that do not look as Python's pickler writes them.
_SHORTEN: Shorten = {kind: _attributes(*names) for kind, names in _RECORDS.items()} | {Global("torch", "Size"): _size}


def _dictionary(value: Value, path: Path) -> Mapping[Value, Value]:
    if not isinstance(value, dict):
        _refuse("a table is missing", path)
    return value


def _refuse(what: str, path: Path) -> NoReturn:
    raise FormatError(f"the index of the checkpoint cannot be read: {what}", where=path, hint=_HINT)
