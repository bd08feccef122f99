"""Write small `.ckpt` and `.safetensors` files, right ones and wrong ones.  Independent of the readers under test."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WIDTHS = {
    "bool": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "uint32": 4,
    "float32": 4, "int64": 8, "uint64": 8, "float64": 8,
}  # fmt: skip
MINDSPORE = {"uint8": "UInt8", "uint16": "UInt16", "uint32": "UInt32", "uint64": "UInt64", "bfloat16": "BFloat16"}
SAFETENSORS = {"bool": "BOOL", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Tensor:
    """What a reader should find."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def varint(number: int, *, width: int = 0) -> bytes:
    """``number`` as protobuf spells it; ``width`` pads it to as many bytes, which is allowed and odd."""
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F or len(out) + 1 < width:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def chunk(field: int, content: bytes, *, nbytes: int | None = None) -> bytes:
    """A length-delimited field; ``nbytes`` is what it claims to hold."""
    return varint(field << 3 | 2) + varint(len(content) if nbytes is None else nbytes) + content


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def tensor(dtype: str, dims: Iterable[int], content: bytes) -> bytes:
    """A TensorProto, fields in the order in which mindspore writes them."""
    return b"".join(number(1, dim) for dim in dims) + chunk(2, dtype.encode()) + chunk(3, content)


def value(name: str | bytes, *members: bytes) -> bytes:
    """One whole Checkpoint message of one Value, ready to be concatenated."""
    raw = name.encode() if isinstance(name, str) else name
    return chunk(1, chunk(1, raw) + b"".join(members))


def entry(name: str | bytes, dtype: str, dims: Iterable[int], content: bytes) -> bytes:
    return value(name, chunk(2, tensor(dtype, dims, content)))


def map_entry(name: str, *tensors: bytes) -> bytes:
    return value(name, chunk(3, b"".join(chunk(1, each) for each in tensors)))


def ckpt(tensors: Iterable[Tensor], *, crc: bool = False) -> bytes:
    data = b"".join(entry(t.name, MINDSPORE.get(t.dtype, t.dtype.capitalize()), t.shape, t.data) for t in tensors)
    return data + trailer(data) if crc else data


def trailer(data: bytes) -> bytes:
    return b"crc_num" + zlib.crc32(data).to_bytes(10, "big")


def safe(tensors: Iterable[Tensor], *, crc: bool = False, metadata: Mapping[str, str] | None = None) -> bytes:
    """As the library lays it out: widest types first, then by name."""
    placed = sorted(tensors, key=lambda t: (-WIDTHS[t.dtype], t.name))
    texts = {"format": "ms", **(metadata or {})}
    if crc:
        total = 0
        for each in sorted(placed, key=lambda t: t.name):
            total = zlib.crc32(each.name.encode() + each.data, total)
        texts["crc_num"] = str(total)
    header: dict[str, object] = {"__metadata__": texts}
    at = 0
    for each in placed:
        header[each.name] = safe_entry(each.dtype, each.shape, at, at + len(each.data))
        at += len(each.data)
    return safe_file(header, b"".join(each.data for each in placed))


def safe_entry(dtype: str, shape: Iterable[int], start: int, stop: int) -> dict[str, object]:
    spelled = SAFETENSORS.get(dtype, dtype[0].upper() + dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))
    return {"dtype": spelled, "shape": list(shape), "data_offsets": [start, stop]}


def safe_file(header: Mapping[str, object] | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def some_tensors() -> list[Tensor]:
    """Every type, and every shape that is special."""
    each = [Tensor(f"t.{dtype}", dtype, (2, 3), bytes(range(6 * width))) for dtype, width in WIDTHS.items()]
    return [
        *each,
        Tensor("scalar", "float32", (), b"\0\0\x80\x3f"),
        Tensor("one", "int64", (1,), bytes(8)),
        Tensor("empty", "float32", (0,), b""),
        Tensor("no rows", "float32", (0, 7), b""),
        Tensor("naïve.名前.weight", "bfloat16", (1, 2, 1), b"abcd"),
    ]
