"""Find the tensors of MindSpore checkpoints without reading their payload::

    rank_R/x.ckpt         --protobuf-----.
                                          >--> {name: TensorRef}   (dtype, shape, which bytes of which file)
    rank_R/x.safetensors  --safetensors--'

The suffix of a file is its writer's opinion: the first bytes decide.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.core.stated import Stated, Statement, is_stated, read_statement
from ckpt2pt.core.training_step import STEP_ENTRIES
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.mindspore.protobuf import ckpt_checksum, index_ckpt, prove_ckpt
from ckpt2pt.formats.mindspore.safetensors import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    index_safetensors,
    prove_safetensors,
    safetensors_checksum,
)
from ckpt2pt.io.checksums import Piece
from ckpt2pt.io.foreign import HEAD_BYTES, READS, recognise
from ckpt2pt.io.inputs import InputFile, opened

__all__ = [
    "Header",
    "facts_of",
    "index_ckpt",
    "index_file",
    "index_safetensors",
    "prove_checksum",
    "prove_sources",
    "read_scalar",
    "read_scalars",
    "rows_of",
    "statement_of",
    "states_checksum",
]

_MAX_TEXT_BYTES = 1 << 20
_NUMBERS = frozenset(
    {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64", "bool"}
)
_STRUCTS = {
    "bool": "<?", "int4": "<b", "int8": "<b", "uint8": "<B", "int16": "<h", "uint16": "<H", "int32": "<i", "uint32": "<I",
    "int64": "<q", "uint64": "<Q", "float16": "<e", "bfloat16": "<f", "float32": "<f", "float64": "<d",
}  # fmt: skip


Row = tuple[str, str, tuple[int, ...], tuple[tuple[int, int], ...]]
"""An entry of a file: its name, type and shape, and (offset, bytes) of each of its slices."""


@dataclass(frozen=True, slots=True)
class Header:
    """What was read of a file: where its tensors are, and what it states of optimizer and scheduler.

    ``rows`` may be those of other files as well: ranks of one tensor parallel group differ in their values alone.
    """

    path: str
    rows: tuple[Row, ...]
    statement: Statement
    checksum: bool
    """Whether it states a CRC-32 of itself."""

    @property
    def index(self) -> dict[str, TensorRef]:
        """Its tensors, as :func:`index_file` gives them."""
        return {
            name: TensorRef(name, dtype, shape, tuple([Extent(self.path, *piece) for piece in pieces]))
            for name, dtype, shape, pieces in self.rows
        }


def rows_of(index: Mapping[str, TensorRef]) -> tuple[Row, ...]:
    """The same tensors without the path of their file."""
    return tuple([(*ref[:3], tuple([(offset, nbytes) for _, offset, nbytes in ref.extents])) for ref in index.values()])


def index_file(path: Path | InputFile, *, partial: bool = False) -> dict[str, TensorRef]:
    """Index a checkpoint; its first bytes say what it is, its suffix only when they do not.

    ``partial`` lists a ``.safetensors`` file without redundancy instead of refusing it.
    """
    with opened(path) as file:
        return index_safetensors(file, partial=partial) if _is_safetensors(file) else index_ckpt(file)


def prove_checksum(path: Path, read: Sequence[Piece] = ()) -> bool:
    """Compare a checkpoint with the CRC-32 that it states of itself; False if it states none.

    ``read`` are pieces of the file whose CRC-32 is known, sorted by their first bytes; the rest is read now.  Raises
    :class:`FormatError` when the file is not what was saved.
    """
    with InputFile(path) as file:
        return prove_safetensors(file, read) if _is_safetensors(file) else prove_ckpt(file, read)


def states_checksum(path: Path | InputFile) -> bool:
    """Whether a checkpoint states a CRC-32 of itself (``save_checkpoint(..., crc_check=True)``)."""
    with opened(path) as file:
        return (safetensors_checksum if _is_safetensors(file) else ckpt_checksum)(file) is not None


def prove_sources(paths: Iterable[Path], read: Mapping[str, Sequence[Piece]], *, every_byte: bool) -> dict[str, int]:
    """Compare each file with its own checksum; how many were verified, not checked, or state none.

    ``read`` are the pieces that were read of each, by path.  Unless ``every_byte`` the rest is not read for the sake of
    the checksum, and the file counts as not checked.
    """
    found: dict[str, int] = {"verified": 0, "notChecked": 0, "none": 0}
    for path in paths:
        if every_byte:
            found["verified" if prove_checksum(path, read.get(str(path), ())) else "none"] += 1
        else:
            found["notChecked" if states_checksum(path) else "none"] += 1
    return found


def _is_safetensors(file: InputFile) -> bool:
    head = file.read(0, min(HEAD_BYTES, file.size))
    length, brace = int.from_bytes(head[:LENGTH_BYTES], "little"), head[LENGTH_BYTES : LENGTH_BYTES + 1]
    looks_safe = brace == b"{" and length <= MAX_HEADER_BYTES
    other = "" if looks_safe else recognise(head)
    if other:
        raise FormatError(
            f"this is {other}; {READS}",
            where=file.path,
            hint="name a checkpoint that MindSpore saved",
        )
    return looks_safe or (file.path.endswith(".safetensors") and not head.startswith(b"\n"))


def read_scalar(ref: TensorRef) -> int | float | bool | str:
    """Read the one value of a small tensor, or the text of a string entry."""
    return read_scalars([ref])[ref.name]


def read_scalars(refs: Iterable[TensorRef], known: InputFile | None = None) -> dict[str, int | float | bool | str]:
    """Read the values of small tensors by name; a file that several lie in is opened once, and ``known`` is open."""
    refs = list(refs)
    for ref in refs:
        _check_scalar(ref)
    raw = dict.fromkeys((ref.name for ref in refs), b"")
    for path in dict.fromkeys(extent.path for ref in refs for extent in ref.extents):
        with opened(known if known and known.path == path else Path(path)) as file:
            for ref in refs:
                for extent in ref.extents:
                    if extent.path == path:
                        raw[ref.name] += file.read(extent.offset, extent.nbytes)
    return {ref.name: _decoded(ref, raw[ref.name]) for ref in refs}


def facts_of(index: Mapping[str, TensorRef], known: InputFile | None = None) -> dict[str, float]:
    """The entries of :data:`STEP_ENTRIES` that are numbers."""
    values = read_scalars((index[name] for name in STEP_ENTRIES if name in index), known)
    return {name: value for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)}


def statement_of(index: Mapping[str, TensorRef], known: InputFile | None = None) -> Statement:
    """What a file states of optimizer and scheduler; an entry that is no finite number states nothing."""
    refs = [ref for name, ref in index.items() if is_stated(name) and ref.numel == 1 and ref.dtype in _NUMBERS]
    values = read_scalars(refs, known)
    return read_statement(
        {
            name: Stated(value, index[name].dtype)
            for name, value in values.items()
            if not isinstance(value, str) and math.isfinite(value)
        }
    )


def _check_scalar(ref: TensorRef) -> None:
    if ref.dtype == "str":
        if ref.nbytes > _MAX_TEXT_BYTES:
            raise _unreadable(ref, f"a text of {ref.nbytes} bytes")
    elif ref.dtype not in _STRUCTS or ref.numel != 1:
        raise _unreadable(ref, f"expected one number, found {ref.dtype}{list(ref.shape)}")


def _decoded(ref: TensorRef, raw: bytes) -> int | float | bool | str:
    if ref.dtype == "str":
        try:
            # numpy pads with NUL characters; the empty text is one of them.
            return raw.decode("utf-32-le").rstrip("\0")
        except UnicodeDecodeError as error:
            raise _unreadable(ref, "a text that is not UTF-32") from error
    if ref.dtype == "bfloat16":
        raw = b"\0\0" + raw  # the upper half of a float32
    value: int | float | bool = struct.unpack(_STRUCTS[ref.dtype], raw)[0]
    return value


def _unreadable(ref: TensorRef, what: str) -> FormatError:
    where = f"{ref.extents[0].path}, {ref.name}" if ref.extents else ref.name
    return FormatError(what, where=where, hint="the entry is damaged or of another kind: convert an earlier checkpoint")
