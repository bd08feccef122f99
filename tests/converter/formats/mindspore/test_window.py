"""The window itself, at its edges.  Damaged messages: test_protobuf_abuse.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.errors import FormatError
from ckpt2pt.formats.mindspore.window import Window
from ckpt2pt.io.inputs import InputFile

BYTES, VARINT = 0x0A, 0x10


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@pytest.mark.parametrize("nbytes", [0, 1, 4075, 4096, 70_000, 300_000])
def test_fields_are_found_whatever_lies_between_them(tmp_path: Path, nbytes: int) -> None:
    payload = bytes([BYTES]) + varint(nbytes) + bytes(nbytes)
    data = payload + bytes([VARINT]) + varint(1 << 40) + payload
    (tmp_path / "x").write_bytes(data)
    with InputFile(tmp_path / "x") as file:
        found = list(Window(file).fields(0, len(data)))
    assert [key for key, _, _ in found] == [BYTES, VARINT, BYTES]
    assert found[1][1] == 1 << 40
    assert [end - first for key, first, end in found if key == BYTES] == [nbytes, nbytes]
    assert [end for _, _, end in found] == [len(payload), len(data) - len(payload), len(data)]


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_field_that_is_cut_short_is_reported_with_its_place(tmp_path: Path, cut: int) -> None:
    data = bytes([BYTES]) + varint(5) + bytes(5)
    (tmp_path / "x").write_bytes(data[:-cut])
    with InputFile(tmp_path / "x") as file, pytest.raises(FormatError, match="cut short") as caught:
        list(Window(file).fields(0, file.size))
    assert caught.value.where.endswith("byte 0")


def test_a_few_bytes_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes([VARINT, 1]) * 1000)
    with InputFile(tmp_path / "x") as file:
        window = Window(file)
        next(window.fields(0, file.size))
        (tmp_path / "x").write_bytes(bytes(2000))
        assert window.take(2, 4) == bytes([VARINT, 1])
