from __future__ import annotations

import os
import random
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from archives import take_apart, write_archive
from ckpt2pt.core.extents import Extent
from ckpt2pt.formats.torchfile.archive import ALIGNMENT, Archive, Layout, finish, lay_out

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


def noise(dtype: Any, numel: int) -> Any:
    """A tensor of arbitrary bits."""
    width = torch.empty(0, dtype=dtype).element_size()
    if dtype is torch.bool:
        return torch.randint(0, 2, (numel,)).bool()
    return torch.randint(0, 256, (numel * width,), dtype=torch.uint8).view(dtype)


def assert_as_torch(path: Path, ours: Path) -> None:
    """Write the parts of torch's ``path`` again: the file is the same, byte for byte."""
    parts = take_apart(path)
    crc = write_archive(ours, *parts)
    want = path.read_bytes()
    assert ours.read_bytes() == want
    assert crc == zlib.crc32(want)


trees = st.recursive(
    st.builds(noise, st.sampled_from(DTYPES), st.integers(0, 200)),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees, stem=st.from_regex(r"[a-z_][a-z0-9_-]{0,80}", fullmatch=True))
def test_the_file_is_that_of_torch_save(tmp_path: Path, tree: Any, stem: str) -> None:
    path = tmp_path / f"{stem}.pt"
    torch.save(tree, path)
    assert_as_torch(path, tmp_path / "ours")
    path.unlink()


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param({}, id="no-storage"),
        pytest.param(torch.empty(0), id="an-empty-storage-alone"),
        pytest.param(
            [torch.empty(0), torch.ones(3), torch.empty(0, dtype=torch.bool)], id="empty-storages-first-and-last"
        ),
        pytest.param([torch.ones(64).narrow(0, i, 8) for i in range(8)], id="views-of-one-storage"),
        pytest.param([torch.zeros(n, dtype=torch.uint8) for n in range(130)], id="every-phase-of-the-filler"),
        pytest.param({"x" * 100_000: torch.ones(1)}, id="a-long-pickle"),
    ],
)
def test_the_file_is_that_of_torch_save_at_the_edges(tmp_path: Path, tree: Any) -> None:
    torch.save(tree, tmp_path / "distrib_optim.pt")
    assert_as_torch(tmp_path / "distrib_optim.pt", tmp_path / "ours")


def test_a_stem_beyond_ascii_is_counted_in_bytes(tmp_path: Path) -> None:
    write_archive(tmp_path / "a", "größe-模型", b"pickle", [b"123"])
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert archive.testzip() is None
    assert Archive.open(tmp_path / "a").stem == "größe-模型"


def test_more_records_than_16_bits_count_are_written_as_torch_does(tmp_path: Path) -> None:
    base = torch.arange(66_000, dtype=torch.int16)
    torch.save([base[i].clone() for i in range(66_000)], tmp_path / "many.pt")
    assert_as_torch(tmp_path / "many.pt", tmp_path / "ours")
    assert len(Archive.open(tmp_path / "ours").storages) == 66_000


# ------------------------------------------------------------------------------------------------------- past 4 GiB

GIB = 1 << 30


class Sink:
    """What torch.save writes into: zeros become holes, so a file of gigabytes takes a few pages."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._size = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size >= 1 << 16:
            assert not any(bytes(memoryview(data)[:1000])), "only zeros are large here"
            self._file.seek(size, os.SEEK_CUR)
        else:
            self._file.write(data)
        self._size += size
        return size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.truncate(self._size)
        self._file.close()


def stretches(path: Path) -> Iterator[tuple[int, int]]:
    """The stretches of a sparse file that are not holes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        stop, size = 0, os.fstat(fd).st_size
        while stop < size:
            try:
                start = os.lseek(fd, stop, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                return
            stop = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, stop
    finally:
        os.close(fd)


def assert_same_sparse(one: Path, two: Path) -> None:
    assert one.stat().st_size == two.stat().st_size
    with one.open("rb") as left, two.open("rb") as right:
        for start, stop in (*stretches(one), *stretches(two)):
            for at in range(start, stop, 1 << 20):
                size = min(1 << 20, stop - at)
                assert os.pread(left.fileno(), size, at) == os.pread(right.fileno(), size, at), f"differs past {at}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([(1 << 32) + 5, 80, 0, 3], id="one-storage-past-4-GiB"),
        pytest.param([7, 3 * GIB, 2 * GIB, 0, 80], id="all-together-past-4-GiB"),
        pytest.param([(1 << 32) - 1, 80], id="a-size-of-32-ones"),
        pytest.param([(1 << 32) - 2, 80], id="the-largest-size-of-32-bits"),
        pytest.param([(1 << 32) - 3000, 80, 80, 80], id="all-together-just-below"),
        pytest.param([(1 << 32) - 1460], id="the-directory-crosses"),
        pytest.param([(1 << 32) - 1024, 80], id="the-last-records-cross"),
    ],
)
def test_past_4_gib_the_file_is_that_of_torch_save(tmp_path: Path, sizes: list[int]) -> None:
    sink = Sink(tmp_path / "torch.pt")
    torch.save([torch.from_numpy(np.zeros(size, np.uint8)) for size in sizes], sink)  # torch.zeros writes all of them
    sink.close()
    with zipfile.ZipFile(tmp_path / "torch.pt") as archive:
        pickle = archive.read("archive/data.pkl")
        identity = archive.read("archive/.data/serialization_id").decode()
        crcs = [archive.getinfo(f"archive/data/{index}").CRC for index in range(len(sizes))]

    ours = tmp_path / "ours.pt"
    crc = write_sparse(ours, lay_out("archive", pickle, sizes), crcs, identity)
    assert_same_sparse(tmp_path / "torch.pt", ours)
    assert crc == whole_crc(ours)
    # Read here, by zipfile and by torch; for the whole of it the CRC above speaks.
    assert [extent.nbytes for extent in Archive.open(ours).storages.values()] == sizes
    loaded = torch.load(ours, mmap=True, weights_only=True)
    assert [tensor.nbytes for tensor in loaded] == sizes
    assert not loaded[-1].any()


def write_sparse(path: Path, layout: Layout, crcs: list[int], identity: str | None = None) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        return finish(fd, layout, crcs, serialization_id=identity)
    finally:
        os.close(fd)


def whole_crc(path: Path) -> int:
    crc, zeros, stop = 0, bytes(1 << 20), path.stat().st_size
    with path.open("rb") as file:
        for start, end in (*stretches(path), (stop, stop)):
            while (hole := start - file.tell()) > 0:  # is not read: that takes ten times as long as its sum
                crc = isal_zlib.crc32(zeros[:hole], crc)  # zlib would take three times as long over gigabytes
                file.seek(min(hole, len(zeros)), os.SEEK_CUR)
            crc = isal_zlib.crc32(file.read(end - start), crc)
    return crc


def test_a_hole_counts_as_the_zeros_that_it_reads_as(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        for offset in (5, (3 << 20) + 7, (9 << 20) + 1):
            file.seek(offset)
            file.write(b"some bytes")
        file.truncate((12 << 20) + 3)
    assert whole_crc(tmp_path / "sparse") == zlib.crc32((tmp_path / "sparse").read_bytes())


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([1 << 32], id="one-large"),
        pytest.param([3 * GIB, 3 * GIB, 0, 5], id="large-together"),
        pytest.param([1 << 40, 1 << 40, 12], id="terabytes"),
    ],
)
def test_directory_of_a_large_file_is_read_alike_here_and_by_zipfile(tmp_path: Path, sizes: list[int]) -> None:
    path = tmp_path / "large.pt"
    layout = lay_out("large", b"pickle", sizes)
    write_sparse(path, layout, [index if size else 0 for index, size in enumerate(sizes)])
    assert path.stat().st_size == layout.nbytes
    archive = Archive.open(path)
    assert [archive.storages[str(index)] for index in range(len(sizes))] == [
        Extent(str(path), layout.storage_offset(index), size) for index, size in enumerate(sizes)
    ]
    with zipfile.ZipFile(path) as seen:
        assert [seen.getinfo(f"large/data/{index}").file_size for index in range(len(sizes))] == sizes
        assert seen.read("large/version") == b"3\n"


# ---------------------------------------------------------------------------------------------------- the writer


def test_every_zip_tool_and_torch_read_what_we_write(tmp_path: Path) -> None:
    tree = {"a": noise(torch.bfloat16, 1000), "b": [noise(torch.float32, 3), torch.empty(0)], "step": 500}
    torch.save(tree, tmp_path / "theirs.pt")
    stem, pickle, payloads, _ = take_apart(tmp_path / "theirs.pt")
    write_archive(tmp_path / "ours.pt", stem, pickle, payloads)
    with zipfile.ZipFile(tmp_path / "ours.pt") as archive:
        assert archive.testzip() is None
    for mmap in (False, True):
        found = torch.load(tmp_path / "ours.pt", mmap=mmap, weights_only=True)
        assert found["step"] == 500
        assert torch.equal(found["a"].view(torch.int16), tree["a"].view(torch.int16))
        assert torch.equal(found["b"][0].view(torch.int32), tree["b"][0].view(torch.int32))
        assert found["b"][1].shape == (0,)


@given(st.lists(st.integers(0, 1 << 34), max_size=30), st.binary(max_size=300))
def test_storages_are_aligned_and_do_not_touch(sizes: list[int], pickle: bytes) -> None:
    layout = lay_out("stem", pickle, sizes)
    end = len(pickle)
    for index, size in enumerate(sizes):
        assert layout.storage_offset(index) % ALIGNMENT == 0
        assert layout.storage_offset(index) > end
        assert layout.storage_nbytes(index) == size
        end = layout.storage_offset(index) + size
    assert layout.nbytes > end


def test_payloads_may_come_in_any_order_and_after_the_headers(tmp_path: Path) -> None:
    payloads = [bytes([index]) * (index * 37 % 500) for index in range(40)]
    write_archive(tmp_path / "one", "stem", b"pickle", payloads)
    layout = lay_out("stem", b"pickle", [len(payload) for payload in payloads])
    with (tmp_path / "two").open("wb") as file:
        finish(file.fileno(), layout, [zlib.crc32(payload) for payload in payloads])
        order = list(range(40))
        random.Random(1).shuffle(order)
        for index in order:
            os.pwrite(file.fileno(), payloads[index], layout.storage_offset(index))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_archive(tmp_path / "one", "stem", b"pickle" * 10, [b"", b""])
    pwrite: Callable[[int, memoryview, int], int] = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    crc = write_archive(tmp_path / "two", "stem", b"pickle" * 10, [b"", b""])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert crc == whole_crc(tmp_path / "two")


def test_same_content_is_the_same_file_and_other_content_another_id(tmp_path: Path) -> None:
    ids = []
    for name, payload in (("one", b"abc"), ("two", b"abc"), ("three", b"abd")):
        write_archive(tmp_path / name, "stem", b"pickle", [payload, b""])
        ids.append(take_apart(tmp_path / name).serialization_id)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert ids[0] != ids[2]
    assert all(len(identity) == 40 and identity.isdecimal() for identity in ids)


def test_the_half_of_the_derived_id_that_stands_for_the_content_is_that_of_torch(tmp_path: Path) -> None:
    torch.save([torch.arange(5), torch.empty(0), torch.arange(100.0)], tmp_path / "theirs.pt")
    stem, pickle, payloads, theirs = take_apart(tmp_path / "theirs.pt")
    write_archive(tmp_path / "ours.pt", stem, pickle, payloads)
    assert take_apart(tmp_path / "ours.pt").serialization_id[20:] == theirs[20:]


@pytest.mark.parametrize("stem", ["", "a/b", "a\\b"])
def test_stem_that_is_no_file_name_is_refused(stem: str) -> None:
    with pytest.raises(ValueError, match="stem"):
        lay_out(stem, b"", [])


def test_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="data/1"):
        lay_out("stem", b"", [1, -1])


@pytest.mark.parametrize("index", [-1, 2, 3])
def test_storage_that_is_not_there_has_no_offset(index: int) -> None:
    with pytest.raises(IndexError, match=f"storage {index} of 2"):
        lay_out("stem", b"", [1, 1]).storage_offset(index)


class Misuse(NamedTuple):
    sizes: list[int]
    crcs: list[int]
    identity: str | None
    says: str


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Misuse([1, 1], [1], None, "1 CRCs for 2 storages"), id="too-few-crcs"),
        pytest.param(Misuse([1], [1, 2], None, "2 CRCs for 1 storages"), id="too-many-crcs"),
        pytest.param(Misuse([0], [1], None, "data/0 is empty"), id="a-crc-of-nothing"),
        pytest.param(Misuse([], [], "1", "40 digits"), id="a-short-id"),
    ],
)
def test_misuse_of_finish_is_refused(tmp_path: Path, case: Misuse) -> None:
    layout = lay_out("stem", b"", case.sizes)
    with (tmp_path / "a").open("wb") as file, pytest.raises(ValueError, match=case.says):
        finish(file.fileno(), layout, case.crcs, serialization_id=case.identity)


def test_golden_archives_of_a_current_torch_are_written_again_byte_for_byte(golden_set: Path, tmp_path: Path) -> None:
    for path in golden_set.rglob("*.pt"):
        if ".format_version" in Archive.open(path).records:
            assert_as_torch(path, tmp_path / "ours")
