"""Find the tensors of MindSpore checkpoints without reading their payload::

    rank_R/x.ckpt         --protobuf-----.
                                          >--> {name: TensorRef}   (dtype, shape, which bytes of which file)
    rank_R/x.safetensors  --safetensors--'

The suffix of a file is its writer's opinion: the first bytes decide.
"""

from __future__ import annotations

import struct
from pathlib import Path

from ckpt2pt.ckpt.protobuf import index_ckpt
from ckpt2pt.ckpt.safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, index_safetensors
from ckpt2pt.errors import FormatError
from ckpt2pt.inputs import InputFile
from ckpt2pt.tensors import TensorRef
from ckpt2pt.untrusted.foreign import HEAD_BYTES, READS, recognise

__all__ = ["index_ckpt", "index_file", "index_safetensors", "read_scalar"]

_MAX_TEXT_BYTES = 1 << 20
_STRUCTS = {
    "bool": "<?", "int4": "<b", "int8": "<b", "uint8": "<B", "int16": "<h", "uint16": "<H", "int32": "<i", "uint32": "<I",
    "int64": "<q", "uint64": "<Q", "float16": "<e", "bfloat16": "<f", "float32": "<f", "float64": "<d",
}  # fmt: skip


def index_file(path: Path, *, check_crc: bool = False, partial: bool = False) -> dict[str, TensorRef]:
    """Index a checkpoint; its first bytes say what it is, its suffix only when they do not.

    ``check_crc`` reads the file once and compares, if it carries a checksum; ``partial`` lists a ``.safetensors``
    file without redundancy instead of refusing it.
    """
    with InputFile(path) as file:
        head = file.read(0, min(HEAD_BYTES, file.size))
    length, brace = int.from_bytes(head[:LENGTH_BYTES], "little"), head[LENGTH_BYTES : LENGTH_BYTES + 1]
    looks_safe = brace == b"{" and length <= MAX_HEADER_BYTES
    other = "" if looks_safe else recognise(head)
    if other:
        raise FormatError(
            f"this is {other}; {READS}",
            where=path,
            mend="name a checkpoint that MindSpore saved",
        )
    if looks_safe or (path.suffix == ".safetensors" and not head.startswith(b"\n")):
        return index_safetensors(path, check_crc=check_crc, partial=partial)
    return index_ckpt(path, check_crc=check_crc)


def read_scalar(ref: TensorRef) -> int | float | bool | str:
    """Read the one value of a small tensor, or the text of a string entry."""
    code = _STRUCTS.get(ref.dtype)
    if ref.dtype == "str":
        if ref.nbytes > _MAX_TEXT_BYTES:
            raise _unreadable(ref, f"a text of {ref.nbytes} bytes")
    elif code is None or ref.numel != 1:
        raise _unreadable(ref, f"expected one number, found {ref.dtype}{list(ref.shape)}")
    raw = b"".join(_read(ref))
    if code is None:
        try:
            # numpy pads with NUL characters; the empty text is one of them.
            return raw.decode("utf-32-le").rstrip("\0")
        except UnicodeDecodeError as error:
            raise _unreadable(ref, "a text that is not UTF-32") from error
    if ref.dtype == "bfloat16":
        raw = b"\0\0" + raw  # the upper half of a float32
    value: int | float | bool = struct.unpack(code, raw)[0]
    return value


def _read(ref: TensorRef) -> list[bytes]:
    pieces: list[bytes] = []
    for extent in ref.extents:
        with InputFile(Path(extent.path)) as file:
            pieces.append(file.read(extent.offset, extent.nbytes))
    return pieces


def _unreadable(ref: TensorRef, what: str) -> FormatError:
    where = f"{ref.extents[0].path}, {ref.name}" if ref.extents else ref.name
    return FormatError(what, where=where, mend="the entry is damaged or of another kind: convert an earlier checkpoint")
