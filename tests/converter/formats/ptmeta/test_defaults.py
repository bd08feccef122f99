"""What the checkpoint tells stands where the description says nothing; what it contradicts is said first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ckpt2pt.cli.commands import main
from ckpt2pt.core.stated import Stated, Statement, read_statement
from ckpt2pt.formats.ptmeta.defaults import reported_by_checkpoint
from descriptions import said_of
from goldens import golden_sets

FOLDER = next(folder for folder in golden_sets() if folder.name == "a2_tp1pp1_tied_bias")
REPORTED = (
    "lr",
    "min_lr",
    "adam_eps",
    "weight_decay",
    "lr_decay_style",
    "train_iters",
    "lr_decay_iters",
    "global_batch_size",
)
FACTS = {"epoch_num": 0, "step_num": 2, "num_steps": 8}


def statement(**values: Any) -> Statement:
    return read_statement(
        {name: Stated(value, "float64" if isinstance(value, float) else "int64") for name, value in values.items()}
    )


def describe(folder: Path, *leave_out: str, **more: Any) -> list[str]:
    said = {name: value for name, value in said_of(FOLDER).items() if name not in leave_out} | more
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in said.items()}))
    return [
        "pt-meta",
        "--description",
        str(path),
        "--ms-path",
        str(FOLDER / "ms"),
        "--param-map-path",
        str(folder / "m"),
    ]


@pytest.mark.parametrize(
    ("given", "stated", "reported"),
    [
        pytest.param({}, {"max_lr": 3e-4}, {"lr": 3e-4}, id="rate"),
        pytest.param({"lr": 1e-3}, {"max_lr": 3e-4}, {}, id="what-is-said-stays"),
        pytest.param({}, {"wd_incr_steps": 400, "lr_decay_steps": 200, "lr_warmup_steps": 20},
                     {"train_iters": 100, "lr_decay_iters": 50, "lr_warmup_iters": 5}, id="counts-of-samples"),
        pytest.param({"train_samples": 400}, {"lr_decay_steps": 200, "lr_warmup_steps": 20},
                     {"lr_decay_samples": 200, "lr_warmup_samples": 20}, id="a-run-of-samples"),
        pytest.param({"lr_warmup_fraction": 0.1}, {"lr_warmup_steps": 20}, {}, id="warm-up-by-a-fraction"),
        pytest.param({}, {"lr_decay_steps": 201}, {}, id="no-whole-iterations"),
        pytest.param({}, {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_style": 0}, {"weight_decay": 0.1}, id="constant"),
        pytest.param({}, {"start_wd": 0.0, "end_wd": 0.1, "wd_incr_style": 1},
                     {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1}, id="growing"),
    ],
)  # fmt: skip
def test_arguments_from_what_a_file_states(
    given: dict[str, Any], stated: dict[str, Any], reported: dict[str, Any]
) -> None:
    found = reported_by_checkpoint(given, statement(**stated), FACTS)
    assert found.pop("global_batch_size") == 4
    assert found == reported


def test_a_step_inside_a_later_epoch_tells_no_batch() -> None:
    assert reported_by_checkpoint({}, statement(), FACTS | {"epoch_num": 1}) == {}


def test_what_the_checkpoint_tells_need_not_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*describe(tmp_path), "--accept-assumptions"]
    assert main(flags) == 0
    full = (tmp_path / "m" / "args_tp00_pp000.pt").read_bytes()
    (tmp_path / "less").mkdir()
    flags = [*describe(tmp_path / "less", *REPORTED), "--accept-assumptions"]
    assert main(flags) == 0
    assert (tmp_path / "less" / "m" / "args_tp00_pp000.pt").read_bytes() == full
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "assumed  args from the checkpoint: " in out


def test_contradictions_and_unknown_arguments_come_first_and_in_few_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = describe(tmp_path, lr=5.0, weight_decay=0.7, adam_eps=0.5, num_layerz=3, train_iters=7)
    assert main([*flags, "--accept-assumptions"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("warning: the checkpoint contradicts the description: max_lr 0.001 (not 5.0)")
    assert all(word in out[0] for word in ("end_wd 0.1 (not 0.7)", "eps 1e-08 (not 0.5)", "wd_incr_steps 400 (not 28)"))
    assert (
        out[2] == "warning: not an argument of Megatron-LM 0.6, and kept as it is: num_layerz (nearest is num_layers)"
    )
    assert len(out) < 20
    assert main([*flags, "--accept-assumptions", "--details"]) == 0
    details = capsys.readouterr().out.splitlines()
    assert details[:3] == out[:3]
    assert len(details) > 200


def test_another_batch_than_the_checkpoints_is_a_contradiction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(describe(tmp_path, global_batch_size=8, train_iters=50, lr_decay_iters=50))
    assert "num_steps / global_batch_size" in capsys.readouterr().out.splitlines()[0]
