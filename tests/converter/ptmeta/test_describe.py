"""Descriptions: YAML and training scripts, read and never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.ptmeta.describe import Description, describe, known

SCRIPT = r"""#!/bin/bash
# a comment with --hidden-size 1
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS=4; TP=${TP:-2}
HIDDEN=1024
DISTRIBUTED_ARGS="--nproc_per_node $GPUS --nnodes 2 --master_port 6000"
GPT_ARGS="
    --num-layers 24 \
    --hidden-size $HIDDEN \
    --tensor-model-parallel-size ${TP} \
    --lr 1.5e-4 --disable-bias-linear --bf16
    --lr-decay-style cosine
"
MODEL_ARGS=(
    --swiglu
    --normalization RMSNorm
    --split 949,50,1   # another
)
torchrun $DISTRIBUTED_ARGS pretrain_gpt.py $GPT_ARGS "${MODEL_ARGS[@]}" \
    --use-distributed-optimizer --no-bias-gelu-fusion --data-path 0.5 one 0.5 two --recompute-activations \
    --noop-layers 3 --save=/ckpt
"""


def read(tmp_path: Path, text: str, name: str = "run.sh") -> Description:
    (tmp_path / name).write_text(text)
    return describe(tmp_path / name)


def test_a_training_script(tmp_path: Path) -> None:
    said = read(tmp_path, SCRIPT)
    assert said.given == {
        "num_layers": 24, "hidden_size": 1024, "tensor_model_parallel_size": 2, "lr": 1.5e-4, "add_bias_linear": False,
        "bf16": True, "lr_decay_style": "cosine", "swiglu": True, "normalization": "RMSNorm", "split": "949,50,1",
        "use_distributed_optimizer": True, "bias_gelu_fusion": False, "data_path": [0.5, "one", 0.5, "two"],
        "recompute_granularity": "selective", "save": "/ckpt",
    }  # fmt: skip
    assert said.unknown == {"noop_layers": 3}
    assert said.world_size == 8


def test_arithmetic_of_the_shell_is_worked_out(tmp_path: Path) -> None:
    text = """
    GPUS=8; HIDDEN=1024
    FFN=$((HIDDEN * 4))
    WORLD=$(($GPUS*$(($NODES))))
    ARGS="--hidden-size ${HIDDEN} --ffn-hidden-size $FFN --seq-length ${SEQ:=2048}"
    torchrun --nproc_per_node $((GPUS / 2)) --nnodes 2 pretrain_gpt.py $ARGS --train-iters $(( (100 + 5) * 2 - 7 % 4 ))
    """
    said = read(tmp_path, text)
    assert said.given == {"hidden_size": 1024, "ffn_hidden_size": 4096, "seq_length": 2048, "train_iters": 207}
    assert said.world_size == 8


@pytest.mark.parametrize("text", ["$((UNKNOWN * 4))", "$((2 ** 99999))", "$((1 / 0))", "$((f(1)))"])
def test_what_cannot_be_worked_out_has_to_be_said(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--num-layers is .*which the script does not say"):
        read(tmp_path, f"python pretrain_gpt.py --num-layers {text}")


def test_a_script_is_never_run(tmp_path: Path) -> None:
    read(tmp_path, f"touch {tmp_path}/ran; $(touch {tmp_path}/ran) `touch {tmp_path}/ran` --num-layers 2")
    assert not (tmp_path / "ran").exists()


def test_yaml_says_the_same(tmp_path: Path) -> None:
    text = "num-layers: 24\nlr: 1.5e-4\nno-bias-gelu-fusion: true\n--swiglu: true\ndata_parallel_size: 2\n"
    assert read(tmp_path, text, "run.yaml").given == {
        "num_layers": 24, "lr": 1.5e-4, "bias_gelu_fusion": False, "swiglu": True, "data_parallel_size": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name", "what"),
    [
        ("--num-layers $LAYERS", "run.sh", r"--num-layers is \$LAYERS"),
        ("--num-layers --bf16", "run.sh", "has no value"),
        ("echo 'open", "run.sh", "cannot be read"),
        ("- a\n- b", "run.yaml", "not a mapping"),
        ("a: {b: c}", "run.yaml", "not an argument with a plain value"),
        ("a: [", "run.yaml", "not a YAML document"),
    ],
)
def test_what_cannot_be_understood_is_said(text: str, name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=what):
        read(tmp_path, text, name)


def test_a_missing_description(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        describe(tmp_path / "none.yaml")


def test_the_table_is_consistent() -> None:
    table = known()
    arguments: Any = table.arguments
    assert set(table.negations.values()) | table.lists | table.switches <= set(arguments)
    assert all(arguments[name] is True for name in table.negations.values())
    assert all(arguments[name] is None for name in table.switches)
