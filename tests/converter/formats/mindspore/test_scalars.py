"""Small values that the index leads to: numbers of every type, and texts."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.errors import FileAccessError, FormatError
from ckpt2pt.formats.mindspore import index_file, read_scalar
from ckptfiles import entry


def test_the_appended_values_of_the_sample_are_read(golden: Path) -> None:
    found = index_file(golden / "mindspore" / "append_dict.ckpt")
    values = {name: read_scalar(ref) for name, ref in found.items() if ref.dtype == "str" or ref.numel == 1}
    assert values == {
        "step_num": 120,
        "epoch_num": 3,
        "loss_scale": 65536.0,
        "flag": True,
        "big": 1 << 40,
        "lr": 0.10000000149011612,  # mindspore stores a float of append_dict in single precision
        "note": "hello",
        "uni": "héλ😀",
        "empty": "",
        "max_lr": 1e-5,
    }
    assert values["flag"] is True


@pytest.mark.parametrize(
    ("dtype", "raw", "value"),
    [
        ("bool", b"\0", False),
        ("bool", b"\1", True),
        ("int4", b"\xff", -1),
        ("int8", b"\xff", -1),
        ("uint8", b"\xff", 255),
        ("int16", b"\xfe\xff", -2),
        ("uint16", b"\xfe\xff", 65534),
        ("int32", struct.pack("<i", -(1 << 31)), -(1 << 31)),
        ("uint32", b"\xff" * 4, (1 << 32) - 1),
        ("int64", b"\xff" * 8, -1),
        ("uint64", b"\xff" * 8, (1 << 64) - 1),
        ("float16", b"\x00\x3e", 1.5),
        ("bfloat16", b"\xc0\x3f", 1.5),
        ("float32", b"\0\0\xc0\xbf", -1.5),
        ("float64", struct.pack("<d", 0.1), 0.1),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_number_of_every_type_is_read(
    tmp_path: Path, dtype: str, raw: bytes, value: float, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before" + raw + b"behind")
    found = read_scalar(TensorRef("x", dtype, shape, (Extent(str(path), 6, len(raw)),)))
    assert (found, type(found)) == (value, type(value))


def test_a_number_may_lie_in_two_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xc0\xbf\0\0")
    assert read_scalar(TensorRef("x", "float32", (), (Extent(str(path), 2, 2), Extent(str(path), 0, 2)))) == -1.5


@pytest.mark.parametrize("text", ["", "hello", "名前", "😀 ok", " spaces "])
def test_a_text_is_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(entry("note", "str", (0,), (text or "\0").encode("utf-32-le")))
    assert read_scalar(index_file(path)["note"]) == text


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes", "what"),
    [
        ("float32", (2,), 8, r"expected one number, found float32\[2\]"),
        ("float32", (0,), 0, r"expected one number, found float32\[0\]"),
        ("complex64", (), 8, "expected one number, found complex64"),
        ("random_op", (), 4, "expected one number, found random_op"),
        ("str", (), 2 << 20, "a text of 2097152 bytes"),
        ("str", (), 4, "not UTF-32"),
    ],
)
def test_what_is_no_scalar_is_refused(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], nbytes: int, what: str
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xff" * nbytes)
    extents = (Extent(str(path), 0, nbytes),) if nbytes else ()
    with pytest.raises(FormatError, match=what) as caught:
        read_scalar(TensorRef("x", dtype, shape, extents))
    assert caught.value.where.endswith("x")


def test_a_file_that_has_gone_short_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"ab")
    with pytest.raises(FileAccessError):
        read_scalar(TensorRef("x", "float32", (), (Extent(str(path), 0, 4),)))


def test_every_type_that_has_a_width_is_read_or_refused_on_purpose(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(8))
    for dtype, width in DTYPE_BYTES.items():
        if dtype != "complex64":
            assert read_scalar(TensorRef("x", dtype, (), (Extent(str(path), 0, width),))) == 0
