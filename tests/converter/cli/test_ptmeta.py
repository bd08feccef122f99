"""The command line of pt-meta."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from descriptions import write_description
from goldens import golden_sets

FOLDER = next(folder for folder in golden_sets() if folder.name == "a2_tp1pp1_tied_bias")


def test_from_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "pt-meta",
        "--megatron-path",
        str(FOLDER / "A"),
        "--param-map-path",
        str(tmp_path / "m"),
        "--output",
        "json",
    ]
    assert main(flags) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 3
    assert main(flags) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 0


def test_from_a_description_in_two_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = write_description(FOLDER, tmp_path / "run.yaml")
    flags = [
        "pt-meta",
        "--description",
        str(description),
        "--ms-path",
        str(FOLDER / "ms"),
        "--param-map-path",
        str(tmp_path / "m"),
    ]
    assert main(flags) == 64
    out, err = capsys.readouterr()
    assert "assumed  rng_state" in out
    assert "--accept-assumptions" in err
    assert main([*flags, "--accept-assumptions"]) == 0
    assert (tmp_path / "m" / "args_tp00_pp000.pt").is_file()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ([], "one source is needed"),
        (["--megatron-path", "a", "--description", "b"], "one source is needed"),
        (["--description", "b"], "--ms-path is missing"),
        (["--megatron-path", "a", "--bucket-size", "0"], "--bucket-size is 0"),
        (["--description", "b", "--stage-list", "x"], "not a list of numbers"),
    ],
)
def test_wrong_usage(more: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pt-meta", "--param-map-path", str(tmp_path), *more]) == 64
    assert word in capsys.readouterr().err


def test_flags_of_the_other_source_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["pt-meta", "--megatron-path", str(FOLDER / "A"), "--param-map-path", str(tmp_path / "m")]
    assert main([*flags, "--noop", "62", "63", "--dp-size", "2"]) == 0
    assert "with --megatron-path nothing is made of --dp-size, --noop" in capsys.readouterr().err
    assert main(flags) == 0
    assert "nothing is made of" not in capsys.readouterr().err


def test_no_op_layers_beyond_the_model_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = write_description(FOLDER, tmp_path / "run.yaml")
    flags = ["pt-meta", "--description", str(description), "--ms-path", str(FOLDER / "ms")]
    flags += ["--param-map-path", str(tmp_path / "m"), "--accept-assumptions"]
    assert main([*flags, "--noop", "62", "63", "--synthesize", "rng"]) == 0
    found = capsys.readouterr()
    assert "no-op layers 62, 63 are ignored: there are only layers 0 to 1" in found.out
    assert "with --description nothing is made of --synthesize" in found.err
