"""Elements gathered from views, whatever their strides: numpy is the judge, and memory stays bounded."""

from __future__ import annotations

import math
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.extents import Extent, View
from ckpt2pt.core.tensor import Key, Tensor, box_of, boxes, dense_strides, sharded
from ckpt2pt.verification import gather
from ckpt2pt.verification.gather import Files, Gathered, file_of, gathered

WEIGHT = Key("param", "w")


class Counted(Files):
    """Tells the longest stretch that was read at once, and all bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = self.total = 0

    def read(self, path: str, offset: int, out: memoryview) -> None:
        self.longest, self.total = max(self.longest, len(out)), self.total + len(out)
        super().read(path, offset, out)


def write(folder: Path, name: str, data: bytes, pieces: int = 1) -> tuple[Extent, ...]:
    """A storage of several extents, which end anywhere, behind some other bytes."""
    path, extents, start = folder / name, [], 3
    step = max(1, -(-len(data) // pieces))
    with path.open("wb") as file:
        file.write(b"...")
        for at in range(0, len(data), step):
            part = data[at : at + step]
            file.write(part + b"..")
            extents.append(Extent(str(path), start, len(part)))
            start += len(part) + 2
    return tuple(extents)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, int, int, str]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    axis, of = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 8))
    return (
        shape,
        axis,
        of,
        draw(st.integers(0, 5)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["<f4", "<u2", "u1"])),
    )


@given(cases(), st.data())
def test_any_range_of_a_cut_tensor_is_numpys(case: tuple[Any, ...], data: st.DataObject) -> None:
    local, axis, of, first, pieces, code = case
    shape = tuple(length * of if number == axis else length for number, length in enumerate(local))
    numel = math.prod(shape)
    array = np.random.default_rng(numel).integers(0, 250, shape).astype(code)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    with tempfile.TemporaryDirectory() as name, Counted() as files:
        views = []
        for rank, part in enumerate(np.split(array, of, axis)):
            raw = np.zeros(first, code).tobytes() + np.ascontiguousarray(part).tobytes()
            views.append(sharded(shape, axis, rank, of, first, write(Path(name), str(rank), raw, pieces)))
        dtype = {"<f4": "float32", "<u2": "bfloat16", "u1": "uint8"}[code]
        block = gathered(Tensor(WEIGHT, dtype, shape, shape, tuple(views))).block(files, start, stop)
    assert block.tobytes() == array.reshape(-1)[start:stop].tobytes()


@given(st.permutations([0, 1, 2]), st.sampled_from([1, 2, 3]), st.sampled_from([8, 64, 8 << 20]), st.data())
def test_a_view_may_lie_in_any_order_and_with_gaps(order: list[int], gap: int, limit: int, data: st.DataObject) -> None:
    """A transposed storage of which every ``gap``-th element counts, read within a small limit."""
    shape = (3, 4, 5)
    array = np.arange(60, dtype="<u2").reshape(shape)
    storage = np.full(60 * gap, 9999, "<u2")
    storage[::gap] = array.transpose(order).reshape(-1)
    dense = dense_strides(tuple(shape[axis] for axis in order))
    strides = tuple(dense[order.index(axis)] * gap for axis in range(3))
    start = data.draw(st.integers(0, 60))
    stop = data.draw(st.integers(start, 60))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name, Counted() as files:
        patch.setattr(gather, "_MAX_STRETCH_BYTES", limit)
        view = View((0, 0, 0), shape, strides, 0, write(Path(name), "storage", storage.tobytes(), 3))
        tensor = Tensor(WEIGHT, "bfloat16", shape, shape, (view,))
        assert gathered(tensor).block(files, start, stop).tobytes() == array.reshape(-1)[start:stop].tobytes()
        as_it_is = order == [0, 1, 2] and gap == 1  # it is read straight into the block
        assert files.longest <= (2 * (stop - start) if as_it_is else limit)


@given(st.data())
def test_a_box_inside_of_it_is_numpys(data: st.DataObject) -> None:
    shape, of = (6, 8), 4
    array = np.arange(48, dtype="<f4").reshape(shape)
    low = tuple(data.draw(st.integers(0, length - 1)) for length in shape)
    part = tuple(data.draw(st.integers(1, length - at)) for at, length in zip(low, shape, strict=True))
    with tempfile.TemporaryDirectory() as name, Files() as files:
        views = tuple(
            sharded(shape, 1, rank, of, 0, write(Path(name), str(rank), np.split(array, of, 1)[rank].tobytes()))
            for rank in range(of)
        )
        elements = Gathered("float32", views, (low, part))
        whole = elements.block(files, 0, math.prod(part)).view("<f4")
    wanted = array[tuple(slice(at, at + n) for at, n in zip(low, part, strict=True))]
    assert np.array_equal(whole.reshape(part), wanted)


def test_a_tensor_larger_than_the_limit_is_read_in_stretches_within_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Column by column, and each column by rows: no stretch is longer than the limit, and none is read twice."""
    monkeypatch.setattr(gather, "_MAX_STRETCH_BYTES", 4096)
    shape = (256, 64)
    array = np.random.default_rng(1).normal(size=shape).astype("<f4")
    views = tuple(
        sharded(shape, 1, rank, 2, 0, write(tmp_path, str(rank), np.ascontiguousarray(part).tobytes(), 5))
        for rank, part in enumerate(np.split(array, 2, 1))
    )
    tensor = Tensor(WEIGHT, "float32", shape, shape, views)
    with Counted() as files:
        found = gathered(tensor).block(files, 0, array.size)
        assert found.tobytes() == array.tobytes()
        assert files.longest <= 4096
        assert files.total == array.nbytes


def test_gathering_holds_a_block_and_a_stretch_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 MB cut along columns, in blocks of 64 KiB."""
    limit, shape = 1 << 17, (2048, 4096)
    monkeypatch.setattr(gather, "_MAX_STRETCH_BYTES", limit)
    part = np.random.default_rng(1).normal(size=(shape[0], shape[1] // 4)).astype("<f4").tobytes()
    views = tuple(sharded(shape, 1, rank, 4, 0, write(tmp_path, str(rank), part)) for rank in range(4))
    transposed = View((0, 0), shape, (1, shape[0]), 0, write(tmp_path, "columns", part * 4))
    elements = gathered(Tensor(WEIGHT, "float32", shape, shape, views))
    with Files() as files:
        elements.block(files, 0, 1)
        tracemalloc.start()
        for start in range(0, math.prod(shape), 1 << 14):
            elements.block(files, start, start + (1 << 14))
        Gathered("float32", (transposed,), ((0, 0), shape)).block(files, 0, 1 << 10)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 * (1 << 16) + 2 * limit


def test_an_empty_tensor_and_a_scalar_have_their_elements(tmp_path: Path) -> None:
    with Files() as files:
        empty = Tensor(WEIGHT, "float32", (0, 3), (0, 3), (View((0, 0), (0, 3), (3, 1), 0, ()),))
        assert gathered(empty).block(files, 0, 0).size == 0
        scalar = Tensor(WEIGHT, "float32", (), (), (View((), (), (), 1, write(tmp_path, "s", b"....abcd")),))
        assert gathered(scalar).block(files, 0, 1).tobytes() == b"abcd"


def test_boxes_of_a_view_are_those_of_its_tensor() -> None:
    view = View((2, 0), (2, 3), (3, 1), 0, ())
    assert box_of(view) == ((2, 0), (2, 3))
    assert list(boxes((4, 3), 6, 12)) == [box_of(view)]


def test_the_file_of_an_element_is_that_of_the_view_and_extent_that_hold_it() -> None:
    """Two ranks hold four columns each of (2, 8); the second one's storage goes on in another file after 5 elements."""
    whole: tuple[Extent, ...] = (Extent("a", 7, 32),)
    split: tuple[Extent, ...] = (Extent("b", 0, 20), Extent("c", 3, 12))
    views = (sharded((2, 8), 1, 0, 2, 0, whole), sharded((2, 8), 1, 1, 2, 0, split))
    tensor = Tensor(Key("param", "x"), "float32", (2, 8), (2, 8), views)
    assert "".join(file_of(tensor, element) for element in range(16)) == "aaaabbbbaaaabccc"
