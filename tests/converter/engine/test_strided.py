"""Blocks gathered from stretches of files, with numpy as the judge: small stretches, sparse and dense, padding, any extents."""

from __future__ import annotations

import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt2pt.core.extents import Extent, Gather, View
from ckpt2pt.core.plan import Copy, copies
from ckpt2pt.core.tensor import sharded
from ckpt2pt.engine import strided
from ckpt2pt.engine.strided import Gatherer
from ckpt2pt.io.checksums import crc32

WIDTHS = {2: "<u2", 4: "<u4"}


class Files:
    """Files in memory, and which bytes of them were read."""

    def __init__(self, **files: bytes) -> None:
        self.files = files
        self.reads: list[tuple[str, int, int]] = []

    def read(self, path: str, offset: int, into: memoryview) -> None:
        assert offset + len(into) <= len(self.files[path]), "beyond the end of the file"
        self.reads.append((path, offset, len(into)))
        into[:] = self.files[path][offset : offset + len(into)]

    def extents(self, path: str, cuts: set[int]) -> tuple[Extent, ...]:
        """All of a file, in pieces that may end inside an element."""
        size = len(self.files[path])
        return tuple(Extent(path, a, b - a) for a, b in pairwise(sorted({0, size, *(c for c in cuts if c < size)})))


def gathered(gather: Gather, files: Files, width: int, limits: list[int]) -> tuple[npt.NDArray[Any], Gatherer]:
    gatherer = Gatherer(files.read)
    out = np.full(limits[-1], 0xABCD, WIDTHS[width])
    for start, stop in pairwise(limits):
        block = memoryview(bytearray(b"\xee" * ((stop - start) * width)))
        gatherer.fill(copies(gather), start, stop, width, block)
        out[start:stop] = np.frombuffer(block, WIDTHS[width])
    return out, gatherer


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_blocks_hold_what_numpy_cuts(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([2, 4]))
    shape = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 8)) * 4
    axis, of = data.draw(st.sampled_from([0, 1])), data.draw(st.sampled_from([1, 2, 4]))
    shape = (shape[0] * 4, shape[1])
    whole = np.random.default_rng(data.draw(st.integers(0, 9))).integers(1, 60000, shape).astype(WIDTHS[width])
    parts = np.split(whole, of, axis)
    files = Files(**{f"f{number}": b"..." + part.tobytes() for number, part in enumerate(parts)})
    views = tuple(
        sharded(
            shape,
            axis,
            number,
            of,
            0,
            cut_head(files.extents(f"f{number}", data.draw(st.sets(st.integers(4, 400), max_size=3)))),
        )
        for number in range(of)
    )
    origin = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    box = data.draw(st.integers(1, shape[0])), data.draw(st.integers(1, shape[1]))
    padded = np.zeros((shape[0] * 2, shape[1] * 2), WIDTHS[width])
    padded[: shape[0], : shape[1]] = whole
    wanted = padded[origin[0] : origin[0] + box[0], origin[1] : origin[1] + box[1]].ravel()
    limits = sorted({0, wanted.size, *data.draw(st.sets(st.integers(0, wanted.size), max_size=4))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "STRETCH_BYTES", data.draw(st.sampled_from([16, 64, 256, 1 << 20])))
        patch.setattr(strided, "_LONG_RUN_BYTES", data.draw(st.sampled_from([1, 1 << 16])))
        patch.setattr(strided, "_SPARSE", data.draw(st.sampled_from([1, 16])))
        out, gatherer = gathered(Gather(views, (origin, box)), files, width, limits)
    assert out.tolist() == wanted.tolist()
    check_notes(gatherer, files)


def cut_head(extents: tuple[Extent, ...]) -> tuple[Extent, ...]:
    """Without the three bytes of a header."""
    first, *rest = extents
    return (Extent(first.path, 3, first.nbytes - 3), *rest)


def check_notes(gatherer: Gatherer, files: Files) -> None:
    """What is noted of a file is what was read of it, and the sums are those of its bytes."""
    for path, pieces in gatherer.read.items():
        for first, nbytes, crc in pieces:
            assert crc == zlib.crc32(files.files[path][first : first + nbytes])
        noted = sorted((first, first + nbytes) for first, nbytes, _ in pieces)
        assert all(any(a <= at and at + size <= b for a, b in noted) for p, at, size in files.reads if p == path)


def column(rows: int, columns: int, of: int, width: int = 4) -> tuple[Files, Gather, npt.NDArray[Any]]:
    """A matrix that lies in one file, and the box of its second part of ``of`` by columns."""
    whole = np.arange(rows * columns, dtype=WIDTHS[width]).reshape(rows, columns)
    files = Files(f=whole.tobytes())
    view = View((0, 0), whole.shape, (columns, 1), 0, files.extents("f", set()))
    part = columns // of
    return files, Gather((view,), ((0, part), (rows, part))), whole[:, part : 2 * part]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_transposed_matrix_is_what_numpy_makes_of_it(data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([2, 4]))
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    whole = np.random.default_rng(1).integers(1, 60000, (rows, columns)).astype(WIDTHS[width])
    files = Files(f=whole.tobytes())
    storage = files.extents("f", data.draw(st.sets(st.integers(1, 400), max_size=3)))
    view = View((0, 0), (columns, rows), (1, columns), 0, storage)
    limits = sorted({0, whole.size, *data.draw(st.sets(st.integers(0, whole.size), max_size=4))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "STRETCH_BYTES", data.draw(st.sampled_from([16, 64, 256, 1 << 20])))
        out, gatherer = gathered(Gather((view,), ((0, 0), (columns, rows))), files, width, limits)
    assert out.tolist() == whole.T.ravel().tolist()
    check_notes(gatherer, files)


def test_of_a_transposed_matrix_a_block_reads_each_byte_once() -> None:
    whole = np.arange(2048 * 96, dtype="<u4").reshape(2048, 96)
    files = Files(f=whole.tobytes())
    view = View((0, 0), (96, 2048), (1, 96), 0, files.extents("f", set()))
    out, _ = gathered(Gather((view,), ((0, 0), (96, 2048))), files, 4, [0, whole.size])
    assert np.array_equal(out, whole.T.ravel())
    assert sum(size for _, _, size in files.reads) == whole.nbytes  # and not once for each of its columns


def test_a_dense_column_is_read_in_few_stretches() -> None:
    files, gather, wanted = column(4096, 512, 4)
    out, _ = gathered(gather, files, 4, [0, wanted.size])
    assert out.tolist() == wanted.ravel().tolist()
    assert sum(size for _, _, size in files.reads) <= 4096 * 512 * 4
    assert len(files.reads) < 40  # of stretches, and of what lies between them


def test_long_runs_far_apart_are_read_one_by_one() -> None:
    files, gather, wanted = column(4, 32 * 32768, 32, width=2)
    out, _ = gathered(gather, files, 2, [0, wanted.size])
    assert out.tolist() == wanted.ravel().tolist()
    assert sum(size for _, _, size in files.reads) == wanted.nbytes  # and not what lies between them


def test_runs_longer_than_a_stretch_are_read_straight_into_the_block() -> None:
    files, gather, wanted = column(3, 4 << 18, 2)
    out, _ = gathered(gather, files, 4, [0, 1 << 18, wanted.size])
    assert np.array_equal(out, wanted.ravel())


def test_notes_do_not_grow_with_the_blocks() -> None:
    """What is remembered of a strided tensor is a few pieces, however many blocks it takes."""
    files, gather, wanted = column(20000, 256, 2)
    step = 100_000
    limits = [*range(0, wanted.size, step), wanted.size]
    _, gatherer = gathered(gather, files, 4, limits)
    assert len(limits) > 20
    assert len(gatherer.read["f"]) < 5
    check_notes(gatherer, files)


def test_a_copy_of_nothing_leaves_zeros() -> None:
    gatherer = Gatherer(Files().read)
    block = memoryview(bytearray(b"\xff" * 8))
    gatherer.fill((), 0, 2, 4, block)
    assert bytes(block) == bytes(8)
    assert crc32(block, 0) == zlib.crc32(bytes(8))


def test_a_dense_copy_is_one_read() -> None:
    files = Files(f=bytes(range(64)))
    copy = Copy(files.extents("f", set()), 4, 2, 0, 2, 2, 6)
    block = memoryview(bytearray(24))
    Gatherer(files.read).fill((copy,), 0, 12, 2, block)
    assert files.reads == [("f", 8, 24)]
    assert bytes(block) == bytes(range(8, 32))


def test_a_file_that_ends_early_is_reported_by_its_reader(tmp_path: Path) -> None:
    files, gather, _ = column(8, 8, 2)
    files.files["f"] = files.files["f"][:100]
    with pytest.raises(AssertionError, match="beyond the end"):
        gathered(gather, files, 4, [0, 32])
    assert not list(tmp_path.iterdir())
