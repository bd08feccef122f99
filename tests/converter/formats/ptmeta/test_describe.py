"""Descriptions: YAML and training scripts, read and never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.formats.ptmeta.describe import Description, describe, known

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
        ("--bf16=false", "run.sh", "--bf16 takes no value, and has false"),
        ("--train-iters 1.5", "run.sh", r"train_iters is '1.5', not a whole number"),
        ("--lr-decay-style banana", "run.sh", "lr_decay_style is 'banana', not one of"),
    ],
)
def test_what_cannot_be_understood_is_said(text: str, name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=what):
        read(tmp_path, text, name)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('bf16: "false"', "bf16 is 'false', not true or false"),
        ("bf16: 1", "bf16 is 1, not true or false"),
        ("bf16:", "bf16 is None, not true or false"),
        ('no-bias-gelu-fusion: "false"', "no_bias_gelu_fusion is 'false', not true or false"),
        ("no-bias-gelu-fusion:", "no_bias_gelu_fusion is None, not true or false"),
        ("recompute-activations: 0", "recompute_activations is 0, not true or false"),
        ("no-save-optim: 1", "no_save_optim is 1, not true or false"),
        ("seed: true", "seed is True, not a whole number"),
        ("num-layers: four", "num_layers is 'four', not a whole number"),
        ("num-layers: 4.0", "num_layers is 4.0, not a whole number"),
        (f"lr: 1{'0' * 400}", "lr is 10+, not a number"),
        (f"lr: 1{'0' * 5000}", "not a YAML document"),
        ("lr: high", "lr is 'high', not a number"),
        ("weight-decay: [0.1]", r"weight_decay is \[0.1\], not a number"),
        ("tokenizer-type: no", "tokenizer_type is False, not text"),
        ("lr-decay-style: banana", "lr_decay_style is 'banana', not one of constant, linear, cosine, inverse-square"),
        ("normalization: rmsnorm", "normalization is 'rmsnorm', not one of LayerNorm, RMSNorm"),
        ("position-embedding-type: alibi", "position_embedding_type is 'alibi', not one of learned_absolute, rope"),
        ("optimizer: lamb", "optimizer is 'lamb', not one of adam, sgd"),
        ("recompute-granularity: some", "recompute_granularity is 'some', not one of full, selective"),
        ("recompute-method: 3", "recompute_method is 3, not one of uniform, block"),
        ("num-layers: 4\nnum_layers: 6", "num_layers is given twice, as num-layers and as num_layers"),
        ("num-layers: 4\nnum-layers: 4", "num_layers is given twice"),
        ("--lr: 1.0\nlr: 2.0", "lr is given twice, as --lr and as lr"),
        ("disable-bias-linear: true\nadd-bias-linear: true", "add_bias_linear is given twice"),
    ],
)
def test_values_that_megatron_would_not_take_are_refused(text: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=what):
        read(tmp_path, text, "run.yaml")


def test_values_become_what_megatrons_parser_makes_of_them(tmp_path: Path) -> None:
    text = "lr: 1\nwandb-exp-name: 7\nnum-layers: '4'\nloss-scale-window: 500\ndata-path: /data\nsplit: 98,1,1\nload:\n"
    assert repr(read(tmp_path, text, "run.yaml").given) == repr({
        "lr": 1.0, "wandb_exp_name": "7", "num_layers": 4, "loss_scale_window": 500.0, "data_path": ["/data"],
        "split": "98,1,1", "load": None,
    })  # fmt: skip
    assert read(tmp_path, "--wandb-exp-name 007 --lr 1").given == {"wandb_exp_name": "007", "lr": 1.0}


def test_activations_are_recomputed_only_when_that_is_said(tmp_path: Path) -> None:
    assert read(tmp_path, "recompute-activations: false", "run.yaml").given == {}
    both = read(tmp_path, "recompute-activations: true\nrecompute-granularity: full", "run.yaml")
    assert both.given == {"recompute_granularity": "selective"}  # as Megatron's own check has it


def test_in_a_script_the_last_of_two_counts(tmp_path: Path) -> None:
    """So it does for argparse, which reads that command line: scripts append ``"$@"`` to override what they say."""
    assert read(tmp_path, "--num-layers 4 --lr 1.0 --num-layers 6").given == {"num_layers": 6, "lr": 1.0}


def test_a_missing_description(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        describe(tmp_path / "none.yaml")


def test_the_table_is_consistent() -> None:
    table = known()
    arguments: Any = table.arguments
    assert set(table.negations.values()) | table.lists | table.switches <= set(arguments)
    assert all(arguments[name] is True for name in table.negations.values())
    assert all(arguments[name] is None for name in table.switches | table.integers)
    kinds = [table.lists, table.switches, table.integers, table.reals, set(table.choices)]
    assert len(set[str]().union(*kinds)) == sum(map(len, kinds))
    assert set[str]().union(*kinds) <= set(arguments)
    assert all(arguments[name] in {None, *values} for name, values in table.choices.items())
