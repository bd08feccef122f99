"""What ``model_optim_rng.pt`` of Megatron-LM 0.7 to 0.19 holds beside the model: plain values and a small Namespace.

Nothing in it is of Megatron or numpy, so that every release reads it: an enumeration of one release is refused by another,
an array of numpy 1 by 0.19.  What a load needs: megatron/training/checkpointing.py (``load_checkpoint``,
``check_checkpoint_args``), megatron/core/optimizer_param_scheduler.py and core/optimizer/optimizer.py (the keys of a
parameter group are what 0.13 and newer match it by), core_v0.8.0 to core_v0.19.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from ckpt2pt.core.state import State
from ckpt2pt.errors import MissingInputError, ref
from ckpt2pt.formats.megatron.scaler import SCALER, scaler_tree
from ckpt2pt.formats.ptmeta.rng import rng_state
from ckpt2pt.formats.torchfile.trees import Value, namespace

_GROUP: dict[str, object] = {
    "is_expert_parallel": False,
    "default_config": True,
    "wd_mult": 1.0,
    "lr_mult": 1.0,
    "is_decoupled_lr": False,
    "max_lr": None,
    "min_lr": None,
    "lr": None,
    "bias_correction": True,
    "betas": None,
    "eps": None,
    "weight_decay": None,
    "step": None,
}
"""The keys of a group in order; None for what has to be stated."""
_SCHEDULER = (
    "max_lr", "lr_warmup_steps", "num_steps", "lr_decay_style", "lr_decay_steps", "min_lr",
    "start_wd", "end_wd", "wd_incr_style", "wd_incr_steps",
)  # fmt: skip


class Group(NamedTuple):
    """A parameter group: whether its weights decay, and whether they are of experts with an optimizer of their own."""

    decays: bool
    experts: bool = False


DEFAULT_SEED = 1234
"""megatron/training/arguments.py, ``--seed``."""


def model_tree(
    state: State,
    *,
    sizes: dict[str, Value],
    chunks: dict[str, Value],
    optimizers: Sequence[Sequence[Group]] | None,
    rank: tuple[int, int, int],
) -> tuple[dict[str, Value], dict[str, bytes]]:
    """The tree of a rank's model file, and by key the storages of its random generators' states and of its loss scale.

    ``sizes`` are arguments that the layout and the tensors tell, ``chunks`` the model; ``optimizers`` are the parameter groups
    of each, None where weights alone are written; ``rank`` is (tp, pp, ep).  Raises :class:`MissingInputError` where nothing
    states what a load needs.
    """
    args: dict[str, Value] = {
        **cast("dict[str, Value]", state.architecture),
        **sizes,
        "num_attention_heads": state.number("num_attention_heads"),
        "consumed_train_samples": state.samples or 0,
    }
    rng, storages = rng_state(seed_of(state), tp=rank[0], pp=rank[1], ep=rank[2])
    tree: dict[str, Value] = {
        "args": namespace(args),
        "checkpoint_version": 3.0,
        "iteration": state.iteration,
        **chunks,
    }
    if optimizers is not None:
        more: dict[Value, Value] = {}
        if state.scaler is not None:
            more[SCALER], scale = scaler_tree(state.scaler, SCALER)
            storages |= scale
        states: list[Value] = [
            {"optimizer": {"param_groups": [_group(state, group) for group in groups]}, **more} for groups in optimizers
        ]
        tree["optimizer"] = states if len(states) > 1 else states[0]
        tree["opt_param_scheduler"] = {name: _needed(state, name, state.scheduler.get(name)) for name in _SCHEDULER}
    tree["rng_state"] = rng
    return tree, storages


def seed_of(state: State) -> int:
    """The seed that the states of random generators are made from."""
    seed = state.args.get("seed")
    return seed if type(seed) is int else DEFAULT_SEED


def _group(state: State, group: Group) -> Value:
    known = {**state.group(decays=group.decays, experts=group.experts), "is_expert_parallel": group.experts}
    found: dict[Value, Value] = {}
    for name, default in _GROUP.items():
        value = known.get(name, default)
        if value is None and name in {"max_lr", "min_lr"}:
            value = state.scheduler.get(name)
        if value is None and name == "lr":  # the scheduler sets it before the first step
            value = state.scheduler.get("max_lr")
        found[name] = _needed(state, name, value)
    return found


def _needed(state: State, name: str, value: object) -> Value:
    if value is None:
        raise MissingInputError(
            f"nothing states {name}, which Megatron-LM needs to go on training",
            where=state.where,
            hint=f"give a pt_meta, or the launch script of the Megatron run, in {ref('metadata.path')}",
            field="metadata.path",
        )
    return cast("Value", value)
