"""Leaves of any file: every path once, every element where torch sees it, nothing read before it is asked for."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from archives import write_archive
from ckpt2pt.core.extents import Extent, View
from ckpt2pt.errors import FileAccessError, FormatError
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import tensor
from ckpt2pt.verification import gather
from ckpt2pt.verification import leaves as leaves_module
from ckpt2pt.verification.elements import show_element, values
from ckpt2pt.verification.gather import Files, spans
from ckpt2pt.verification.leaves import Symbol, TensorLeaf, key_text, open_file, open_pt, same_scalar
from ckptfiles import ckpt, safe, some_tensors


def saved(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "x.pt"
    torch.save(tree, path)
    return path


def read(leaf: object, start: int = 0, stop: int | None = None) -> bytes:
    assert isinstance(leaf, TensorLeaf)
    with Files() as files:
        return leaf.elements.block(files, start, leaf.numel if stop is None else stop).tobytes()


def test_every_leaf_has_its_path_and_every_container_its_kind(tmp_path: Path) -> None:
    state = OrderedDict(weight=torch.arange(3))
    state._metadata = {"v": 1}  # type: ignore[attr-defined]
    tree = {"a": [1, (2.5, None)], 7: {}, "7": True, (torch.float32, "x"): b"y", "state": state, "t": torch.bfloat16}
    found = open_pt(saved(tmp_path, tree))
    tensor_leaf = found.pop("/state/weight")
    assert isinstance(tensor_leaf, TensorLeaf)
    assert str(tensor_leaf) == "int64[3]"
    bytes_leaves = {path for path in found if path.startswith("/(torch.float32, x)/")}
    assert {path: leaf for path, leaf in found.items() if path not in bytes_leaves} == {
        "/": Symbol("dict"),
        "/a": Symbol("list"),
        "/a/0": 1,
        "/a/1": Symbol("tuple"),
        "/a/1/0": 2.5,
        "/a/1/1": None,
        "/7": Symbol("dict"),
        "/'7'": True,
        "/(torch.float32, x)": Symbol("_codecs.encode"),
        "/state": Symbol("collections.OrderedDict"),
        "/state/@state": Symbol("dict"),
        "/state/@state/_metadata": Symbol("dict"),
        "/state/@state/_metadata/v": 1,
        "/t": Symbol("torch.bfloat16"),
    }


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t, id="whole"),
        pytest.param(lambda t: t[3:7], id="rows"),
        pytest.param(lambda t: t.T, id="transposed"),
        pytest.param(lambda t: t[:, 2:5], id="columns"),
        pytest.param(lambda t: t[::3, ::2], id="every-third"),
        pytest.param(lambda t: t[0].expand(4, 11), id="expanded"),
        pytest.param(lambda t: t[2, 3], id="one-element"),
        pytest.param(lambda t: t[5:5], id="none"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128, torch.bool])
def test_elements_are_those_that_torch_sees(
    tmp_path: Path, view: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "_MAX_STRETCH_BYTES", 64)
    whole = (torch.arange(110).reshape(10, 11) % 7).to(dtype)
    theirs = view(whole)
    leaf = open_pt(saved(tmp_path, {"x": theirs}))["/x"]
    assert isinstance(leaf, TensorLeaf)
    assert leaf.shape == tuple(theirs.shape)
    raw = theirs.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if theirs.numel() else b""
    if theirs.numel():
        assert read(leaf) == raw
        size = len(raw) // theirs.numel()
        middle = theirs.numel() // 2
        assert read(leaf, middle) == raw[middle * size :]


def test_an_element_may_lie_across_extents(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(32)))
    extents = (Extent(str(path), 20, 3), Extent(str(path), 0, 0), Extent(str(path), 4, 6), Extent(str(path), 30, 2))
    whole = bytes([20, 21, 22, 4, 5, 6, 7, 8, 9, 30, 31])
    with Files() as files:
        assert gather.stored("uint8", (11,), extents).block(files, 0, 11).tobytes() == whole
        assert gather.stored("uint16", (5,), extents).block(files, 1, 5).tobytes() == whole[2:10]


def test_a_view_that_turns_around_is_read_by_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_MAX_STRETCH_BYTES", 4096)
    path = tmp_path / "data"
    data = np.arange(40_000, dtype="<u4")
    data.tofile(path)
    storage: tuple[Extent, ...] = (Extent(str(path), 0, data.nbytes),)
    view = View((0, 0), (200, 200), (1, 200), 0, storage)
    with Files() as files:
        assert gather.strided("float32", view).block(files, 0, 40_000).tobytes() == data.reshape(200, 200).T.tobytes()


def test_a_storage_that_is_not_there_or_too_short_is_refused(tmp_path: Path) -> None:
    pickle = write_pickle({"x": tensor("float32", "0", 4, 0, (4,))})
    for payloads in ([], [bytes(15)]):
        write_archive(tmp_path / "x.pt", "x", pickle, payloads)
        with pytest.raises(FormatError, match="storage 0 of 16 bytes"):
            open_pt(tmp_path / "x.pt")


def test_a_file_that_shrinks_while_it_is_read_is_an_error_with_a_hint(tmp_path: Path) -> None:
    leaf = open_pt(saved(tmp_path, {"x": torch.zeros(1000)}))["/x"]
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(FileAccessError, match="ended at byte 576"):
        read(leaf)


def test_a_tree_with_too_many_leaves_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists may be shared: 2 ** 30 leaves fit into a few hundred bytes."""
    shared: list[Any] = [0]
    for _ in range(30):
        shared = [shared, shared]
    with pytest.raises(FormatError, match="more leaves than a file of its size can need"):
        open_pt(saved(tmp_path, shared))


def test_long_names_above_many_leaves_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of a megabyte stands in the path of each leaf below it."""
    tree = {"x" * 1_000_000: list(range(1000))}
    with pytest.raises(FormatError, match="more leaves than a file of its size can need"):
        open_pt(saved(tmp_path, tree))
    monkeypatch.setattr(leaves_module, "MAX_NAMES_NBYTES", 1 << 31)
    assert len(open_pt(saved(tmp_path, tree))) == 1002


def test_more_files_than_are_kept_open_can_be_read_in_turn(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(40)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]))
    with Files() as files:
        for _ in range(2):
            found = [gather.stored("uint8", (1,), (Extent(str(path), 0, 1),)).block(files, 0, 1)[0] for path in paths]
            assert found == list(range(40))


@pytest.mark.parametrize(("write", "name"), [(ckpt, "x.ckpt"), (safe, "x.safetensors")], ids=["ckpt", "safetensors"])
def test_mindspore_files_are_read_by_name(tmp_path: Path, write: Any, name: str) -> None:
    tensors = [each for each in some_tensors() if each.data]
    (tmp_path / name).write_bytes(write(tensors))
    found = open_file(tmp_path / name)
    assert found.keys() == {each.name for each in tensors}
    for each in tensors:
        assert read(found[each.name]) == each.data


@pytest.mark.parametrize(
    ("key", "text"),
    [("a.b", "a.b"), (0, "0"), ("0", "'0'"), ("-1", "'-1'"), ("", "''"), (("a", 1), "(a, 1)"), (True, "True")],
)
def test_keys_of_different_types_do_not_collide(key: object, text: str) -> None:
    assert key_text(key) == text


def test_blocks_cover_every_element_once() -> None:
    assert list(spans(0, 4)) == []
    found = list(spans(300_001, 4))
    assert found[0] == (0, 131_072)
    assert found[-1][1] == 300_001
    assert all(left[1] == right[0] for left, right in pairwise(found))


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (1, 1, True), (1, True, False), (1, 1.0, False), (0.0, -0.0, False), (float("nan"), float("nan"), True),
        (None, None, True), (Symbol("a"), Symbol("a"), True), (Symbol("a"), "a", False),
    ],
)  # fmt: skip
def test_scalars_are_equal_in_type_and_value(left: Any, right: Any, same: bool) -> None:
    assert same_scalar(left, right) is same


@pytest.mark.parametrize(
    ("dtype", "raw", "shown"),
    [
        ("float32", b"\0\0\x80\x3f", "1 (0x3f800000)"),
        ("bfloat16", b"\xc0\x7f", "nan (0x7fc0)"),
        ("int64", b"\xff" * 8, "-1"),
        ("bool", b"\1", "1"),
        ("str", "ü".encode("utf-32-le"), "'ü'"),
        ("complex64", bytes(7) + b"\1", "0x0100000000000000"),
    ],
)
def test_an_element_is_shown_with_its_bits(dtype: str, raw: bytes, shown: str) -> None:
    assert show_element(np.frombuffer(raw, np.uint8), dtype, 0) == shown


def test_signalling_nans_are_read_without_a_word() -> None:
    found = values(np.frombuffer(b"\1\0\x80\x7f", np.uint8), "float32")
    assert found is not None
    assert np.isnan(found).all()
