"""Damaged and hostile `.ckpt` files: an error that says where, never a crash, a hang or a swallowed gigabyte."""

from __future__ import annotations

import re
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from checked import checked
from ckpt2pt.errors import Ckpt2ptError, FormatError
from ckpt2pt.formats.mindspore import index_ckpt, read_scalar
from ckpt2pt.formats.mindspore import protobuf as reader
from ckptfiles import chunk, ckpt, entry, map_entry, number, some_tensors, tensor, trailer, value, varint

ONE = b"\0\0\x80\x3f"
TYPE, CONTENT = chunk(2, b"Float32"), chunk(3, ONE)
GOOD = entry("good", "Float32", (), ONE)


def to_error(folder: Path, *parts: bytes) -> FormatError:
    path = folder / "x.ckpt"
    path.write_bytes(b"".join(parts))
    with pytest.raises(FormatError) as caught:
        index_ckpt(path)
    assert caught.value.where.startswith(str(path))
    assert caught.value.hint
    assert len(str(caught.value)) < 1000
    return caught.value


def in_tensor(*fields: bytes) -> bytes:
    return value("w", chunk(2, b"".join(fields)))


@pytest.mark.parametrize("after_a_good_one", [False, True], ids=["alone", "after-a-good-entry"])
@pytest.mark.parametrize(
    ("bad", "what"),
    [
        # lengths
        pytest.param(chunk(1, b"abc", nbytes=4), "cut short", id="entry-longer-than-file"),
        pytest.param(chunk(1, b"", nbytes=1 << 62), "cut short", id="entry-of-4-exabytes"),
        pytest.param(chunk(1, b"", nbytes=(1 << 64) - 1), "cut short", id="entry-of-minus-one-bytes"),
        pytest.param(chunk(1, chunk(1, b"w", nbytes=2)), "cut short", id="name-longer-than-entry-and-file"),
        pytest.param(chunk(1, chunk(1, b"w", nbytes=2)) + GOOD, "beyond its message", id="name-longer-than-entry"),
        pytest.param(value("w", chunk(2, TYPE + CONTENT, nbytes=99)) + GOOD * 5, "beyond its message", id="tensor-longer-than-entry"),
        pytest.param(in_tensor(TYPE, chunk(3, ONE, nbytes=5)) + GOOD, "beyond its message", id="content-overlaps-next-entry"),
        pytest.param(in_tensor(CONTENT, chunk(2, b"Float32", nbytes=8)) + GOOD, "beyond its message", id="type-overlaps-next-entry"),
        pytest.param(in_tensor(chunk(2, b"Float32", nbytes=6), CONTENT), "wire type|cut short", id="type-longer-than-it-says"),
        pytest.param(in_tensor(chunk(1, b"\1", nbytes=999), TYPE, CONTENT) + GOOD * 99, "beyond its message", id="dims-overlap-next-entry"),
        pytest.param(map_entry("t", chunk(2, TYPE, nbytes=99)) + GOOD * 5, "beyond its message", id="map-member-overlaps-next-entry"),
        pytest.param(b"\x0a", "cut short", id="key-without-length"),
        pytest.param(b"\x0a" + b"\x80" * 5, "cut short|64 bits", id="length-without-end"),
        pytest.param(b"\x0a" + b"\xff" * 10 + b"\1", "64 bits", id="length-of-11-bytes"),
        pytest.param(b"\x0a" + b"\x80" * 9 + b"\2", "64 bits", id="length-of-65-bits"),
        pytest.param(b"\x80" * 11 + b"\1", "64 bits", id="key-of-11-bytes"),
        pytest.param(chunk(1, b"\x80" * 4), "field number 0", id="key-runs-out-of-entry"),
        # names
        pytest.param(value(b"\xff\xfe", chunk(2, TYPE + CONTENT)), "not UTF-8", id="name-is-not-utf-8"),
        pytest.param(value(b"\xed\xa0\x80", chunk(2, TYPE + CONTENT)), "not UTF-8", id="name-is-half-a-surrogate"),
        pytest.param(value(b"w" * 70_000, chunk(2, TYPE + CONTENT)), "a parameter name of 70000 bytes", id="name-too-long"),
        pytest.param(value("w", chunk(1, b"v"), chunk(2, TYPE + CONTENT)), "is there twice", id="two-names"),
        pytest.param(chunk(1, chunk(2, TYPE + CONTENT)), "without a name", id="no-name"),
        pytest.param(value("w"), "without a tensor", id="no-tensor"),
        pytest.param(chunk(1, b""), "without a name", id="nothing-in-entry"),
        # tensors
        pytest.param(in_tensor(), "without a type", id="nothing-in-tensor"),
        pytest.param(in_tensor(CONTENT), "without a type", id="no-type"),
        pytest.param(in_tensor(TYPE), "without content", id="no-content"),
        pytest.param(in_tensor(TYPE, TYPE, CONTENT), "is there twice", id="two-types"),
        pytest.param(in_tensor(TYPE, CONTENT, CONTENT), "is there twice", id="two-contents"),
        pytest.param(value("w", chunk(2, TYPE + CONTENT) * 2), "is there twice", id="two-tensors"),
        pytest.param(value("w", chunk(2, TYPE + CONTENT), chunk(3, b"")), "is there twice", id="tensor-and-map"),
        pytest.param(in_tensor(chunk(2, b""), CONTENT), "is no type", id="type-is-empty"),
        pytest.param(in_tensor(chunk(2, b"Float\xff"), CONTENT), "is no type", id="type-is-not-ascii"),
        pytest.param(in_tensor(chunk(2, b"Float 32"), CONTENT), "is no type", id="type-has-a-space"),
        pytest.param(in_tensor(chunk(2, b"F" * 65), CONTENT), "is no type", id="type-of-65-bytes"),
        pytest.param(in_tensor(chunk(2, b"F" * 60_000), CONTENT), "is no type", id="type-of-60000-bytes"),
        pytest.param(in_tensor(chunk(2, b"F" * 70_000), CONTENT), "the name of a type, 70000 bytes", id="type-of-70000-bytes"),
        # wire types
        pytest.param(number(1, 5), "field 1 has wire type 0", id="entry-is-a-number"),
        pytest.param(chunk(1, number(1, 5)), "field 1 has wire type 0", id="name-is-a-number"),
        pytest.param(value("w", number(2, 5)), "field 2 has wire type 0", id="tensor-is-a-number"),
        pytest.param(in_tensor(number(2, 5), CONTENT), "field 2 has wire type 0", id="type-is-a-number"),
        pytest.param(in_tensor(TYPE, number(3, 5)), "field 3 has wire type 0", id="content-is-a-number"),
        pytest.param(in_tensor(b"\x0d" + bytes(4), TYPE, CONTENT), "field 1 has wire type 5", id="dim-is-fixed"),
        pytest.param(map_entry("t").replace(b"\x1a\0", b"\x1a\2\x08\1").replace(b"\x0a\5", b"\x0a\7"), "wire type 0", id="map-member-is-a-number"),
        pytest.param(b"\x0b\x0c", "wire type 3", id="group"),
        pytest.param(b"\x0e\0", "wire type 6", id="wire-type-6"),
        pytest.param(b"\2\0", "field number 0", id="field-0"),
        pytest.param(value("w", b"\0\0"), "field number 0", id="zeros"),
        # dims
        pytest.param(entry("w", "Float32", (-1,), ONE), r"shape \[-1\]", id="negative-dim"),
        pytest.param(entry("w", "Float32", (-1, -1), ONE), r"shape \[-1, -1\]", id="negative-dims-of-positive-product"),
        pytest.param(entry("w", "Float32", (0, 1 << 62), b""), "shape .0, 4611", id="huge-dim-of-empty-tensor"),
        pytest.param(entry("w", "Float32", (1 << 40,), ONE), "takes 4398046511104 bytes, the file holds 4", id="huge-dim"),
        pytest.param(entry("w", "Float32", (1 << 40,) * 60, ONE), "takes", id="huge-product"),
        pytest.param(entry("w", "Float32", (1,) * 65, ONE), "more than 64 dimensions", id="65-dims"),
        pytest.param(in_tensor(chunk(1, b"\1" * 65), TYPE, CONTENT), "more than 64 dimensions", id="65-packed-dims"),
        pytest.param(in_tensor(chunk(1, b"\1" * 70_000), TYPE, CONTENT), "70000 bytes of dimensions", id="70000-packed-dims"),
        pytest.param(in_tensor(chunk(1, b"\1\x80"), TYPE, CONTENT), "ends inside a number", id="packed-dims-cut"),
        pytest.param(in_tensor(chunk(1, b"\x80" * 12), TYPE, CONTENT), "64 bits", id="packed-dim-of-12-bytes"),
        # content
        pytest.param(entry("w", "Float32", (2,), ONE), "takes 8 bytes, the file holds 4", id="content-too-short"),
        pytest.param(entry("w", "Float32", (0,), ONE * 2), "takes 0 bytes, the file holds 8", id="legacy-scalar-of-two"),
        pytest.param(entry("w", "Float32", (), b""), "takes 4 bytes, the file holds 0", id="scalar-of-none"),
        pytest.param(entry("w", "BFloat16", (3,), b"12345"), "takes 6 bytes, the file holds 5", id="odd-length"),
        pytest.param(entry("w", "str", (0,), b"12345"), "takes 8 bytes, the file holds 5", id="text-of-odd-length"),
    ],
)  # fmt: skip
def test_each_damage_is_refused_and_named(tmp_path: Path, bad: bytes, what: str, after_a_good_one: bool) -> None:
    # At the very beginning some damage looks like another kind of file, which is refused all the same.
    error = to_error(tmp_path, GOOD * after_a_good_one, bad)
    if after_a_good_one or bad[0] == 0x0A:
        assert re.search(what, error.what), error.what


@pytest.mark.parametrize("data", [trailer(b""), chunk(7, b"unknown")], ids=["only-a-checksum", "only-unknown-fields"])
def test_a_file_without_any_parameter_is_refused(tmp_path: Path, data: bytes) -> None:
    assert "no parameter" in to_error(tmp_path, data).what


def test_an_error_says_at_which_byte(tmp_path: Path) -> None:
    error = to_error(tmp_path, GOOD, value("w"))
    assert error.where.endswith(f", byte {len(GOOD)}")


def test_truncation_behind_large_payload_is_seen_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    whole = entry("w", "UInt8", (1 << 20,), bytes(1 << 20))
    path.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="cut short"):
        index_ckpt(path)


def test_the_limits_on_numbers_of_things_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_MAX_ENTRIES", 3)
    path = tmp_path / "x.ckpt"
    path.write_bytes(GOOD + entry("b", "Float32", (), ONE) + entry("c", "Float32", (), ONE))
    assert len(index_ckpt(path)) == 3
    assert "more than 3 parameters" in to_error(tmp_path, path.read_bytes(), GOOD).what


def test_unknown_fields_are_skipped_but_not_without_end(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(GOOD + number(7, 1) * 100_000)
    assert list(index_ckpt(path)) == ["good"]
    assert "more than 100000 fields" in to_error(tmp_path, path.read_bytes(), number(7, 1)).what


@pytest.mark.parametrize(
    "filler",
    [
        pytest.param(number(7, 1), id="unknown-fields"),
        pytest.param(b"\x0a\0", id="empty-entries"),
        pytest.param(value("w", chunk(2, TYPE + CONTENT)) * 99, id="one-name-without-end"),
        pytest.param(entry("w", "Float32", (1,) * 64, ONE) + entry("v", "Float32", (), ONE), id="two-names-in-turn"),
        pytest.param(chunk(1, number(7, 1) * 50_000), id="unknown-fields-in-an-entry"),
        pytest.param(b"\xff" * 64, id="ones"),
        pytest.param(bytes(64), id="zeros"),
    ],
)
def test_a_megabyte_of_nonsense_ends_soon_and_takes_little_memory(tmp_path: Path, filler: bytes) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(GOOD + filler * ((1 << 20) // len(filler)))
    tracemalloc.start()
    with suppress(FormatError):
        index_ckpt(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20


SAMPLE = (
    ckpt(some_tensors()[::3])
    + map_entry("t", tensor("int32", (1,), ONE), tensor("float32", (1, 1), ONE), tensor("int32", (1,), ONE))
    + entry("note", "str", (0,), "hello".encode("utf-32-le"))
    + value("odd", chunk(9, b"?"), chunk(2, chunk(1, b"\1") + CONTENT + TYPE))
    + entry("sliced", "Int8", (5,), b"abc")
    + entry("sliced", "Int8", (5,), b"de")
)
CHECKED = SAMPLE + trailer(SAMPLE)


def read_all(path: Path) -> None:
    """Index and use what was found; errors of ours are fine, every other exception fails the test."""
    with suppress(Ckpt2ptError):
        for ref in checked(path).values():
            assert all(e.offset + e.nbytes <= path.stat().st_size for e in ref.extents)
            if ref.numel == 1:
                read_scalar(ref)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "x.ckpt"


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(CHECKED) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_read(scratch: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(CHECKED)
    for at, byte in changes:
        data[at] = byte
    scratch.write_bytes(data)
    read_all(scratch)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(SAMPLE)), st.integers(0, len(SAMPLE)), st.binary(max_size=12))
def test_cut_out_doubled_and_inserted_stretches_are_refused_or_read(
    scratch: Path, left: int, right: int, inserted: bytes
) -> None:
    scratch.write_bytes(SAMPLE[:left] + inserted + SAMPLE[right:])
    read_all(scratch)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
@example(b"\x0a" * 80)
@example(b"\x12" * 80)
@example(b"\x1a" * 80)
def test_any_bytes_at_all_are_refused_or_read(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    read_all(scratch)
    scratch.write_bytes(b"\x0a" + varint(len(data)) + data)
    read_all(scratch)


def test_every_single_bit_may_flip(scratch: Path) -> None:
    for at in range(len(SAMPLE)):
        for bit in range(8):
            scratch.write_bytes(SAMPLE[:at] + bytes([SAMPLE[at] ^ 1 << bit]) + SAMPLE[at + 1 :])
            read_all(scratch)
