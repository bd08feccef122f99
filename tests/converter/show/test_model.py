"""What ``inspect`` says of a model for transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from models_made import arrays_of, config_of, save


def test_a_model_is_named_by_its_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("qwen3_moe")
    save(tmp_path, config, arrays_of(config), shards=2)
    assert main(["inspect", str(tmp_path), "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["class"], found["layers"], found["experts"], found["tokens"], found["files"]) == (
        "Qwen3MoeForCausalLM", 2, 4, 40, 2,
    )  # fmt: skip
    rows = {row["name"]: row["count"] for row in found["tensors"]}
    assert rows["model.layers.{0-1}.self_attn.q_proj.weight"] == 2
    assert rows["model.layers.1.mlp.experts.3.up_proj.weight"] == 1


def test_what_is_wrong_with_it_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("llama")
    arrays = arrays_of(config)
    del arrays["model.norm.weight"]
    assert main(["inspect", str(save(tmp_path, config, arrays))]) == 65
    assert "decoder.final_layernorm.weight" in capsys.readouterr().err
