"""``ckpt2pt verify`` of an import, against its manifests and against the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.formats.mindspore import index_file
from goldens import golden_sets

SET = next(folder for folder in golden_sets() if folder.name == "b_st_tp2pp2_safetensors")


def words(target: Path, *more: str) -> list[str]:
    return ["--source", str(SET / "A"), "--target", str(target), "--target-format", "mindspore", *more]


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    target = tmp_path / "ms"
    more = ["--generate-all-dp-cp", "--dp-size", "2", "--multiprocess-off", "--progress", "none"]
    assert main(["convert", *words(target, *more)]) == 0
    return target


REPLICAS = ("--generate-all-dp-cp", "--dp-size", "2")


@pytest.mark.parametrize("level", ["digest", "full"])
def test_an_import_is_what_it_was_made_from(level: str, imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    more = ["--level", level, "--progress", "none", "--output", "json"]
    assert main(["verify", *words(imported, *REPLICAS, *more)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["equal"], found["ranks"], found["checkedTensors"] > 0) == (True, 4, level == "full")


def test_one_stage_of_another_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--target-tp-size", "1", "--target-pp-size", "2")
    assert main(["convert", *words(tmp_path / "ms", *sizes), "--multiprocess-off", "--progress", "none"]) == 0
    capsys.readouterr()
    assert main(["verify", *words(tmp_path / "ms", *sizes), "--stage", "1", "--progress", "none"]) == 0
    assert "1 rank," in capsys.readouterr().out


@pytest.mark.parametrize("place", ["rank_0", "rank_2"])
def test_a_flipped_bit_is_found(place: str, imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the first file of a rank, whose elements are compared, and in a replica, which is compared with it."""
    path = imported / place / "network.ckpt"
    name, ref = next((name, ref) for name, ref in index_file(path).items() if name.startswith("exp_avg_sq."))
    with path.open("r+b") as file:
        file.seek(ref.extents[0].offset)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert main(["verify", *words(imported, *REPLICAS), "--progress", "none"]) == 76
    reported = capsys.readouterr().out
    assert f"{place}/network.ckpt" in reported
    assert "has another CRC-32" in reported
    assert (name in reported) == (place == "rank_0")


def test_files_that_are_gone(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (imported / "rank_0" / "network.ckpt").unlink()
    next((imported / "pt_meta").glob("args_*")).unlink()
    assert main(["verify", *words(imported, *REPLICAS), "--progress", "none"]) == 76
    reported = capsys.readouterr().out
    assert reported.count("is not there") == 2
    assert main(["verify", *words(imported / "none"), "--progress", "none"]) == 66


def test_torch_reads_no_file_of_mindspore(imported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *words(imported), "--reader", "torch"]) == 64
    assert "leave --reader out" in capsys.readouterr().err
