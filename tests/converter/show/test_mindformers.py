"""inspect of a MindFormers checkpoint: what it is, and its tensors by its own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.errors import FormatError
from ckpt2pt.show.checkpoint import inspect
from ckpt2pt.show.mindformers import inspect_mindformers
from mindformers_made import Model, save, save_sharded


def test_a_folder_of_iterations_is_named_by_what_it_is(tmp_path: Path) -> None:
    save(tmp_path, Model(pynative=True, experts=4).arrays)
    found: dict[str, Any] = inspect(tmp_path)
    assert found["kind"] == "MindFormers checkpoint"
    assert found["iteration"] == 3
    assert found["optimizer"] == "main parameters, first moments, second moments"
    names = {str(row["name"]): row["count"] for row in found["tensors"]}
    assert names["decoder.layers.{0-1}.self_attention.linear_qkv.weight"] == 2
    assert names["decoder.layers.1.mlp.experts.weight1"] == 1


def test_details_list_every_tensor(tmp_path: Path) -> None:
    model = Model()
    folder = save_sharded(tmp_path, model.arrays, {"output_layer.weight": (2, 1)}, ranks=2)
    found: dict[str, Any] = inspect_mindformers(folder, details=True)
    assert len(found["tensors"]) == len(model.arrays)


def test_it_needs_no_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, Model().arrays)
    assert main(["inspect", str(tmp_path), "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["consumedSamples"] == 24


def test_what_is_wrong_with_it_is_said(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path, Model().arrays, {}, ranks=1)
    (folder / "metadata.json").write_text("{}")
    with pytest.raises(FormatError):
        inspect(tmp_path)
