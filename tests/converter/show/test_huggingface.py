"""The plan of a conversion into weights for transformers: names of both sides, the class, exact sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from hfsets import save_megatron


def test_the_plan_says_what_will_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_megatron("moe", tmp_path / "megatron")
    words = ["--source", str(source), "--target", str(tmp_path / "out"), "--target-format", "safetensors"]
    assert main(["plan", *words, "--output", "json", "--names"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    [rank] = plan["ranks"]
    [file] = rank["files"]
    names = {row["megatron"]: row["mindspore"] for chunk in rank["chunks"] for row in chunk["names"]}
    expert = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    assert names[expert] == "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
    assert main(["convert", *words, "--progress", "none"]) == 0
    assert (tmp_path / "out" / file["name"]).stat().st_size == file["nbytes"]
    for one in rank["metadata"]:
        assert (tmp_path / "out" / one["name"]).stat().st_size == one["nbytes"]
    capsys.readouterr()
    assert main(["plan", *words]) == 0
    assert "MixtralForCausalLM" in capsys.readouterr().out
