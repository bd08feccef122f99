"""Options for what a checkpoint of one format alone does not tell: of MindFormers, and of a model for transformers."""

from __future__ import annotations

import argparse

from ckpt2pt.io.flags import Group, factor, path


def add_mindformers(group: Group) -> None:
    """What nothing in a checkpoint of MindFormers tells."""
    group.add_argument(
        "--mindformers-config",
        type=path,
        metavar="YAML",
        help="YAML of the MindFormers training, which says how rows of its fused weights are ordered (spec.source.mindformers.config)",
    )
    for name, what in (
        ("use-interleaved-weight-layout-mlp", "gate and up of linear_fc1 alternate row by row"),
        ("use-contiguous-weight-layout-attention", "linear_qkv is [Q; K; V], and not one group after the other"),
    ):
        first, *rest = name.split("-")
        field = first + "".join(map(str.capitalize, rest))
        group.add_argument(
            f"--{name}",
            type=_boolean,
            metavar="true|false",
            help=f"the same without the YAML: whether {what} (spec.source.mindformers.{field})",
        )


def add_mindformers_trainer(group: Group) -> None:
    """Which of the two trainers of MindFormers a result is for."""
    group.add_argument(
        "--mindformers-trainer",
        choices=("pynative", "graph"),
        default="pynative",
        help="with --target-format mindformers: what loads the result, the trainer of PyNative mode or that of the static graph (default: pynative), "
        "of which the flags above or the YAML say how it orders rows (spec.target.trainer)",
    )


def _boolean(text: str) -> bool:
    if (word := text.lower()) not in {"true", "false"}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return word == "true"


def add_huggingface(parser: argparse.ArgumentParser) -> None:
    """What neither arguments nor tensors of a training tell of a model for transformers."""
    group = parser.add_argument_group("what the training does not say (--target-format safetensors)")
    group.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="tokens of the tokenizer; the rows behind them are padding and are cut; default: all rows stay (spec.target.huggingface.vocabSize)",
    )
    group.add_argument(
        "--rope-scaling-factor",
        type=factor,
        metavar="X",
        help="factor of llama3's rope scaling that the training had, asked for where its arguments may not be true (spec.target.huggingface.ropeScalingFactor)",
    )
    group.add_argument(
        "--tokenizer-from",
        type=path,
        metavar="DIR",
        help="folder whose tokenizer files are copied (spec.target.huggingface.tokenizerPath)",
    )
