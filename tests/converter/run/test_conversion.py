"""Runs: resumed, refused, interrupted, side by side."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckpt2pt.discover.request import Request
from ckpt2pt.errors import FormatError, InputError, NoSpaceError, TryAgainError, UsageError, VolumeTooSmallError, ref
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.run import conversion as run_module
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.prove import verify_target
from conversions import Quiet, flags_for, request_for

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def pipelined(golden: Path) -> Path:
    return golden / "megatron06" / "j_tp1pp2dp2"


def convert(request: Request, *stages: int) -> run_module.Outcome:
    return run(request, stages or range(request.topology.pipeline), Quiet())


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.pt"))
    }


def test_the_tracker_waits_for_every_stage(pipelined: Path, tmp_path: Path) -> None:
    request = request_for(pipelined, tmp_path)
    first = convert(request, 1)
    assert not first.published
    assert not (tmp_path / TRACKER).exists()
    assert convert(request, 0).published
    assert (tmp_path / TRACKER).read_text() == "2"
    report = json.loads((first.target.state / "report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == [0, 1]


def test_a_second_run_keeps_what_is_there(pipelined: Path, tmp_path: Path) -> None:
    request = request_for(pipelined, tmp_path)
    convert(request)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    again = convert(request)
    assert (again.converted, len(again.kept), again.published) == ((), 2, True)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == before


def test_a_second_run_that_asks_for_more_proof_gives_it(pipelined: Path, tmp_path: Path) -> None:
    request = request_for(pipelined, tmp_path, verify="digest")
    folder = run(request, range(2), Quiet()).target.folder
    path = folder / "mp_rank_00_001" / "distrib_optim.pt"
    whole = path.read_bytes()
    seen = path.stat()
    path.write_bytes(whole[:70_000] + bytes([whole[70_000] ^ 1]) + whole[70_001:])
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # as when the disk did it: nobody has written
    assert not run(replace(request, verify="none"), range(2), Quiet()).converted
    assert len(run(replace(request, verify="full"), range(2), Quiet()).converted) == 2
    assert path.read_bytes() == whole
    assert not run(replace(request, verify="full"), range(2), Quiet()).converted


def test_a_file_that_was_lost_is_made_again_with_the_same_bytes(pipelined: Path, tmp_path: Path) -> None:
    request = request_for(pipelined, tmp_path)
    convert(request)
    before = contents(tmp_path)
    (tmp_path / "iter_0000002" / "mp_rank_00_001" / "distrib_optim.pt").unlink()
    again = convert(request)
    assert again.converted == ((0, 1),)
    assert contents(tmp_path) == before


def test_processes_write_the_same_bytes_as_one(golden: Path, tmp_path: Path) -> None:
    folder = min((golden / "megatron06").glob("b_*"))
    convert(request_for(folder, tmp_path / "one"))
    convert(request_for(folder, tmp_path / "many", in_process=False, workers=3))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_the_manifest_holds_the_true_size_and_crc_of_each_file(pipelined: Path, tmp_path: Path) -> None:
    from zlib import crc32

    outcome = convert(request_for(pipelined, tmp_path))
    manifest = json.loads((outcome.target.state / "stage-000.json").read_text())
    files = [file for rank in manifest["ranks"] for file in rank["files"]]
    assert len(files) == 2
    for file in files:
        data = (outcome.target.folder / file["path"]).read_bytes()
        assert (file["nbytes"], file["crc32"]) == (len(data), f"{crc32(data):08x}")


def test_another_conversion_is_refused_and_leaves_the_first_alone(pipelined: Path, tmp_path: Path) -> None:
    convert(request_for(pipelined, tmp_path))
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="another conversion") as caught:
        convert(request_for(pipelined, tmp_path, full=False))
    assert ref("target.overwrite") in caught.value.hint
    assert contents(tmp_path) == before
    assert (tmp_path / TRACKER).read_text() == "2"


def test_a_source_that_changed_is_another_conversion(pipelined: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelined / "ms", tmp_path / "ms")
    request = request_for(pipelined, tmp_path / "out", source=tmp_path / "ms")
    convert(request)
    path = tmp_path / "ms" / "rank_0" / "network.ckpt"
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    with pytest.raises(UsageError, match="a source that changed since"):
        convert(request)


def written_anew(source: Path, copy: Path) -> None:
    """As a training does it that keeps its file's name: the same size, other content."""
    path = max(source.glob("rank_*/*.ckpt"))
    shutil.copyfile(path, copy)
    flip_bit(copy, copy.stat().st_size // 2)
    copy.replace(path)


@pytest.fixture
def copied(pipelined: Path, tmp_path: Path) -> Request:
    source = tmp_path / "source"
    shutil.copytree(pipelined / "ms", source)
    return replace(request_for(pipelined, tmp_path / "out"), source=source)


@pytest.mark.parametrize(
    "moment",
    [
        "ckpt2pt.discover.training.agree",
        "ckpt2pt.discover.plan_rank",
        "ckpt2pt.discover.checkpoint.moves_of",
        "ckpt2pt.run.conversion.prove_unchanged",
    ],
)
def test_a_source_that_is_written_during_the_run_is_not_published(
    copied: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    name, _, function = moment.rpartition(".")
    real = getattr(sys.modules[name], function)

    def then(*arguments: Any, **more: Any) -> Any:
        monkeypatch.setattr(moment, real)
        written_anew(copied.source, tmp_path / "new")
        return real(*arguments, **more)

    monkeypatch.setattr(moment, then)
    with pytest.raises(TryAgainError, match="the source was written while it was read"):
        convert(copied, 1)
    assert not list((tmp_path / "out").rglob("rank-*.json"))
    assert convert(copied).published
    assert verify_target(copied, (0, 1), level="full").differences == ()


def test_overwrite_does_again_what_is_not_right_to_the_last_bit(pipelined: Path, tmp_path: Path) -> None:
    request = request_for(pipelined, tmp_path)
    convert(request)
    right = contents(tmp_path)
    flip_bit(next(tmp_path.rglob("mp_rank_00_001/distrib_optim.pt")), 5000)
    assert contents(tmp_path) != right
    again = convert(replace(request, overwrite=True))
    assert (again.converted, again.kept) == (((0, 1),), ((0, 0),))
    assert contents(tmp_path) == right


def flip_bit(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_an_older_iteration_is_there_and_the_tracker_stays(pipelined: Path, tmp_path: Path) -> None:
    (tmp_path / "iter_0000009").mkdir()
    (tmp_path / TRACKER).write_text("9")
    outcome = convert(request_for(pipelined, tmp_path))
    assert (outcome.published, outcome.newer) == (True, 9)
    assert (tmp_path / TRACKER).read_text() == "9"
    assert "the tracker stays at iteration 9, which is newer: write 2 into it to go back" in outcome.sentence()


def test_the_older_result_stays_until_the_newer_is_complete(pipelined: Path, tmp_path: Path) -> None:
    convert(request_for(pipelined, tmp_path))
    old = contents(tmp_path / "iter_0000002")
    half = convert(request_for(pipelined, tmp_path, full=False, overwrite=True), 0)
    assert not half.published
    assert "the result that is there stays until the other stages are done" in half.sentence()
    assert (tmp_path / TRACKER).read_text() == "2"
    assert contents(tmp_path / "iter_0000002") == old
    rest = convert(request_for(pipelined, tmp_path, full=False, overwrite=True))
    assert (rest.published, rest.converted) == (True, ((0, 1),))
    convert(request_for(pipelined, tmp_path / "fresh", full=False))
    assert contents(tmp_path / "iter_0000002") == contents(tmp_path / "fresh" / "iter_0000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "iter_0000002", TRACKER]


def test_a_folder_of_megatron_is_not_touched(pipelined: Path, tmp_path: Path) -> None:
    unexpected = tmp_path / "iter_0000002" / "mp_rank_00_000" / "model_optim_rng.pt"
    unexpected.parent.mkdir(parents=True)
    unexpected.write_text("theirs")
    with pytest.raises(UsageError, match="did not write"):
        convert(request_for(pipelined, tmp_path))
    assert unexpected.read_text() == "theirs"


def test_two_runs_on_one_stage_one_wins_and_the_other_says_why(pipelined: Path, tmp_path: Path) -> None:
    request = request_for(pipelined, tmp_path)
    outcome = convert(request, 0)
    with (outcome.target.state / "stage-001.lock").open("w+") as held:
        held.write("node-7 pid 42\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TryAgainError, match="node-7 pid 42"):
            convert(request)
    assert convert(request).published


def test_a_target_without_room_is_refused_before_anything_is_made(
    pipelined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt2pt.io.volume.free_bytes", lambda _: 1000)
    with pytest.raises(VolumeTooSmallError, match="1000 B are free"):
        convert(request_for(pipelined, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_in_the_middle_leaves_nothing_half_done(
    pipelined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(pipelined, tmp_path / "out")
    convert(request_for(pipelined, tmp_path / "undisturbed"))
    real, calls = os.pwrite, iter(range(10_000))

    def full_disk(fd: int, data: bytes, offset: int) -> int:
        if next(calls) == 40:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full_disk)
        with pytest.raises(NoSpaceError, match="No space left") as caught:
            convert(request)
    assert "run the same command again" in caught.value.hint
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert not (tmp_path / "out" / TRACKER).exists()
    assert convert(request).published
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_short_write_is_continued(pipelined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(request_for(pipelined, tmp_path / "undisturbed"))
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:1000], offset))
    convert(request_for(pipelined, tmp_path / "out"))
    monkeypatch.undo()
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_bytes_that_changed_on_the_disk_are_noticed(
    pipelined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckpt2pt.errors import VerificationError

    real = os.pwrite
    calls = iter(range(10_000))

    def bad_cable(fd: int, data: bytes, offset: int) -> int:
        if next(calls) == 7:
            flipped = bytearray(data)
            flipped[0] ^= 1
            return real(fd, flipped, offset)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", bad_cable)
    with pytest.raises(VerificationError, match="CRC-32"):
        convert(request_for(pipelined, tmp_path, verify="digest"))
    assert not list(tmp_path.rglob("*.pt"))


def spoil(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    path = next((folder / "rank_2").iterdir())
    path.chmod(0o600)
    path.write_bytes(change(path.read_bytes()))
    return path


def test_bad_input_of_one_rank_is_found_before_anything_is_written(pipelined: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelined / "ms", tmp_path / "ms")
    spoil(tmp_path / "ms", lambda data: data[: len(data) // 2])
    with pytest.raises(FormatError):
        convert(request_for(pipelined, tmp_path / "out", source=tmp_path / "ms"))
    assert not (tmp_path / "out").exists()


def test_ranks_at_different_steps_are_refused(pipelined: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelined / "ms", tmp_path / "ms")
    key = b"step_num\x12\x11\x12\x05Int64\x1a\x08"
    path = next((tmp_path / "ms" / "rank_2").iterdir())
    assert path.read_bytes().count(key + b"\x02") == 1
    spoil(tmp_path / "ms", lambda data: data.replace(key + b"\x02", key + b"\x03"))
    with pytest.raises(InputError, match="step_num is 2 and 3"):
        convert(request_for(pipelined, tmp_path / "out", source=tmp_path / "ms"))


def command(folder: Path, target: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "ckpt2pt", "convert", *flags_for(folder, target), "--progress", "none", *more]


def test_a_stage_whose_source_was_mended_is_done_alone(pipelined: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelined / "ms", tmp_path / "ms")
    request = replace(request_for(pipelined, tmp_path / "out"), source=tmp_path / "ms")
    expected = contents(convert(replace(request, target=tmp_path / "other")).target.folder)
    [file] = (tmp_path / "ms" / "rank_2").iterdir()
    whole = file.read_bytes()
    spoil(tmp_path / "ms", lambda data: data.replace(b"encoder.final_norm", b"encoder.Final_norm"))
    convert(request, 0)
    with pytest.raises(InputError, match="Final_norm"):
        convert(request, 1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.pt")}
    file.write_bytes(whole)
    outcome = convert(request, 1)
    assert outcome.published
    assert contents(outcome.target.folder) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the good stage is as it was"
    os.utime(file)
    with pytest.raises(UsageError, match="a source that changed since"):
        convert(request)


def test_the_metadata_of_a_rank_is_read_once(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[str]()
    real = Archive.open

    def count(path: Path, option: str = "") -> Archive:
        opened.append(path.name)
        return real(path, option)

    monkeypatch.setattr("ckpt2pt.formats.ptmeta.metadata.Archive", SimpleNamespace(open=count))
    request = request_for(golden / "megatron06" / "b_tp2pp2", tmp_path / "out", in_process=False, workers=2)
    convert(request)  # in worker processes, which read it for themselves
    assert sorted(opened) == [f"args_tp{tp:02d}_pp{pp:03d}.pt" for tp in range(2) for pp in range(2)]
    opened.clear()
    convert(request)  # everything is kept
    assert sorted(opened) == [f"args_tp{tp:02d}_pp{pp:03d}.pt" for tp in range(2) for pp in range(2)]
