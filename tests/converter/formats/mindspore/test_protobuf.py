"""The `.ckpt` wire format: slices, scalars, strings, map parameters, checksums, and every liberty protobuf allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checked import checked
from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.mindspore import index_ckpt, index_file, read_scalar
from ckpt2pt.formats.mindspore.protobuf import prove_ckpt
from ckptfiles import Tensor, chunk, ckpt, entry, map_entry, number, tensor, trailer, value, varint

ONE = b"\0\0\x80\x3f"
SIX = bytes(range(24))


def indexed(folder: Path, *parts: bytes, check: bool = False) -> dict[str, TensorRef]:
    path = folder / "x.ckpt"
    path.write_bytes(b"".join(parts))
    found = index_ckpt(path)
    if check:
        prove_ckpt(path)
    return found


def payload(ref: TensorRef) -> bytes:
    return b"".join(Path(e.path).read_bytes()[e.offset : e.offset + e.nbytes] for e in ref.extents)


def described(found: dict[str, TensorRef]) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    return [(ref.name, ref.dtype, ref.shape, payload(ref)) for ref in found.values()]


# -------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("name", ["dist_opt_dp2_tp2", "plain_tp2_ep2_pp2"])
def test_every_rank_of_a_training_directory_is_indexed(name: str, golden: Path) -> None:
    files = sorted((golden / "mindspore" / name).glob("rank_*/*.ckpt"))
    assert files
    for path in files:
        found = checked(path)
        assert all(
            ref.numel * (4 if ref.dtype != "int64" else 8) == ref.nbytes
            for ref in found.values()
            if ref.dtype in {"float32", "int64"}
        )
        assert read_scalar(found["step_num"]) == 10


def test_ranks_together_hold_every_name_of_the_expected_model(golden: Path) -> None:
    folder = golden / "mindspore" / "plain_tp2_ep2_pp2"
    found = {name for path in folder.glob("rank_*/*.ckpt") for name in index_ckpt(path)}
    with np.load(folder / "expected_full.npz") as expected:
        # Experts are stacked in the file: only the first one's name is there.
        wanted = {name for name in expected.files if "local_experts." not in name or "local_experts.0." in name}
    assert wanted
    assert wanted <= found


def test_flat_shards_of_the_distributed_optimizer_are_one_dimensional(golden: Path) -> None:
    (path,) = (golden / "mindspore" / "dist_opt_dp2_tp2" / "rank_1").glob("*.ckpt")
    shards = [ref for name, ref in index_ckpt(path).items() if name.startswith("buffer_")]
    assert shards
    assert {(ref.dtype, len(ref.shape)) for ref in shards} == {("float32", 1)}


@pytest.mark.parametrize("rank", range(4))
def test_a_strategy_file_is_refused_by_name(golden: Path, rank: int) -> None:
    path = golden / "mindspore" / "dist_opt_dp2_tp2" / "strategy" / f"stratey{rank}.ckpt"
    with pytest.raises(FormatError, match="parallel strategy file") as caught:
        index_file(path)
    assert "strategy/" in caught.value.hint


@pytest.mark.parametrize("name", ["enc_cbc.ckpt", "enc_gcm.ckpt"])
def test_an_encrypted_file_is_refused_with_the_way_out(golden: Path, name: str) -> None:
    with pytest.raises(FormatError, match="encrypted") as caught:
        index_file(golden / "mindspore" / name)
    assert "dec_key=" in caught.value.hint


@pytest.mark.parametrize("first", [0xD8, 0xD9, 0xDA])
def test_every_cipher_is_recognised(tmp_path: Path, first: int) -> None:
    with pytest.raises(FormatError, match="encrypted"):
        indexed(tmp_path, bytes([first]), b"\x5e\x3a\x7f", bytes(60))


def test_a_torch_archive_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="zip archive"):
        indexed(tmp_path, b"PK\x03\x04", bytes(60))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [("empty_sync", {"k": (1,)}), ("empty_async", {"z0": (0,), "z1": (2, 0, 3), "k": (1,)})],
)
def test_empty_tensors_are_there_only_if_they_were_written(
    golden: Path, name: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    found = index_ckpt(golden / "mindspore" / f"{name}.ckpt")
    assert {key: ref.shape or (1,) for key, ref in found.items()} == shapes
    assert all(not ref.extents for ref in found.values() if ref.numel == 0)


# --------------------------------------------------------------------------------------------------------------- slices


def test_adjacent_entries_of_one_name_are_slices_of_one_tensor(tmp_path: Path) -> None:
    parts = [entry("w", "Float32", (2, 3), piece) for piece in (SIX[:5], b"", SIX[5:6], SIX[6:])]
    found = indexed(tmp_path, entry("a", "Float32", (), ONE), *parts, entry("b", "Float32", (), ONE))
    assert [(name, ref.shape) for name, ref in found.items()] == [("a", ()), ("w", (2, 3)), ("b", ())]
    assert [extent.nbytes for extent in found["w"].extents] == [5, 1, 18]
    assert payload(found["w"]) == SIX


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        pytest.param([("Float32", (2, 3), SIX)] * 2, "takes 24 bytes, the file holds 48 .2 entries", id="the-same-twice"),
        pytest.param([("Float32", (2, 3), SIX[:9]), ("Float32", (2, 3), SIX[9:20])], "holds 20", id="one-is-missing"),
        pytest.param([("Float32", (6,), SIX[:9]), ("Float32", (2, 3), SIX[9:])], "slices .* differ", id="shapes"),
        pytest.param([("Float32", (6,), SIX[:9]), ("Int32", (6,), SIX[9:])], "slices .* differ: float32.* and int32", id="types"),
    ],
)  # fmt: skip
def test_slices_that_do_not_make_a_tensor_are_refused(
    tmp_path: Path, parts: list[tuple[str, tuple[int, ...], bytes]], what: str
) -> None:
    with pytest.raises(FormatError, match=what) as caught:
        indexed(tmp_path, *(entry("w", *part) for part in parts))
    assert "parameter 'w'" in caught.value.where


def test_of_repeats_that_are_not_adjacent_the_last_wins_and_keeps_the_first_place(tmp_path: Path) -> None:
    found = indexed(
        tmp_path, entry("w", "Float32", (6,), SIX), entry("x", "Float32", (), ONE), entry("w", "Int64", (), bytes(8))
    )
    assert [(name, ref.dtype) for name, ref in found.items()] == [("w", "int64"), ("x", "float32")]


# ------------------------------------------------------------------------------------------------ scalars and odd types


@pytest.mark.parametrize(
    ("dtype", "dims", "content", "shape"),
    [
        pytest.param("Float32", (), ONE, (), id="scalar"),
        pytest.param("Float32", (0,), ONE, (), id="scalar-of-2.0-alpha"),
        pytest.param("Float32", (0,), b"", (0,), id="empty"),
        pytest.param("Float32", (1,), ONE, (1,), id="one-element"),
        pytest.param("Float32", (3, 0, 1 << 40), b"", (3, 0, 1 << 40), id="empty-with-a-long-side"),
        pytest.param("Int4", (2, 2), b"abcd", (2, 2), id="int4-takes-a-byte"),
        pytest.param("Complex64", (2,), bytes(16), (2,), id="complex64"),
        pytest.param("random_op", (0,), b"anything at all", (0,), id="unknown-type-is-listed"),
        pytest.param("HiFloat8", (3,), b"abc", (3,), id="type-of-tomorrow-is-listed"),
        pytest.param("float32", (1,), ONE, (1,), id="numpy-spelling"),
    ],
)
def test_shape_of(tmp_path: Path, dtype: str, dims: tuple[int, ...], content: bytes, shape: tuple[int, ...]) -> None:
    ref = indexed(tmp_path, entry("x", dtype, dims, content))["x"]
    known = {"Float32": "float32", "Int4": "int4", "Complex64": "complex64"}
    assert (ref.dtype, ref.shape, payload(ref)) == (known.get(dtype, dtype), shape, content)


# ------------------------------------------------------------------------------------------------------- map parameters


def a_map(keys: int) -> list[bytes]:
    return [
        tensor("int32", (keys,), bytes(4 * keys)),
        tensor("float32", (keys, 3), bytes(12 * keys)),
        tensor("int32", (keys,), b"\1\0\0\0" * keys),
    ]


def test_slices_of_a_map_parameter_are_joined_row_by_row(golden: Path) -> None:
    found = index_ckpt(golden / "mindspore" / "map_parameter.ckpt")
    assert {name: (ref.dtype, ref.shape) for name, ref in found.items()} == {
        "table.keys": ("int32", (4,)),
        "table.values": ("float32", (4, 3)),
        "table.status": ("int32", (4,)),
        "w": ("float32", (2,)),
    }
    assert list(np.frombuffer(payload(found["table.keys"]), "<i4")) == [0, 1, 2, 3]
    assert list(np.frombuffer(payload(found["table.values"]), "<f4")) == [0] * 6 + [1] * 6


def test_an_empty_slice_of_a_map_parameter_adds_nothing(tmp_path: Path) -> None:
    found = indexed(tmp_path, map_entry("t", *a_map(0)), map_entry("t", *a_map(2)))
    assert {name: ref.shape for name, ref in found.items()} == {"t.keys": (2,), "t.values": (2, 3), "t.status": (2,)}
    assert payload(found["t.status"]) == b"\1\0\0\0" * 2


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        pytest.param([map_entry("t", *a_map(1)[:2])], "a map parameter of 2 tensors", id="two"),
        pytest.param([map_entry("t", *a_map(1), *a_map(1))], "is there twice", id="six"),
        pytest.param([map_entry("t", *a_map(1)), entry("t", "int32", (1,), bytes(4))], "differ", id="then-a-tensor"),
        pytest.param([entry("t", "int32", (1,), bytes(4)), map_entry("t", *a_map(1))], "differ", id="after-a-tensor"),
    ],
)
def test_a_map_parameter_has_three_tensors_each_time(tmp_path: Path, parts: list[bytes], what: str) -> None:
    with pytest.raises(FormatError, match=what):
        indexed(tmp_path, *parts)


# --------------------------------------------------------------------------------------------------------- the checksum


def test_the_checksum_is_stripped_whether_it_is_checked_or_not(tmp_path: Path) -> None:
    data = entry("w", "Float32", (6,), SIX)
    for check in (False, True):
        assert list(indexed(tmp_path, data, trailer(data), check=check)) == ["w"]
        with pytest.raises(FormatError):
            indexed(tmp_path, data, b"crc_nun", bytes(10), check=check)


def test_ten_bytes_of_checksum_count_not_only_four(tmp_path: Path) -> None:
    data = entry("w", "Float32", (6,), SIX)
    wrong = b"crc_num" + (int.from_bytes(trailer(data)[7:], "big") + (1 << 40)).to_bytes(10, "big")
    with pytest.raises(FormatError, match="crc_num"):
        indexed(tmp_path, data, wrong, check=True)


def test_map_parameters_may_be_left_out_of_the_checksum(tmp_path: Path) -> None:
    tensors, table = [entry("a", "Float32", (6,), SIX), entry("b", "Float32", (), ONE)], map_entry("t", *a_map(1))
    content = [tensors[0], table, table, tensors[1], table]
    for summed in (b"".join(tensors), b"".join(content)):
        assert len(indexed(tmp_path, *content, trailer(summed), check=True)) == 5
    with pytest.raises(FormatError, match="CRC-32"):
        indexed(tmp_path, *content, trailer(tensors[0]), check=True)


def test_a_checksum_over_many_pieces_is_right(tmp_path: Path) -> None:
    nbytes = (3 << 19) + 7
    data = entry("w", "UInt8", (nbytes,), bytes(range(251)) * (nbytes // 251) + bytes(nbytes % 251))
    assert indexed(tmp_path, data, trailer(data), check=True)["w"].nbytes == nbytes


# --------------------------------------------------------------------------------- what protobuf allows and nobody does


PLAIN = tensor("Float32", (2, 3), SIX)
PACKED = chunk(1, varint(2) + varint(3)) + chunk(2, b"Float32") + chunk(3, SIX)


@pytest.mark.parametrize(
    "odd",
    [
        pytest.param(value("w", chunk(2, PACKED)), id="packed-dims"),
        pytest.param(value("w", chunk(2, chunk(1, b"\2") + chunk(2, b"Float32") + chunk(3, SIX) + number(1, 3))), id="half-packed-dims"),
        pytest.param(value("w", chunk(2, chunk(1, b"") + PLAIN)), id="packed-nothing"),
        pytest.param(value("w", chunk(2, chunk(3, SIX) + number(1, 2) + number(1, 3) + chunk(2, b"Float32"))), id="content-first"),
        pytest.param(chunk(1, chunk(2, PLAIN) + chunk(1, b"w")), id="name-last"),
        pytest.param(chunk(1, chunk(9, b"?") + chunk(1, b"w") + chunk(2, PLAIN + chunk(15, b"?")) + number(4, 1 << 63)), id="unknown-fields"),
        pytest.param(chunk(7, b"?" * 300) + value("w", chunk(2, PLAIN)) + number(2, 5), id="unknown-fields-at-the-top"),
        pytest.param(b"\x25abcd" + value("w", b"\x2d\xff\xff\xff\xff", chunk(2, b"\x31\xff2345678" + PLAIN)), id="unknown-fixed-fields"),
        pytest.param(chunk(1, chunk(1, b"w") + chunk(2, varint(8, width=3) + varint(2, width=10) + number(1, 3) + chunk(2, b"Float32") + varint(26, width=2) + varint(24, width=5) + SIX)), id="padded-numbers"),
        pytest.param(number(1 << 28, 1) + value("w", chunk(2, PLAIN)), id="large-field-number"),
    ],
)  # fmt: skip
def test_odd_spellings_read_like_plain_ones(tmp_path: Path, odd: bytes) -> None:
    for around in (b"", entry("a", "Float32", (), ONE)):
        plain = described(indexed(tmp_path, around, entry("w", "Float32", (2, 3), SIX), around.replace(b"a", b"z", 1)))
        assert described(indexed(tmp_path, around, odd, around.replace(b"a", b"z", 1))) == plain


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="empty"),
        pytest.param("with \x12 in it", id="byte-18"),
        pytest.param("名" * 50, id="not-ascii"),
        pytest.param("n" * 256, id="256"),
        pytest.param("n" * 60_000, id="60000"),
        pytest.param("\0", id="nul"),
    ],
)
def test_names_may_be_odd_too(tmp_path: Path, name: str) -> None:
    found = indexed(tmp_path, entry("a", "Int8", (3,), b"abc"), entry(name, "Int8", (3,), b"abc"))
    assert list(found) == ["a", name]
    assert payload(found[name]) == b"abc"


def test_a_name_behind_a_large_payload_is_found(tmp_path: Path) -> None:
    content = bytes(300_000)
    found = indexed(tmp_path, chunk(1, chunk(2, tensor("UInt8", (300_000,), content)) + chunk(1, b"w")))
    assert found["w"].nbytes == 300_000


PAYLOAD_SIZES = st.sampled_from([0, 1, 5, 100, 127, 128, 4060, 4096, 5000, 16384, 65500, 65536, 70000])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), PAYLOAD_SIZES, st.booleans()),
        min_size=1,
        max_size=25,
        unique_by=lambda item: item[0],
    )
)
def test_offsets_are_right_wherever_the_window_falls(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, int, bool]]
) -> None:
    data, expected = b"", {}
    path = tmp_path_factory.getbasetemp() / "windows.ckpt"
    for name, nbytes, odd in items:
        message = tensor("UInt8", (nbytes,), bytes(nbytes))
        one = value(name, chunk(2, message), chunk(7, b"odd") if odd else b"")
        stop = len(data) + len(one) - (5 if odd else 0)
        # A single byte in a dimension of 0 would be a scalar; a dimension of 1 stays.
        expected[name] = ((nbytes,), (Extent(str(path), stop - nbytes, nbytes),) if nbytes else ())
        data += one
    path.write_bytes(data)
    assert {name: (ref.shape, ref.extents) for name, ref in index_ckpt(path).items()} == expected


def test_index_is_in_the_order_of_the_file(tmp_path: Path) -> None:
    tensors = [Tensor(f"{n * 7919 % 1000}", "int8", (1,), b"x") for n in range(1000)]
    path = tmp_path / "x.ckpt"
    path.write_bytes(ckpt(tensors))
    assert list(index_ckpt(path)) == [t.name for t in tensors]
