"""What ``plan`` says of an import, beside what the import does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.publish import read_record
from goldens import golden_sets

SET = next(folder for folder in golden_sets() if folder.name == "b_st_tp2pp2_safetensors")


def test_a_plan_of_an_import_is_what_the_import_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "ms"
    words = ["--source", str(SET / "A"), "--target", str(target), "--target-format", "mindspore"]
    assert main(["plan", *words, "--output", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not target.exists()
    assert main(["convert", *words, "--multiprocess-off", "--progress", "none", "--output", "json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (plan["iteration"], plan["consumedSamples"], plan["bytesToWrite"]) == (2, 8, done["bytesWritten"])
    planned = {
        f"{rank['directory']}/{file['name']}": file["nbytes"] for rank in plan["ranks"] for file in rank["files"]
    }
    planned |= {file["name"]: file["nbytes"] for rank in plan["ranks"] for file in rank["metadata"]}
    found = (path for path in target.rglob("*") if path.is_file() and ".ckpt2pt" not in path.parts)
    there = {str(path.relative_to(target)): path.stat().st_size for path in found}
    assert planned == there
    record = read_record(target / ".ckpt2pt" / "claim.json") or {}
    assert record["identity"] == plan["identity"]
    assert sum(chunk["numel"] for rank in plan["ranks"] for chunk in rank["chunks"]) * 12 == plan["bytesToRead"]
    assert main(["plan", *words]) == 0
    reported = capsys.readouterr().out
    assert "mode       Full, MindSpore .ckpt; tp 2, pp 2, vpp 1" in reported
    assert "there" in reported


def test_a_plan_names_parameters_and_every_replica(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", str(SET / "A"), "--target", str(tmp_path / "ms"), "--target-format", "mindspore"]
    more = ["--names", "--generate-all-dp-cp", "--dp-size", "2", "--stage", "1", "--dist-opt-content", "exp_avg"]
    assert main(["plan", *words, *more, "--output", "json"]) == 0
    rank = json.loads(capsys.readouterr().out)["ranks"][0]
    assert [file["name"] for file in rank["files"]] == ["rank_4/network.ckpt", "rank_6/network.ckpt"]
    names = rank["chunks"][0]["names"]
    pairs = {name["megatron"]: name["mindspore"] for name in names}
    inner = "language_model.encoder.layers"
    assert pairs[f"{inner}.0.input_norm.weight"] == f"exp_avg.{inner}.2.input_norm.weight"
    assert pairs["language_model.output_layer.weight"] == "exp_avg.language_model.output_layer.weight"


def test_a_plan_of_another_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", str(SET / "A"), "--target", str(tmp_path / "ms"), "--target-format", "mindspore"]
    assert main(["plan", *words, "--target-tp-size", "1", "--target-pp-size", "1", "--output", "json"]) == 0
    [rank] = json.loads(capsys.readouterr().out)["ranks"]
    [chunk] = rank["chunks"]
    assert (chunk["layers"], chunk["embedding"], chunk["head"]) == ([0, 1, 2, 3], True, True)
    assert rank["metadata"][0]["name"].startswith("source_pt_meta/")
    assert rank["comparedCopies"]
