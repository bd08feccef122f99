"""The plan of a conversion into torch_dist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from dist import CUT, of_mindspore


def test_a_plan_is_what_a_run_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--source", CUT / "ms", "--param-map-path", CUT / "pt_meta", "--target", tmp_path / "out"]
    assert main(["plan", "--target-format", "torch_dist", "--output", "json", *map(str, words)]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert of_mindspore(CUT, tmp_path / "out") == 0
    planned = {file["name"]: file["nbytes"] for rank in plan["ranks"] for file in rank["files"]}
    assert planned == {path.name: path.stat().st_size for path in (tmp_path / "out").glob("iter_*/*.distcp")}
    assert main(["plan", "--target-format", "torch_dist", *map(str, words)]) == 0
    assert "torch_dist of Megatron-LM 0.15 and newer" in capfd.readouterr().out


def test_names_are_the_keys_that_a_loader_asks_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--source", CUT / "A", "--target", tmp_path / "out", "--target-format", "torch_dist", "--names"]
    assert main(["plan", "--output", "json", *map(str, words)]) == 0
    plan = json.loads(capfd.readouterr().out)
    names = [name for rank in plan["ranks"] for chunk in rank["chunks"] for name in chunk["names"]]
    assert {"decoder.layers.mlp.linear_fc1.weight", "optimizer.state.exp_avg_sq.output_layer.weight"} <= {
        name["megatron"] for name in names
    }
    assert plan["bytesToRead"] > 0
    assert {plan["facts"][name] for name in ("iteration", "consumed samples", "parameter groups", "scheduler")} == {
        "the checkpoint"
    }
    assert plan["releases"]["0.15 to 0.19"].startswith("yes, at any")
    assert plan["releases"]["0.8 to 0.14"].startswith("no: ")
