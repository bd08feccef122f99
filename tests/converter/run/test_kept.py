"""The same command again over a result that was changed on the disk since, in every direction and format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.engine.readback import is_whole
from ckpt2pt.errors import TargetConflictError, VerificationError
from ckpt2pt.run import kept
from ckpt2pt.run.conversion import Outcome
from goldens import golden_root

SETS = golden_root() / "megatron06"
CUT, SHARDS = SETS / "b_st_tp2pp2_safetensors", SETS / "j_tp1pp2dp2"
HERE = ("--progress", "none", "--multiprocess-off")
KINDS: dict[str, list[str | Path]] = {
    "megatron06": ["convert", "--source", CUT / "ms", "--param-map-path", CUT / "pt_meta", "--target"],
    "relaid": ["convert", "--source", CUT / "A", "--target-tp-size", "1", "--target"],
    "megatron": ["convert", "--source", CUT / "A", "--target-format", "megatron", "--target"],
    "torch_dist": ["convert", "--source", CUT / "A", "--target-format", "torch_dist", "--target"],
    "import": ["import", "--megatron-path", CUT / "A", "--ms-path"],
    "mindspore": ["convert", "--source", CUT / "ms", "--target-format", "mindspore", "--target"],
    "combine": [
        "combine", "--checkpoint-dir", SHARDS / "ms_zero_src", "--strategy-dir", SHARDS / "ms_zero_src" / "opt_shard_info",
        "--output-dir",
    ],
}  # fmt: skip


@pytest.fixture(params=KINDS)
def again(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., int]:
    """A conversion that was carried out once, into ``tmp_path / "out"``."""

    def run(*more: str) -> int:
        return main([*map(str, KINDS[request.param]), str(tmp_path / "out"), *HERE, *more])

    assert run() == 0
    return run


def checkpoint_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        if path.suffix in {".pt", ".distcp", ".ckpt", ".safetensors"} and "pt_meta" not in path.parts:
            yield path


def flip(path: Path, *, keep_time: bool) -> None:
    seen = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    time = seen.st_mtime_ns if keep_time else seen.st_mtime_ns + 1_000
    os.utime(path, ns=(seen.st_atime_ns, time))


def test_what_nobody_has_touched_is_kept_unread(
    again: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def seen(path: Path, crc: int) -> bool:
        read.append(path)
        return is_whole(path, crc)

    monkeypatch.setattr(kept, "is_whole", seen)
    assert again() == 0
    assert "everything was there already" in capfd.readouterr().out
    assert not read
    assert again("--verify", "digest") == 0
    assert read


@pytest.mark.parametrize("number", [0, -1], ids=["first", "last"])
def test_bytes_that_changed_are_noticed_by_the_time_of_their_file(
    number: int, again: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = [*checkpoint_files(tmp_path / "out")][number]
    before = path.read_bytes()
    flip(path, keep_time=False)
    assert again() == 64
    received = capfd.readouterr()
    assert f"{path.name} is there, which ckpt2pt did not write, or which was changed since" in received.err
    assert "--overwrite" in received.err
    assert "already" not in received.out
    assert again("--overwrite") == 0
    assert path.read_bytes() == before
    assert again() == 0


def test_a_file_that_was_cut_is_noticed(again: Callable[..., int], tmp_path: Path) -> None:
    path = [*checkpoint_files(tmp_path / "out")][-1]
    path.write_bytes(path.read_bytes()[:-1])
    assert again() == 64
    assert again("--overwrite") == 0
    assert again() == 0


def test_a_file_that_was_only_touched_or_copied_stays(again: Callable[..., int], tmp_path: Path) -> None:
    for path in checkpoint_files(tmp_path / "out"):
        os.utime(path, ns=(1, 1))
    assert again() == 0


def test_bytes_that_changed_behind_the_time_are_found_where_verification_is_asked_for(
    again: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = next(checkpoint_files(tmp_path / "out"))
    flip(path, keep_time=True)
    assert again("--verify", "digest") == 76
    assert str(path) in capfd.readouterr().err
    assert again("--verify", "digest", "--overwrite") == 0
    assert again("--verify", "digest") == 0


@pytest.mark.parametrize("kind", ["megatron06", "megatron", "torch_dist", "import"])
def test_a_stage_that_is_run_again_notices_those_of_others(kind: str, tmp_path: Path) -> None:
    words = [*map(str, KINDS[kind]), str(tmp_path / "out"), *HERE]
    assert main(words) == 0
    manifest = next((tmp_path / "out").rglob("rank-01-001.json"))
    listed = json.loads(manifest.read_text())["files"]
    folder = manifest.parents[1]
    path = next(folder / file["path"] for file in listed if file["nbytes"] > 1000)
    flip(path, keep_time=False)
    assert main([*words, "--stage", "0"]) == 76
    path.unlink()
    assert main([*words, "--stage", "0"]) == 75
    assert main([*words, "--stage", "1"]) == 0
    assert main([*words, "--stage", "0"]) == 0


def test_weights_that_a_full_conversion_covers_are_not_said_to_be_there_where_they_changed(tmp_path: Path) -> None:
    words = [*map(str, KINDS["megatron06"]), str(tmp_path / "out"), *HERE]
    assert main(words) == 0
    assert main([*words, "--convert-param-only"]) == 0
    flip(next(checkpoint_files(tmp_path / "out")), keep_time=False)
    assert main([*words, "--convert-param-only"]) == 64


def test_the_library_answers_alike(tmp_path: Path) -> None:
    def convert(**more: str) -> Outcome:
        return ckpt2pt.convert(source=CUT / "A", target=tmp_path / "out", target_format="torch_dist", **more)  # type: ignore[arg-type]

    convert()
    path = next(checkpoint_files(tmp_path / "out"))
    flip(path, keep_time=True)
    convert()
    with pytest.raises(VerificationError):
        convert(verify="digest")
    os.utime(path, ns=(1, 1))
    with pytest.raises(TargetConflictError):
        convert()
