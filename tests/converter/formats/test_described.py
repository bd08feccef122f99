"""Metadata of a run after 0.6: a launch script is read as a pt_meta is, and its silence is not taken for 0.6's defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.index import Collector, Local
from ckpt2pt.errors import UsageError
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.described import template_at

SCRIPT = (
    "torchrun pretrain_gpt.py --num-layers 4 --hidden-size 32 --num-attention-heads 4 --micro-batch-size 1 "
    "--global-batch-size 6 --seq-length 16 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-decay-iters 100 "
    "--train-iters 3 --lr-warmup-iters 2 --weight-decay 0.1 --adam-beta2 0.95 --bf16 --ckpt-format torch"
)


def checkpoint(tmp_path: Path) -> Checkpoint:
    collector = Collector(1, "source")
    collector.add("param", "decoder.final_layernorm.weight", 0, Local("float32", (32,), 0, (Extent("x", 0, 128),)))
    return Checkpoint(path=tmp_path, format="mindspore", iteration=2, tensor=1, pipeline=1, index=collector.index())


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "pretrain.sh"
    path.write_text(text)
    return path


def test_scheduler_and_groups_follow_from_the_script(tmp_path: Path) -> None:
    found = template_at(script(tmp_path, SCRIPT), checkpoint(tmp_path))
    assert (found.scheduler["lr_warmup_steps"], found.scheduler["lr_decay_steps"], found.scheduler["num_steps"]) == (
        12,
        600,
        12,
    )
    assert [(group["wd_mult"], group["weight_decay"], group["betas"], group["step"]) for group in found.groups] == [
        (1.0, 0.1, (0.9, 0.95), 2),
        (0.0, 0.0, (0.9, 0.95), 2),
    ]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("", None),
        (" --transformer-impl local", "local"),
        (" --transformer-impl transformer_engine", "transformer_engine"),
    ],
)
def test_silence_on_the_layer_spec_is_no_answer(more: str, expected: str | None, tmp_path: Path) -> None:
    found = template_at(script(tmp_path, SCRIPT + more), checkpoint(tmp_path))
    assert found.args.get("transformer_impl") == expected


@pytest.mark.parametrize("more", [" --optimizer sgd", " --decoupled-lr 1e-3"])
def test_run_that_cannot_be_described_is_refused(more: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="metadata of such a run cannot be made"):
        template_at(script(tmp_path, SCRIPT.replace(" --bf16", "") + more), checkpoint(tmp_path))
