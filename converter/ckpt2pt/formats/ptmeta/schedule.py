"""Learning rate and weight decay at a point of the training, and the optimizer's groups.  Pure.

Megatron-LM cac60ce4: megatron/optimizer_param_scheduler.py, megatron/training.py (``get_optimizer_param_scheduler``) and
core/optimizer/__init__.py (``_get_param_groups``).  Steps count samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ckpt2pt.core.layout import Parameter, weight_decay_groups
from ckpt2pt.errors import UsageError
from ckpt2pt.formats.ptmeta.arguments import floating, integer
from ckpt2pt.formats.ptmeta.gpt import Argument
from ckpt2pt.formats.torchfile.trees import Value

_HINT = "give train_iters (or train_samples) and the lr_* arguments of the run in the description"


def scheduler(args: Mapping[str, Argument], samples: int) -> dict[str, Value]:
    """The entry ``opt_param_scheduler`` of a model file after ``samples``."""
    fraction = args.get("lr_warmup_fraction")
    if args.get("train_iters"):
        batch = integer(args, "global_batch_size")
        decay = integer(args, "lr_decay_iters") * batch
        growth = integer(args, "train_iters") * batch
        warmup = int(floating(args, "lr_warmup_iters", 0)) * batch
    elif args.get("train_samples"):
        decay, growth = integer(args, "lr_decay_samples"), integer(args, "train_samples")
        warmup = int(floating(args, "lr_warmup_samples", 0))
    else:
        raise UsageError("neither train_iters nor train_samples", where="the model description", hint=_HINT)
    return {
        "max_lr": floating(args, "lr"),
        "lr_warmup_steps": warmup if fraction is None else floating(args, "lr_warmup_fraction") * decay,
        "num_steps": samples,
        "lr_decay_style": str(args.get("lr_decay_style")),
        "lr_decay_steps": decay,
        "min_lr": floating(args, "min_lr"),
        "start_wd": floating(args, "start_weight_decay"),
        "end_wd": floating(args, "end_weight_decay"),
        "wd_incr_style": str(args.get("weight_decay_incr_style")),
        "wd_incr_steps": growth,
    }


def learning_rate(args: Mapping[str, Argument], state: Mapping[str, Value]) -> float:
    """The learning rate at ``state``'s ``num_steps``."""
    top, low, steps = floating(args, "lr"), floating(args, "min_lr"), _of(state, "num_steps")
    warmup, decay, style = _of(state, "lr_warmup_steps"), _of(state, "lr_decay_steps"), state["lr_decay_style"]
    if warmup > 0 and steps <= warmup:
        first = floating(args, "lr_warmup_init", 0.0)
        return first + (top - first) * float(steps) / float(warmup)
    if style == "constant":
        return top
    if steps > decay:
        return low
    if style == "inverse-square-root":
        return max(low, float(top * max(warmup, 1) ** 0.5 / (max(steps, 1) ** 0.5)))
    ratio = float(steps - warmup) / float(decay - warmup)
    if style == "linear":
        return low + (1.0 - ratio) * (top - low)
    if style == "cosine":
        return low + 0.5 * (math.cos(math.pi * ratio) + 1.0) * (top - low)
    raise UsageError(f"lr_decay_style {style!r} is not known", where="the model description", hint=_HINT)


def weight_decay(state: Mapping[str, Value]) -> float:
    """The weight decay at ``state``'s ``num_steps``."""
    first, last = _of(state, "start_wd"), _of(state, "end_wd")
    steps, growth, style = _of(state, "num_steps"), _of(state, "wd_incr_steps"), state["wd_incr_style"]
    if steps > growth or style == "constant":
        return last
    ratio = float(steps) / float(growth)
    share = ratio if style == "linear" else 0.5 * (math.cos(math.pi * (1 - ratio)) + 1.0)
    return first + share * (last - first)


def param_groups(
    args: Mapping[str, Argument], state: Mapping[str, Value], parameters: Iterable[Parameter], *, step: int
) -> list[Value]:
    """The groups in order of their first parameter: biases and vectors have no weight decay."""
    lr, decay = learning_rate(args, state), weight_decay(state)
    return [
        {
            "wd_mult": 1.0 if decays else 0.0,
            "lr_mult": 1.0,
            "is_expert_parallel": False,
            "is_decoupled_lr": False,
            "max_lr": floating(args, "lr"),
            "min_lr": floating(args, "min_lr"),
            "lr": lr,
            "bias_correction": True,
            "betas": (floating(args, "adam_beta1"), floating(args, "adam_beta2")),
            "eps": floating(args, "adam_eps"),
            "weight_decay": decay if decays else 0.0,
            "step": step,
        }
        for decays in weight_decay_groups(parameters)
    ]


def _of(state: Mapping[str, Value], name: str) -> float:
    value = state[name]
    assert isinstance(value, int | float)
    return value
