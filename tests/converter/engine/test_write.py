"""Moves carried out: elements cut in two, holes that stay zero, and failures that leave nothing behind."""

from __future__ import annotations

import errno
import os
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE, Move, Sink
from ckpt2pt.engine import write as engine
from ckpt2pt.engine.readback import read_back
from ckpt2pt.engine.write import Meter, Stop, write_files
from ckpt2pt.errors import (
    Ckpt2ptError,
    FileAccessError,
    FormatError,
    InterruptedRunError,
    NoSpaceError,
    TimedOutError,
    VerificationError,
    VolumeTooSmallError,
)
from ckpt2pt.formats.megatron.payload import FilePayload
from ckpt2pt.formats.mindspore.writer import mindspore_file
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import tensor
from entries import entry_of, moves_into

# ------------------------------------------------------------------------------------------------------------- whole files


def payload(name: str, dtype: str, numel: int, copied: tuple[Extent, ...] = ()) -> FilePayload:
    sizes = (numel * DTYPE_BYTES[dtype], *(extent.nbytes for extent in copied))
    return FilePayload(
        name=name, pickle=write_pickle(tensor(dtype, "0", numel, 0, (numel,))), storages=sizes, copied=copied
    )


def extents_of(path: Path, nbytes: int, cuts: list[int], *, first: int = 0) -> tuple[Extent, ...]:
    marks = sorted({0, nbytes, *(cut for cut in cuts if 0 < cut < nbytes)})
    return tuple(Extent(str(path), first + a, b - a) for a, b in pairwise(marks))


def move(extents: tuple[Extent, ...], source: str, sinks: tuple[Sink, ...], first: int = 0) -> Move:
    return Move(name="w", role="param", dtype=source, extents=extents, first=first, sinks=sinks)


def both_files(target: str = "bfloat16", start: int = 0) -> tuple[Sink, ...]:
    return (
        Sink(file=MODEL_FILE, storage=0, start=start, dtype=target),
        Sink(file=OPTIM_FILE, storage=0, start=start, dtype="float32"),
    )


def write(folder: Path, payloads: list[FilePayload], moves: list[Move], *, check: bool = True) -> dict[str, int]:
    folder.mkdir(exist_ok=True)
    reported: dict[str, Any] = {}
    written, digests = write_files(
        folder, payloads, moves, stop=Stop(), advance=lambda _: None, check=check, prove=reported.update
    )
    extents = sorted(extent for move in moves for extent in move.extents)
    assert [(path, first, size) for path in sorted(reported) for first, size, _ in reported[path]] == extents
    for path, pieces in reported.items():
        data = Path(path).read_bytes()
        assert all(crc == zlib.crc32(data[first : first + size]) for first, size, crc in pieces)
    for file in written:
        data = file.path.read_bytes()
        assert (file.nbytes, file.crc32) == (len(data), zlib.crc32(data))
    assert not list(folder.glob(".*"))
    return digests


SLICINGS = {
    "whole": [],
    "at-elements": [4, 400],
    "inside-elements": [1, 6, 7, 1001, 1002, 1003],
    "every-byte": list(range(1200)),
    "around-a-block": [engine.BLOCK_BYTES - 1, engine.BLOCK_BYTES + 1],
    "a-block-of-odd-size-first": [3, engine.BLOCK_BYTES + 2],
}


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("slicing", SLICINGS)
def test_slices_at_any_byte_give_every_element(slicing: str, source: str, tmp_path: Path) -> None:
    numel = 300_001
    values = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(getattr(torch, source))
    data = values.view(torch.uint8).numpy().tobytes()
    path = tmp_path / "source"
    path.write_bytes(b"x" * 5 + data + b"y")
    extents = extents_of(path, len(data), SLICINGS[slicing], first=5)
    payloads = [payload(MODEL_FILE, "bfloat16", numel), payload(OPTIM_FILE, "float32", numel)]
    digests = write(tmp_path / "out", payloads, [move(extents, source, both_files())])
    assert digests == {"param:w": zlib.crc32(data)}
    assert torch.equal(torch.load(tmp_path / "out" / MODEL_FILE), values.to(torch.bfloat16))
    assert torch.equal(torch.load(tmp_path / "out" / OPTIM_FILE), values.float())


@settings(deadline=None, max_examples=60)  # each writes files
@given(
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(1, 60),
    st.lists(st.integers(1, 239), max_size=12),
    st.integers(1, 13),
)
def test_blocks_and_slices_of_any_size_give_every_element(
    tmp_path_factory: pytest.TempPathFactory, source: str, numel: int, cuts: list[int], block: int
) -> None:
    folder = tmp_path_factory.mktemp("sliced")
    width = DTYPE_BYTES[source]
    values = torch.arange(numel).to(getattr(torch, source))
    data = values.view(torch.uint8).numpy().tobytes()
    (folder / "source").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "BLOCK_BYTES", width + block)  # a block holds at least one element
        write(
            folder / "out",
            [payload(MODEL_FILE, "float32", numel)],
            [
                move(
                    extents_of(folder / "source", len(data), cuts),
                    source,
                    (Sink(file=MODEL_FILE, storage=0, start=0, dtype="float32"),),
                )
            ],
        )
    assert torch.equal(torch.load(folder / "out" / MODEL_FILE), values.float())


def test_extents_of_several_files_join(tmp_path: Path) -> None:
    data = np.arange(40, dtype="<f4").tobytes()
    for number, (start, stop) in enumerate([(0, 30), (30, 31), (31, 160)]):
        (tmp_path / f"part{number}").write_bytes(data[start:stop])
    extents = tuple(Extent(str(tmp_path / f"part{n}"), 0, size) for n, size in enumerate([30, 1, 129]))
    write(tmp_path / "out", [payload(MODEL_FILE, "bfloat16", 40)], [move(extents, "float32", both_files()[:1])])
    assert torch.equal(torch.load(tmp_path / "out" / MODEL_FILE), torch.arange(40).bfloat16())


def test_pieces_of_one_tensor_meet_and_padding_is_zero(tmp_path: Path) -> None:
    values = np.arange(1, 101, dtype="<f4")
    (tmp_path / "source").write_bytes(values.tobytes())
    moves = []
    for first, stop in [(60, 100), (0, 25), (25, 60)]:
        extents = (Extent(str(tmp_path / "source"), 4 * first, 4 * (stop - first)),)
        sink = Sink(file=OPTIM_FILE, storage=0, start=7 + first, dtype="float32")
        moves.append(move(extents, "float32", (sink,), first))
    digests = write(tmp_path / "out", [payload(OPTIM_FILE, "float32", 120)], moves)
    assert digests == {"param:w": zlib.crc32(values.tobytes())}
    expected = torch.zeros(120)
    expected[7:107] = torch.from_numpy(values)
    assert torch.equal(torch.load(tmp_path / "out" / OPTIM_FILE), expected)


def test_storages_of_the_template_are_copied_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "template").write_bytes(b"ab0123456789")
    copied = (Extent(str(tmp_path / "template"), 2, 10), Extent(str(tmp_path / "template"), 0, 2))
    write(tmp_path / "out", [payload(MODEL_FILE, "float32", 3, copied)], [])
    archive = Archive.open(tmp_path / "out" / MODEL_FILE)
    data = (tmp_path / "out" / MODEL_FILE).read_bytes()
    found = {key: data[e.offset : e.offset + e.nbytes] for key, e in archive.storages.items()}
    assert found == {"0": bytes(12), "1": b"0123456789", "2": b"ab"}


# ---------------------------------------------------------------------------------------------------------------- failures


def one_move(path: Path, nbytes: int) -> tuple[list[FilePayload], list[Move]]:
    extents = (Extent(str(path), 0, nbytes),)
    return [payload(MODEL_FILE, "float32", nbytes // 4)], [
        move(extents, "float32", (Sink(file=MODEL_FILE, storage=0, start=0, dtype="float32"),))
    ]


def assert_refused(folder: Path, path: Path, nbytes: int, error: type[Ckpt2ptError], message: str) -> None:
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(b"older")
    with pytest.raises(error, match=message):
        write(folder, *one_move(path, nbytes))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {MODEL_FILE: b"older"}


def test_a_source_that_shrank_is_reported_and_leaves_the_older_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(400))
    assert_refused(tmp_path / "out", tmp_path / "source", 800, FileAccessError, "the file ended at byte 400")


def test_a_source_that_is_gone_is_reported(tmp_path: Path) -> None:
    assert_refused(tmp_path / "out", tmp_path / "source", 800, FileAccessError, "opening failed")


def test_a_source_that_ends_inside_an_element_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(402))
    assert_refused(tmp_path / "out", tmp_path / "source", 402, FormatError, "ends inside an element")


def test_a_target_without_room_is_reported_before_a_byte_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt2pt.io.files.fallocate", lambda fd, offset, nbytes: errno.ENOSPC)
    (tmp_path / "source").write_bytes(bytes(400))
    assert_refused(tmp_path / "out", tmp_path / "source", 400, NoSpaceError, "reserving")


def test_a_quota_that_is_too_small_is_no_reason_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt2pt.io.files.fallocate", lambda fd, offset, nbytes: errno.EDQUOT)
    (tmp_path / "source").write_bytes(bytes(400))
    assert_refused(tmp_path / "out", tmp_path / "source", 400, VolumeTooSmallError, "Disk quota exceeded")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_mode_that_cannot_be_set_is_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int, mode: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fchmod", refuse)
    (tmp_path / "source").write_bytes(b"1234" * 100)
    ref = TensorRef(name="w", dtype="float32", shape=(100,), extents=(Extent(str(tmp_path / "source"), 0, 400),))
    file = mindspore_file("ckpt", "x.ckpt", [entry_of(ref)], crc=False)
    (tmp_path / "out").mkdir()
    write_files(tmp_path / "out", [file], moves_into(file, [ref]), stop=Stop(), advance=lambda _: None, check=True)
    assert (tmp_path / "out" / "x.ckpt").read_bytes().endswith(b"1234" * 100)
    assert "mode 0400 cannot be set" in caplog.text


def test_a_template_that_shrank_is_reported(tmp_path: Path) -> None:
    (tmp_path / "template").write_bytes(b"ab")
    (tmp_path / "out").mkdir()
    copied = (Extent(str(tmp_path / "template"), 0, 10),)
    with pytest.raises(FileAccessError, match="ended at byte 2"):
        write(tmp_path / "out", [payload(MODEL_FILE, "float32", 3, copied)], [])
    assert not list((tmp_path / "out").iterdir())


def test_a_stop_ends_the_moves_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(4 * engine.BLOCK_BYTES))
    payloads, moves = one_move(tmp_path / "source", 4 * engine.BLOCK_BYTES)
    stop = Stop()
    done: list[int] = []

    def advance(nbytes: int) -> None:
        done.append(nbytes)
        stop.ask(TimedOutError("late", where="here", hint="wait"))

    (tmp_path / "out").mkdir()
    with pytest.raises(TimedOutError, match="late"):
        write_files(tmp_path / "out", payloads, moves, stop=stop, advance=advance, check=False)
    assert len(done) == 1
    assert 0 < done[0] <= engine.BLOCK_BYTES
    assert not list((tmp_path / "out").iterdir())


def test_the_first_reason_to_stop_counts() -> None:
    stop = Stop()
    stop.check()
    stop.ask(TimedOutError("first", where="here", hint="wait"))
    stop.ask(InterruptedRunError("second", where="here", hint="wait"))
    with pytest.raises(TimedOutError, match="first"):
        stop.check()


def test_a_file_that_differs_on_the_disk_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * engine.BLOCK_BYTES)
    crc = zlib.crc32(b"abc" * engine.BLOCK_BYTES)
    read_back(tmp_path / "file", crc)
    with pytest.raises(VerificationError, match=f"{crc ^ 1:08x} was written"):
        read_back(tmp_path / "file", crc ^ 1)


def test_a_kernel_that_reads_less_than_asked_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:1001]], offset))
    values = np.arange(5000, dtype="<f4")
    (tmp_path / "source").write_bytes(values.tobytes())
    write(tmp_path / "out", *one_move(tmp_path / "source", 20_000), check=False)
    assert torch.equal(torch.load(tmp_path / "out" / MODEL_FILE), torch.from_numpy(values))


def test_a_meter_holds_back_and_loses_nothing() -> None:
    received: list[int] = []
    meter = Meter(received.append, interval=3600)
    for _ in range(10):
        meter.advance(7)
    assert received == []
    meter.flush()
    meter.flush()
    assert received == [70]


def test_a_meter_without_an_interval_speaks_each_time() -> None:
    received: list[int] = []
    meter = Meter(received.append, interval=0)
    meter.advance(3)
    meter.advance(4)
    assert received == [3, 4]
