"""Plans of results for Megatron-LM 0.6 and MindSpore say where what is no tensor is from, and who loads the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from goldens import golden_root
from results import edit_tree

SET = golden_root() / "megatron06" / "b_tp2pp2"
FORTH = ("--source", SET / "ms", "--param-map-path", SET / "pt_meta")
BACK = ("--source", SET / "A")


def plan(
    capsys: pytest.CaptureFixture[str], target: Path, form: str, *words: object
) -> tuple[dict[str, str], dict[str, str]]:
    asked = ["plan", "--target", target, "--target-format", form, *words]
    assert main([*map(str, asked)]) == 0
    text = capsys.readouterr().out
    assert main([*map(str, asked), "--output", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for rows in (found["facts"], found["releases"]):
        for name, value in rows.items():
            assert name in text
            assert value in text
    return found["facts"], found["releases"]


def test_a_result_for_0_6_says_what_is_of_the_checkpoint_and_what_of_its_metadata(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, releases = plan(capsys, tmp_path / "out", "megatron06", *FORTH)
    assert facts == {
        "iteration": "step_num in epoch 0",
        "consumed samples": "the checkpoint",
        "arguments": "pt_meta, the metadata",
        "parameter groups": "pt_meta, the metadata, with what the checkpoint states",
        "scheduler": "pt_meta, the metadata, with what the checkpoint states",
        "random generators": "pt_meta, the metadata",
    }
    assert releases["0.6"] == "yes"
    assert releases["0.7 to 0.19"].startswith("no: they read coalesced optimizer files")


def test_options_and_metadata_of_another_iteration_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = tmp_path / "meta"
    shutil.copytree(SET / "pt_meta", metadata)
    for path in metadata.glob("args_*.pt"):
        edit_tree(path, lambda tree: tree.update(iteration=1))
    words = ("--source", SET / "ms", "--param-map-path", metadata, "--zero-consumed-samples")
    facts, _ = plan(capsys, tmp_path / "out", "megatron06", *words)
    assert facts["consumed samples"] == "0, as asked for"
    assert facts["random generators"] == "meta, the metadata, of another iteration"


def test_weights_alone_for_0_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, releases = plan(capsys, tmp_path / "out", "megatron06", *FORTH, "--convert-param-only")
    assert "scheduler" not in facts
    assert releases["0.6"] == "yes, with --no-load-optim --no-load-rng"
    assert releases["0.18 and 0.19"].startswith("no: ")


def test_a_megatron_checkpoint_says_all_itself_but_for_another_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, _ = plan(capsys, tmp_path / "out", "megatron06", *BACK)
    assert set(facts.values()) == {"the checkpoint", "the checkpoint itself"}
    facts, _ = plan(capsys, tmp_path / "other", "megatron06", *BACK, "--target-tp-size", "1")
    assert facts["rng_state"].startswith("as at the start of a run with seed")


def test_a_mindspore_result_is_loaded_by_no_megatron(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, releases = plan(capsys, tmp_path / "out", "mindspore", *BACK)
    assert facts["consumed samples"] == facts["arguments"] == "the checkpoint"
    assert "random generators" not in facts
    assert releases["Megatron-LM 0.6 to 0.19"].startswith("no: ")
    facts, _ = plan(capsys, tmp_path / "more", "mindspore", "--source", SET / "ms", "--tp-size", 2, "--pp-size", 2)
    assert facts["iteration"] == "step_num in epoch 0"
