"""Index a ``.safetensors`` file as MindSpore writes it: where each tensor lies.  Payload is not read.

Eight bytes with the length of the header, a JSON header, the data without a gap.  What MindSpore puts into
``__metadata__`` (mindspore 2.10.0, ``serialization.py``, ``_exec_save``): ``format: ms``, ``crc_num``,
``remove_redundancy``, and for each int4 tensor a key of its name, because the tensor itself says ``I8``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.mindspore.window import COPY_AGAIN
from ckpt2pt.io.checksums import Piece, crc32
from ckpt2pt.io.inputs import InputFile, opened, quoted

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself (huggingface/safetensors, tensor.rs, MAX_HEADER_SIZE)."""

_METADATA = "__metadata__"
_MAX_MEMBERS = 10_000_000  # of the JSON header: a million tensors; bounds the memory that parsing takes
_MAX_RANK = 64
_MAX_DIM = 1 << 48
_DTYPES = {
    "BOOL": "bool", "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64", "C64": "complex64",
}  # fmt: skip


def index_safetensors(path: Path | InputFile, *, partial: bool = False) -> dict[str, TensorRef]:
    """Index ``path``.

    A file saved with ``remove_redundancy=True`` holds only this rank's share and is refused, unless ``partial``
    says that a listing is wanted and not a conversion.
    """
    with opened(path) as file:
        refs, metadata = _contents(file)
        if metadata.get("remove_redundancy", "").lower() == "true" and not partial:
            raise FormatError(
                "the file was saved with remove_redundancy=True: it lacks what only other data-parallel ranks hold",
                where=file.path,
                hint="merge it first: mindspore.load_checkpoint(..., remove_redundancy=True) on all ranks, "
                "then save_checkpoint without remove_redundancy",
            )
    return refs


def safetensors_checksum(path: Path | InputFile) -> str | None:
    """The CRC-32 that MindSpore has put into a ``.safetensors``, if it did."""
    with opened(path) as file:
        return _contents(file)[1].get("crc_num")


def prove_safetensors(path: Path | InputFile, read: Sequence[Piece] = ()) -> bool:
    """Compare a ``.safetensors`` with the checksum in its metadata; False if it has none.

    ``read`` are pieces of the file whose CRC-32 is known, sorted by their first bytes; they are not read again.
    """
    with opened(path) as file:
        refs, metadata = _contents(file)
        wanted = metadata.get("crc_num")
        if wanted is None:
            return False
        found = 0
        for name in sorted(refs):  # names and payloads, in order of the names (serialization.py, _exec_save)
            found = crc32(name.encode(), found)
            for extent in refs[name].extents:
                found = file.crc32(extent.offset, extent.offset + extent.nbytes, found, read)
        if wanted != str(found):
            raise FormatError(
                f"the CRC-32 of the content is {found}, the file's own crc_num says {quoted(wanted)}",
                where=file.path,
                hint="the file is damaged: copy it again from its source, or convert an earlier checkpoint",
            )
    return True


def _contents(file: InputFile) -> tuple[dict[str, TensorRef], Mapping[str, str]]:
    """Every tensor, and the metadata."""
    header, data_start = _header(file)
    metadata = _metadata(header.pop(_METADATA, {}), file)
    refs: dict[str, TensorRef] = {}
    for name, entry in header.items():
        refs[name] = _tensor(file, name, entry, data_start=data_start, is_int4=metadata.get(name) == "Int4")
    _check_cover(file, refs, data_start)
    return refs, metadata


def _header(file: InputFile) -> tuple[dict[str, object], int]:
    """(header, where the data begins)."""
    if not file.size:
        raise FormatError("the file is empty", where=file.path, hint=COPY_AGAIN)
    if file.size < LENGTH_BYTES:
        raise _bad(f"{file.size} bytes are too few for a safetensors file", file)
    nbytes = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    if nbytes > MAX_HEADER_BYTES:
        raise _bad(f"a header of {nbytes:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed", file)
    if LENGTH_BYTES + nbytes > file.size:
        raise _bad(f"the file is cut short: a header of {nbytes:,} bytes, but {file.size:,} bytes in all", file)
    raw = file.read(LENGTH_BYTES, nbytes)
    if sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_MEMBERS:
        raise _bad(f"a header of more than {_MAX_MEMBERS} members", file)
    try:
        header: object = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a name twice, or nested without end
        raise _bad(f"the header cannot be read as JSON: {str(error)[:200]}", file) from error
    if not isinstance(header, dict):
        raise _bad("the header is not a JSON object", file)
    return cast("dict[str, object]", header), LENGTH_BYTES + nbytes


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {quoted(twice)} is there twice")
    return found


def _metadata(value: object, file: InputFile) -> Mapping[str, str]:
    texts = cast("dict[str, object]", value) if isinstance(value, dict) else {"": value}
    if not all(isinstance(text, str) for text in texts.values()):
        raise _bad(f"{_METADATA} is not an object of strings", file)
    return cast("dict[str, str]", texts)


def _tensor(file: InputFile, name: str, entry: object, *, data_start: int, is_int4: bool) -> TensorRef:
    if not isinstance(entry, dict):
        raise _bad("the entry is not a JSON object", file, name)
    fields = cast("dict[str, object]", entry)
    spelled = fields.get("dtype")
    if not isinstance(spelled, str) or not spelled.isascii() or not 0 < len(spelled) <= _MAX_RANK:
        raise _bad("dtype is not the name of a type", file, name)
    shape = _sizes(fields.get("shape"), "shape", file, name)
    offsets = _sizes(fields.get("data_offsets"), "data_offsets", file, name)
    data_bytes = file.size - data_start
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        raise _bad(f"data_offsets are {quoted(list(offsets))}, the file holds {data_bytes:,} bytes of data", file, name)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise _bad("the name has half a character (a lone surrogate)", file, name) from error
    # A type nobody knows is an error only for who wants the tensor.
    dtype = "int4" if is_int4 and spelled == "I8" else _DTYPES.get(spelled, spelled)
    nbytes = offsets[1] - offsets[0]
    wanted = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else nbytes
    if nbytes != wanted:
        raise _bad(f"{dtype}{quoted(list(shape))} takes {quoted(wanted)} bytes, data_offsets give {nbytes}", file, name)
    extents = (Extent(file.path, data_start + offsets[0], nbytes),) if nbytes else ()
    return TensorRef(name, dtype, shape, extents)


def _sizes(value: object, what: str, file: InputFile, name: str) -> tuple[int, ...]:
    """A list of sizes; ``true`` is no number here."""
    if not isinstance(value, list):
        raise _bad(f"{what} is not a list", file, name)
    items = cast("list[object]", value)
    if len(items) > _MAX_RANK:
        raise _bad(f"{what} has {len(items)} members", file, name)
    sizes = tuple(item for item in items if type(item) is int and 0 <= item <= _MAX_DIM)
    if len(sizes) != len(items):
        raise _bad(f"{what} has a member that is no size", file, name)
    return sizes


def _check_cover(file: InputFile, refs: Mapping[str, TensorRef], data_start: int) -> None:
    """Every byte of data belongs to one tensor."""
    at, last = data_start, ""
    for offset, nbytes, name in sorted((e.offset, e.nbytes, ref.name) for ref in refs.values() for e in ref.extents):
        if offset != at:
            before = f"those of {quoted(last)}" if at > data_start else "the header"
            how = "overlap" if offset < at else f"leave {offset - at:,} bytes unused after"
            raise _bad(f"its data_offsets {how} {before}", file, name)
        at, last = offset + nbytes, name
    if at != file.size:
        raise _bad(f"{file.size - at:,} bytes of data belong to no tensor", file)


def _bad(what: str, file: InputFile, name: str | None = None) -> FormatError:
    where = file.path if name is None else f"{file.path}, tensor {quoted(name)}"
    return FormatError(what, where=where, hint=COPY_AGAIN)
