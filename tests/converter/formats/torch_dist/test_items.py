"""Items of a ``.distcp`` file: located by their ends, without a look at the payload."""

from __future__ import annotations

import io
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ckpt2pt.errors import FormatError
from ckpt2pt.formats.torch_dist.items import ItemFile, locate, prove_items, read_object
from ckpt2pt.formats.torch_dist.metadata import Chunk, Item
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.io.inputs import InputFile

BEFORE = b"another item" * 7


def written(folder: Path, value: object) -> Item:
    """An item of torch's own behind something else."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    (folder / "__0_0.distcp").write_bytes(BEFORE + buffer.getvalue() + BEFORE)
    return Item("__0_0.distcp", len(BEFORE), len(buffer.getvalue()))


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (40, 50, 60)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_torch_saved_is_found(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.randn(shape).to(dtype)
    chunk = Chunk((0,) * len(shape), shape, written(tmp_path, value))
    [(found, at)] = locate(tmp_path, [(str(dtype).removeprefix("torch."), chunk)])
    assert found == chunk
    assert (at.first, at.strides) == (0, value.stride())
    data = b"".join((tmp_path / "__0_0.distcp").read_bytes()[e.offset : e.offset + e.nbytes] for e in at.storage)
    assert data == value.view(torch.uint8).numpy().tobytes() if shape else len(data) == value.element_size()


def test_a_view_is_found_with_its_strides(tmp_path: Path) -> None:
    value = torch.arange(24.0).reshape(4, 6)[1:, ::2].T
    [(_, at)] = locate(tmp_path, [("float32", Chunk((0, 0), (3, 3), written(tmp_path, value)))])
    [extent] = at.storage
    data = np.frombuffer((tmp_path / "__0_0.distcp").read_bytes()[extent.offset :][: extent.nbytes], "<f4")
    found = [data[at.first + row * at.strides[0] + column * at.strides[1]] for row in range(3) for column in range(3)]
    assert found == value.flatten().tolist()


def test_the_payload_of_a_large_item_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = written(tmp_path, torch.zeros(1 << 20))
    with InputFile(tmp_path / item.file) as file:
        read: list[int] = []
        plain = file.read

        def counted(_: InputFile, offset: int, nbytes: int) -> bytes:
            read.append(nbytes)
            return plain(offset, nbytes)

        monkeypatch.setattr(InputFile, "read", counted)
        assert Archive.read(ItemFile(file, item)).storages["0"].nbytes == 4 << 20
    assert sum(read) < 16 << 10


@pytest.mark.parametrize(
    ("dtype", "shape", "reported"),
    [
        ("float32", (3,), r"found float32\[4\], expected float32\[3\]"),
        ("bfloat16", (4,), r"found float32\[4\], expected bfloat16\[4\]"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(tmp_path: Path, dtype: str, shape: tuple[int, ...], reported: str) -> None:
    item = written(tmp_path, torch.zeros(4))
    with pytest.raises(FormatError, match=reported) as caught:
        list(locate(tmp_path, [(dtype, Chunk((0,), shape, item))]))
    assert f"__0_0.distcp, from byte {item.offset} on" in caught.value.where


def test_an_object_is_no_tensor_and_a_tensor_no_object(tmp_path: Path) -> None:
    item = written(tmp_path, [{"iteration": 7}])
    assert read_object(tmp_path, item) == ([{"iteration": 7}], {})
    with pytest.raises(FormatError, match="found no tensor"):
        list(locate(tmp_path, [("float32", Chunk((), (), item))]))


@pytest.mark.parametrize("nbytes", [1, 100, 2000])
def test_an_item_that_ends_elsewhere_is_refused(tmp_path: Path, nbytes: int) -> None:
    item = written(tmp_path, torch.zeros(5000))
    with pytest.raises(FormatError):
        list(locate(tmp_path, [("float32", Chunk((0,), (5000,), item._replace(nbytes=item.nbytes - nbytes)))]))


def test_every_record_of_which_something_was_read_is_proved(tmp_path: Path) -> None:
    """A piece may be of several items: reads that follow each other are reported as one."""
    item = written(tmp_path, torch.arange(50.0))
    path = tmp_path / item.file
    data = bytearray(path.read_bytes())
    [(_, at)] = locate(tmp_path, [("float32", Chunk((0,), (50,), item))])
    [extent] = at.storage
    for start, stop in ((0, len(data)), (extent.offset, extent.offset + 8), (extent.offset + 8, len(data))):
        prove_items(path, [item], [(start, stop - start, zlib.crc32(data[start:stop]))])
    data[extent.offset] ^= 1
    path.write_bytes(data)
    for start, stop in ((0, len(data)), (extent.offset, extent.offset + 8), (extent.offset + 8, len(data))):
        with pytest.raises(FormatError, match="the CRC-32 of data/0 is"):
            prove_items(path, [item], [(start, stop - start, zlib.crc32(data[start:stop]))])
    prove_items(path, [item], [(0, item.offset, 0)])


def test_a_record_that_was_read_in_part_is_not_read_for_its_checksum_alone(tmp_path: Path) -> None:
    item = written(tmp_path, torch.arange(50.0))
    path = tmp_path / item.file
    data = bytearray(path.read_bytes())
    [(_, at)] = locate(tmp_path, [("float32", Chunk((0,), (50,), item))])
    first, stop = at.storage[0].offset, at.storage[0].offset + at.storage[0].nbytes
    data[stop - 1] ^= 1
    path.write_bytes(data)

    def pieces(*bounds: int) -> list[tuple[int, int, int]]:
        return [(start, end - start, zlib.crc32(data[start:end])) for start, end in pairwise(bounds)]

    for part in (
        pieces(first, stop - 1),
        pieces(first - 9, stop - 1),
        [pieces(first, first + 8, first + 9, stop)[i] for i in (0, 2)],
    ):
        assert prove_items(path, [item], part, every_byte=False) is False
        with pytest.raises(FormatError, match="the CRC-32 of data/0 is"):
            prove_items(path, [item], part)
    for whole in (pieces(first, stop), pieces(first - 9, first + 9, stop), pieces(first, first + 8, stop + 1)):
        with pytest.raises(FormatError, match="the CRC-32 of data/0 is"):
            prove_items(path, [item], whole, every_byte=False)
    data[stop - 1] ^= 1
    path.write_bytes(data)
    assert prove_items(path, [item], pieces(first, first + 8, stop), every_byte=False) is True
