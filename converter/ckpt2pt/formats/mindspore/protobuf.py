"""Index a MindSpore ``.ckpt`` file: where each tensor lies.  Payload is stepped over, never read.

The wire format, from mindspore 2.10.0 (``mindspore/train/checkpoint_pb2.py`` and ``serialization.py``)::

    Checkpoint      1: Value (repeated)                  entries are concatenated: no magic, no index, no end mark
    Value           1: tag      2: TensorProto           or  3: MapTensorProto
    TensorProto     1: dims (repeated int64)             2: tensor_type     3: tensor_content
    MapTensorProto  1: TensorProto (three of them)       keys, values, status
    trailer         "crc_num" and ten bytes, big-endian, outside the message; only with crc_check=True

Every field but ``dims`` may stand once, where a protobuf library would let the last one win: nobody writes it twice,
and it bounds the work a damaged file can cause.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.mindspore.window import COPY_AGAIN, Window
from ckpt2pt.io.checksums import Piece
from ckpt2pt.io.inputs import InputFile, opened, quoted

_ENTRY, _STRATEGY = 0x0A, 0x08  # the first byte of a checkpoint, and of the other kind of file named .ckpt
_TAG, _TENSOR, _MAP = 0x0A, 0x12, 0x1A
_DIM, _PACKED_DIMS, _TYPE, _CONTENT = 0x08, 0x0A, 0x12, 0x1A
_MAP_MEMBERS = ("keys", "values", "status")

# What a file may ask for before it is called damaged; no training comes near.
_MAX_ENTRIES = 1_000_000
_MAX_NAME_BYTES = 1 << 16
_MAX_RANK = 64
_MAX_DIM = 1 << 48

_TRAILER_MARK = b"crc_num"
_TRAILER_BYTES = len(_TRAILER_MARK) + 10

_SPELLED = ("Int4", "Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Int64", "UInt64",
            "Float16", "BFloat16", "Float32", "Float64", "Bool", "Complex64")  # fmt: skip
_DTYPES = {name.encode(): name.lower() for name in _SPELLED} | {name.encode(): name for name in DTYPE_BYTES}
"""``str(dtype)`` of mindspore, and numpy's spelling, which map parameters use."""

_NUMBER = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
_PLAIN = re.compile(
    rb"\x0a(#)\x0a(#)([\x00-\x11\x13-\x7f]{0,255})"
    rb"(\x12#(?:\x08#){0,64}\x12#[A-Za-z0-9]{1,16}\x1a#)".replace(b"#", _NUMBER)
)
"""Value, tag, tensor, dims, tensor_type and the length of tensor_content: what nearly every entry looks like, at half the price."""
_PLAIN_HEAD = re.compile(rb"\x12(#)((?:\x08#){0,64})\x12(#)([A-Za-z0-9]{1,16})\x1a(#)".replace(b"#", _NUMBER))
"""The last part of it, from the tensor on."""


class _Tensor(NamedTuple):
    dtype: str
    dims: tuple[int, ...]
    offset: int
    nbytes: int


class _Entry(NamedTuple):
    name: str
    tensors: tuple[_Tensor, ...]
    is_map: bool
    start: int
    stop: int


def index_ckpt(path: Path | InputFile) -> dict[str, TensorRef]:
    """Index ``path``.

    Adjacent entries of one name are slices of one tensor; of other repeats the last wins, as in mindspore.  A map
    parameter ``table`` appears as ``table.keys``, ``table.values`` and ``table.status``.
    """
    refs: dict[str, TensorRef] = {}
    with opened(path) as file:
        _recognise(file)
        stop, _ = _trailer(file)
        for slices in _runs(_entries(Window(file), stop)):
            name = slices[0].name
            if slices[0].is_map:
                refs.update(_join_map(file.path, name, slices))
            else:
                refs[name] = _join(file.path, name, slices)
        if not refs:
            raise FormatError("the file holds no parameter", where=file.path, hint=COPY_AGAIN)
    return refs


def ckpt_checksum(path: Path | InputFile) -> int | None:
    """The CRC-32 that a ``.ckpt`` states of itself, if it does."""
    with opened(path) as file:
        return _trailer(file)[1]


def prove_ckpt(path: Path | InputFile, read: Sequence[Piece] = ()) -> bool:
    """Compare a ``.ckpt`` with the checksum in its trailer; False if it has none.

    ``read`` are pieces of the file whose CRC-32 is known, sorted by their first bytes; they are not read again.
    """
    with opened(path) as file:
        stop, wanted = _trailer(file)
        if wanted is None:
            return False
        found = file.crc32(0, stop, read=read)
        maps = [entry for entry in _entries(Window(file), stop) if entry.is_map] if found != wanted else []
        if maps:
            # The writer does not add map parameters to its sum (mindspore 2.10.0, serialization.py, _exec_save).
            edges = [0, *(edge for entry in maps for edge in (entry.start, entry.stop)), stop]
            found = 0
            for start, end in zip(edges[::2], edges[1::2], strict=True):
                found = file.crc32(start, end, found, read)
        if found != wanted:
            raise FormatError(
                f"the CRC-32 of the content is {found:#010x}, the file's own crc_num says {wanted:#010x}",
                where=file.path,
                hint="the file is damaged: copy it again from its source, or convert an earlier checkpoint",
            )
    return True


def _recognise(file: InputFile) -> None:
    """Refuse by name what is known not to be a readable checkpoint."""
    head = file.read(0, min(4, file.size))
    if not head:
        raise FormatError("the file is empty", where=file.path, hint=COPY_AGAIN)
    if head[0] == _STRATEGY:
        raise FormatError(
            "this is a parallel strategy file (ParallelStrategyMap), not a checkpoint, although both end in .ckpt",
            where=file.path,
            hint="point at the checkpoints (rank_0/...ckpt), not at the folder strategy/",
        )
    # Magic 0x7F3A5ED8..DA, little-endian: AES-GCM, AES-CBC, SM4-CBC.
    if head[0] in b"\xd8\xd9\xda" and head[1:] == b"\x5e\x3a\x7f":
        raise FormatError(
            "the checkpoint is encrypted",
            where=file.path,
            hint="decrypt it: mindspore.load_checkpoint(..., dec_key=..., dec_mode=...), then save_checkpoint without enc_key",
        )
    if head == b"PK\x03\x04":
        raise FormatError(
            "this is a zip archive (torch writes such .pt files), not a MindSpore checkpoint",
            where=file.path,
            hint=f"point {ref('source.path')} at the MindSpore checkpoint",
        )


def _trailer(file: InputFile) -> tuple[int, int | None]:
    """(where the message ends, checksum or None)."""
    if file.size < _TRAILER_BYTES:
        return file.size, None
    stop = file.size - _TRAILER_BYTES
    tail = file.read(stop, _TRAILER_BYTES)
    if not tail.startswith(_TRAILER_MARK):
        return file.size, None
    return stop, int.from_bytes(tail[len(_TRAILER_MARK) :], "big")


def _runs(entries: Iterable[_Entry]) -> Iterator[list[_Entry]]:
    """Entries of one name that stand in a row."""
    run: list[_Entry] = []
    for entry in entries:
        if run and entry.name != run[0].name:
            yield run
            run = []
        run.append(entry)
    if run:
        yield run


def _entries(window: Window, stop: int) -> Iterator[_Entry]:
    count = pos = 0
    while pos < stop:
        entry = _plain_entry(window, pos, stop)
        if entry is None:
            key, first, pos_after = next(window.fields(pos, stop))
            if key != _ENTRY:
                window.skip(key, pos, known=1)
                pos = pos_after
                continue
            entry = _entry(window, pos, first, pos_after)
        count += 1
        if count > _MAX_ENTRIES:
            raise window.bad(f"more than {_MAX_ENTRIES} parameters", pos)
        yield entry
        pos = entry.stop


def _plain_entry(window: Window, pos: int, stop: int) -> _Entry | None:
    """The entry at ``pos``, if every length agrees with :data:`_PLAIN`; whatever is odd is left to :func:`_entry`."""
    plain = window.match(_PLAIN, pos)
    if plain is None:
        return None
    base, found = plain
    size, name_size, name, head = found.groups()
    known = _plain_head(head)
    if known is None:
        return None
    dtype, dims, nbytes = known
    content = base + found.end()
    end = content + nbytes
    if base + found.end(1) + _number(size) != end or _number(name_size) != len(name) or end > stop:
        return None
    return _Entry(name.decode(), (_Tensor(dtype, dims, content, nbytes),), False, pos, end)


@lru_cache(4096)
def _number(varint: bytes) -> int:
    return sum((byte & 0x7F) << (7 * index) for index, byte in enumerate(varint))


@lru_cache(4096)
def _plain_head(head: bytes) -> tuple[str, tuple[int, ...], int] | None:
    """Type, dimensions and bytes of payload: most of a file's tensors share theirs with many others."""
    found = _PLAIN_HEAD.fullmatch(head)
    if found is None:
        return None
    size, fields, dtype_size, dtype, content_size = found.groups()
    dims = tuple(_number(field[1:]) for field in re.findall(rb"\x08" + _NUMBER, fields))
    nbytes = _number(content_size)
    if (
        len(head) - found.end(1) + nbytes != _number(size)
        or len(dtype) != _number(dtype_size)
        or dtype not in _DTYPES
        or max(dims, default=0) > _MAX_DIM
    ):
        return None
    return _DTYPES[dtype], dims, nbytes


def _entry(window: Window, pos: int, start: int, stop: int) -> _Entry:
    name: str | None = None
    tensors: tuple[_Tensor, ...] = ()
    is_map = False
    for key, first, end in window.fields(start, stop):
        if key == _TAG and name is None:
            name = _name(window, first, end)
        elif key == _TENSOR and not tensors:
            tensors = (_tensor(window, first, end),)
        elif key == _MAP and not tensors:
            tensors, is_map = _map(window, first, end), True
        else:
            window.skip(key, start, known=3)
    if name is None or not tensors:
        raise window.bad(f"an entry without {'a name' if name is None else 'a tensor'}", pos)
    return _Entry(name, tensors, is_map, pos, stop)


def _name(window: Window, start: int, stop: int) -> str:
    if stop - start > _MAX_NAME_BYTES:
        raise window.bad(f"a parameter name of {stop - start} bytes", start)
    try:
        return window.take(start, stop).decode()
    except UnicodeDecodeError as error:
        raise window.bad(f"a parameter name that is not UTF-8 ({error.reason})", start) from error


def _map(window: Window, start: int, stop: int) -> tuple[_Tensor, ...]:
    tensors: list[_Tensor] = []
    for key, first, end in window.fields(start, stop):
        if key == _ENTRY and len(tensors) < len(_MAP_MEMBERS):
            tensors.append(_tensor(window, first, end))
        else:
            window.skip(key, start, known=1)
    if len(tensors) != len(_MAP_MEMBERS):
        raise window.bad(f"a map parameter of {len(tensors)} tensors, expected keys, values and status", start)
    return tuple(tensors)


def _tensor(window: Window, start: int, stop: int) -> _Tensor:
    dims: list[int] = []
    dtype: str | None = None
    offset = nbytes = -1
    for key, first, end in window.fields(start, stop):
        if key == _DIM:
            dims.append(first)
        elif key == _TYPE and dtype is None:
            dtype = _dtype(window, first, end)
        elif key == _CONTENT and offset < 0:
            offset, nbytes = first, end - first
        elif key == _PACKED_DIMS:
            dims.extend(window.packed(first, end))
        else:
            window.skip(key, start, known=3)
        if len(dims) > _MAX_RANK:
            raise window.bad(f"a tensor of more than {_MAX_RANK} dimensions", start)
    if dtype is None or offset < 0:
        raise window.bad(f"a tensor without {'a type' if dtype is None else 'content'}", start)
    if dims and max(dims) > _MAX_DIM:
        sizes = [dim - (1 << 64) if dim >> 63 else dim for dim in dims]
        raise window.bad(f"a tensor of shape {quoted(sizes)}", start)
    return _Tensor(dtype, tuple(dims), offset, nbytes)


def _dtype(window: Window, start: int, stop: int) -> str:
    if stop - start > _MAX_NAME_BYTES:
        raise window.bad(f"the name of a type, {stop - start} bytes long", start)
    raw = window.take(start, stop)
    known = _DTYPES.get(raw)
    if known is not None:
        return known
    if len(raw) > _MAX_RANK or not raw.isascii() or not raw.decode().isidentifier():
        raise window.bad(f"{quoted(raw)} is no type of a tensor", start)
    # Not an error yet: what nobody wants may have a type nobody knows, as `random_op` of before mindspore 2.4.
    return raw.decode()


def _join_map(path: str, name: str, slices: Sequence[_Entry]) -> dict[str, TensorRef]:
    refs: dict[str, TensorRef] = {}
    for index, member in enumerate(_MAP_MEMBERS):
        parts = [entry.tensors[index] if entry.is_map else entry.tensors[0] for entry in slices]
        # Unlike a sliced tensor's, a slice of a map has its own rows in its dims (serialization.py, _write_mapparameter).
        rows = sum(part.dims[0] for part in parts if part.dims)
        parts = [part._replace(dims=(rows, *part.dims[1:])) if part.dims else part for part in parts]
        entries = [entry._replace(tensors=(part,)) for entry, part in zip(slices, parts, strict=True)]
        refs[f"{name}.{member}"] = _join(path, f"{name}.{member}", entries)
    return refs


def _join(path: str, name: str, slices: Sequence[_Entry]) -> TensorRef:
    """The tensor that adjacent entries make up."""
    dtype, dims, offset, nbytes = slices[0].tensors[0]
    extents: tuple[Extent, ...]
    if len(slices) == 1:
        extents = (Extent(path, offset, nbytes),) if nbytes else ()
    else:
        _check_alike(path, name, slices)
        parts = [entry.tensors[0] for entry in slices]
        extents = tuple([Extent(path, part.offset, part.nbytes) for part in parts if part.nbytes])
        nbytes = sum(part.nbytes for part in parts)
    width = DTYPE_BYTES.get(dtype)
    if dtype == "str":
        # dims are [0] whatever the text; a character is four bytes, UTF-32 (numpy `<U`).
        dims, wanted = (), nbytes + -nbytes % 4
    elif width is None:
        wanted = nbytes
    else:
        if dims == (0,) and nbytes == width:
            dims = ()  # a scalar as mindspore 2.0-alpha wrote it
        wanted = math.prod(dims) * width
    if nbytes != wanted:
        twice = f" ({len(slices)} entries of this name stand in a row)" if len(slices) > 1 else ""
        raise FormatError(
            f"{dtype}{quoted(list(dims))} takes {quoted(wanted)} bytes, the file holds {nbytes:,}{twice}",
            where=f"{path}, parameter {quoted(name)}",
            hint=COPY_AGAIN,
        )
    return TensorRef(name, dtype, dims, extents)


def _check_alike(path: str, name: str, slices: Sequence[_Entry]) -> None:
    kinds = {(entry.is_map, *entry.tensors[0][:2]): None for entry in slices}
    if len(kinds) > 1:
        spelled = [f"{'a map of ' if is_map else ''}{dtype}{quoted(list(dims))}" for is_map, dtype, dims in kinds]
        raise FormatError(
            f"slices of one parameter differ: {' and '.join(spelled[:2])}",
            where=f"{path}, parameter {quoted(name)}",
            hint=COPY_AGAIN,
        )
