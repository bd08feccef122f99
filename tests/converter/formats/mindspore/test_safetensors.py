"""`.safetensors` as mindspore writes it, and the ways in which its header can lie."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from checked import checked
from ckpt2pt.core.extents import TensorRef
from ckpt2pt.errors import Ckpt2ptError, FormatError
from ckpt2pt.formats.mindspore import index_file, index_safetensors, prove_checksum, read_scalar
from ckptfiles import Tensor, safe, safe_entry, safe_file, some_tensors

F32 = safe_entry("float32", (2,), 0, 8)


def indexed(folder: Path, data: bytes, **options: bool) -> dict[str, TensorRef]:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    return index_safetensors(path, **options)


def to_error(folder: Path, data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        indexed(folder, data)
    assert caught.value.where.startswith(str(folder / "x.safetensors"))
    assert len(str(caught.value)) < 1000
    return caught.value


def test_what_the_library_itself_writes_is_indexed(tmp_path: Path) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.array(7, dtype=np.int64),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3), dtype=np.float16),
    }
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "ms"})
    found = index_safetensors(path)
    assert {name: (ref.dtype, ref.shape) for name, ref in found.items()} == {
        name: (array.dtype.name, array.shape) for name, array in arrays.items()
    }
    assert read_scalar(found["scalar"]) == 7


def test_an_empty_save_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({}, path)
    assert index_file(path) == {}


@pytest.mark.parametrize(
    ("metadata", "dtype"),
    [({"w": "Int4"}, "int4"), ({"v": "Int4"}, "int8"), ({"w": "int4"}, "int8"), ({}, "int8")],
    ids=["named", "another-is-named", "other-spelling", "none"],
)
def test_int4_is_known_by_the_metadata_alone(tmp_path: Path, metadata: dict[str, str], dtype: str) -> None:
    found = indexed(tmp_path, safe([Tensor("w", "int8", (2, 2), b"abcd")], metadata=metadata))
    assert (found["w"].dtype, found["w"].shape, found["w"].nbytes) == (dtype, (2, 2), 4)


def test_int4_in_the_metadata_does_not_turn_floats_into_bytes(tmp_path: Path) -> None:
    found = indexed(tmp_path, safe([Tensor("w", "float32", (1,), b"abcd")], metadata={"w": "Int4"}))
    assert found["w"].dtype == "float32"


def test_a_type_nobody_knows_is_listed_under_its_own_name(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F8_E5M2", "shape": [3], "data_offsets": [0, 3]}}
    assert indexed(tmp_path, safe_file(header, b"abc"))["w"].dtype == "F8_E5M2"


def test_a_file_without_redundancy_is_refused_with_the_way_out(golden: Path) -> None:
    path = golden / "mindspore" / "remove_redundancy.safetensors"
    for index in (index_safetensors, index_file):
        with pytest.raises(FormatError, match="remove_redundancy=True") as caught:
            index(path)
        assert "mindspore.load_checkpoint(..., remove_redundancy=True)" in caught.value.hint


def test_a_file_without_redundancy_can_be_listed(golden: Path) -> None:
    path = golden / "mindspore" / "remove_redundancy.safetensors"
    for index in (index_safetensors, index_file):
        (ref,) = index(path, partial=True).values()
        assert (ref.name, ref.dtype, ref.shape) == ("net.weight", "bfloat16", (2, 3))


@pytest.mark.parametrize("said", ["False", "false", ""])
def test_redundancy_that_was_kept_is_no_reason_to_refuse(tmp_path: Path, said: str) -> None:
    data = safe([Tensor("w", "int8", (1,), b"a")], metadata={"remove_redundancy": said})
    assert list(indexed(tmp_path, data)) == ["w"]


def test_the_checksum_goes_by_name_and_not_by_place(tmp_path: Path) -> None:
    # The wide type lies first, the narrow one is first by name.
    tensors = [Tensor("b", "float64", (1,), b"12345678"), Tensor("a", "int8", (1,), b"9")]
    assert len(indexed(tmp_path, safe(tensors, crc=True))) == 2
    assert prove_checksum(tmp_path / "x.safetensors")


@pytest.mark.parametrize("said", ["0", "", "ten", "-1", "1e3"])
def test_a_checksum_that_is_no_right_number_is_refused_when_asked(tmp_path: Path, said: str) -> None:
    data = safe([Tensor("w", "int8", (1,), b"a")], metadata={"crc_num": said})
    assert len(indexed(tmp_path, data)) == 1
    with pytest.raises(FormatError, match="crc_num"):
        prove_checksum(tmp_path / "x.safetensors")


def with_entry(**changes: object) -> bytes:
    return safe_file({"w": {**F32, **changes}}, bytes(8))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        # the length of the header
        pytest.param(b"\2\0\0\0\0\0\0", "7 bytes are too few", id="7-bytes"),
        pytest.param(bytes(8), "cannot be read as JSON", id="header-of-none"),
        pytest.param((100).to_bytes(8, "little") + b"{}", "cut short: a header of 100 bytes", id="header-longer-than-file"),
        pytest.param((100_000_001).to_bytes(8, "little") + b"{}", "a header of 100,000,001 bytes, at most 100,000,000", id="header-of-100-MB"),
        pytest.param(b"\xff" * 8 + b"{}", "a header of 18,446,744,073,709,551,615 bytes, at most", id="header-of-16-EB"),
        # the JSON
        pytest.param(safe_file(b"{"), "cannot be read as JSON", id="not-json"),
        pytest.param(safe_file(b'{"\xff": 1}'), "cannot be read as JSON", id="not-utf-8"),
        pytest.param(safe_file("{}".encode("utf-16")), "cannot be read as JSON", id="utf-16"),
        pytest.param(safe_file(b"{} {}"), "cannot be read as JSON", id="json-twice"),
        pytest.param(safe_file(b'{"w": ' + b"9" * 5000 + b"}"), "cannot be read as JSON", id="number-of-5000-digits"),
        pytest.param(safe_file(b'{"w":' + b'{"a":' * 50_000 + b"}" * 50_001), "cannot be read as JSON", id="50000-deep-objects"),
        pytest.param(safe_file(b"[" * 200_000), "cannot be read as JSON", id="200000-deep-lists"),
        pytest.param(safe_file(b"[" + b"0," * 10_000_001 + b"0]"), "more than 10000000 members", id="too-many-members"),
        pytest.param(safe_file(b"[]"), "not a JSON object", id="a-list"),
        pytest.param(safe_file(b"null"), "not a JSON object", id="null"),
        pytest.param(safe_file(b'{"a":1,"w":%b,"w":%b}' % ((json.dumps(F32).encode(),) * 2), bytes(8)), "the key 'w' is there twice", id="name-twice"),
        pytest.param(safe_file(b'{"w":{"dtype":"I8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"a"), "the key 'dtype' is there twice", id="dtype-twice"),
        pytest.param(safe_file(b'{"\\ud800":%b}' % json.dumps(F32).encode(), bytes(8)), "half a character", id="name-is-half-a-character"),
        # the metadata
        pytest.param(safe_file({"__metadata__": 5}), "__metadata__", id="metadata-is-a-number"),
        pytest.param(safe_file({"__metadata__": {"format": 5}}), "__metadata__", id="metadata-holds-a-number"),
        pytest.param(safe_file({"__metadata__": {"w": {"dtype": "I8"}}}), "__metadata__", id="metadata-holds-an-object"),
        # the entries
        pytest.param(safe_file({"w": 5}), "the entry is not a JSON object", id="entry-is-a-number"),
        pytest.param(safe_file({"w": {}}), "dtype", id="entry-is-empty"),
        pytest.param(with_entry(dtype=5), "dtype", id="dtype-is-a-number"),
        pytest.param(with_entry(dtype=""), "dtype", id="dtype-is-empty"),
        pytest.param(with_entry(dtype="F" * 65), "dtype", id="dtype-is-long"),
        pytest.param(with_entry(shape=2), "shape is not a list", id="shape-is-a-number"),
        pytest.param(with_entry(shape=None), "shape is not a list", id="shape-is-null"),
        pytest.param(with_entry(shape=[-2]), "shape has a member that is no size", id="negative-dim"),
        pytest.param(with_entry(shape=[-1, -2]), "shape has a member that is no size", id="negative-dims-of-positive-product"),
        pytest.param(with_entry(shape=[2.0]), "shape has a member that is no size", id="dim-is-a-float"),
        pytest.param(with_entry(shape=[True, 2]), "shape has a member that is no size", id="dim-is-true"),
        pytest.param(with_entry(shape=["2"]), "shape has a member that is no size", id="dim-is-a-text"),
        pytest.param(with_entry(shape=[1 << 62, 0]), "shape has a member that is no size", id="huge-dim"),
        pytest.param(with_entry(shape=[1] * 65), "shape has 65 members", id="65-dims"),
        pytest.param(with_entry(shape=[1 << 48] * 64), "data_offsets give 8", id="huge-product"),
        pytest.param(with_entry(shape=[3]), "takes 12 bytes, data_offsets give 8", id="shape-too-large"),
        pytest.param(with_entry(shape=[]), "takes 4 bytes, data_offsets give 8", id="scalar-of-two"),
        pytest.param(with_entry(data_offsets=[0]), "data_offsets are", id="one-offset"),
        pytest.param(with_entry(data_offsets=[0, 8, 8]), "data_offsets are", id="three-offsets"),
        pytest.param(with_entry(data_offsets=[8, 0]), "data_offsets are", id="offsets-turned-round"),
        pytest.param(with_entry(data_offsets=[0, 9]), "data_offsets are .0, 9., the file holds 8", id="offset-behind-the-end"),
        pytest.param(with_entry(data_offsets=[-8, 0]), "data_offsets has a member", id="negative-offset"),
        pytest.param(with_entry(data_offsets=[False, 8]), "data_offsets has a member", id="offset-is-false"),
        pytest.param(with_entry(data_offsets=[0, 1e3]), "data_offsets has a member", id="offset-is-a-float"),
        # how tensors lie together
        pytest.param(safe_file({"v": F32, "w": F32}, bytes(8)), "overlap those of 'v'", id="same-place"),
        pytest.param(safe_file({"v": F32, "w": safe_entry("float32", (2,), 4, 12)}, bytes(12)), "overlap those of 'v'", id="overlap"),
        pytest.param(safe_file({"v": F32, "w": safe_entry("float32", (2,), 9, 17)}, bytes(17)), "leave 1 bytes unused after those of 'v'", id="gap"),
        pytest.param(safe_file({"w": safe_entry("float32", (2,), 4, 12)}, bytes(12)), "leave 4 bytes unused after the header", id="gap-before-the-first"),
        pytest.param(safe_file({"w": F32}, bytes(9)), "1 bytes of data belong to no tensor", id="bytes-left-over"),
        pytest.param(safe_file({}, bytes(9)), "9 bytes of data belong to no tensor", id="nothing-but-bytes"),
    ],
)  # fmt: skip
def test_each_lie_is_refused_and_named(tmp_path: Path, data: bytes, what: str) -> None:
    error = to_error(tmp_path, data)
    assert re.search(what, error.what), error.what
    assert error.hint


def test_a_header_within_the_limit_may_be_large(tmp_path: Path) -> None:
    header = {"w": F32, "__metadata__": {"comment": "x" * 5_000_000}}
    assert list(indexed(tmp_path, safe_file(header, bytes(8)))) == ["w"]


SAMPLE = safe(some_tensors()[::2], crc=True, metadata={"t.int8": "Int4"})


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    data = bytearray(SAMPLE)
    for at, byte in changes:
        data[at] = byte
    path.write_bytes(data)
    with suppress(Ckpt2ptError):
        for ref in checked(path).values():
            assert all(e.offset + e.nbytes <= len(data) for e in ref.extents)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["__metadata__", "w", "v", "\ud800"]), JSON, max_size=3))
def test_any_json_at_all_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object]
) -> None:
    path = tmp_path_factory.getbasetemp() / "json.safetensors"
    path.write_bytes(safe_file(header))
    with suppress(Ckpt2ptError):
        assert set(index_file(path)) == set(header) - {"__metadata__"}
