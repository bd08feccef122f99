"""``common.pt`` and ``metadata.json`` to be written: what a distributed checkpoint holds that is no tensor.

Megatron-LM core_v0.15.0 to core_v0.19.0: megatron/training/checkpointing.py (``load_checkpoint``,
``check_checkpoint_args``) and megatron/core/optimizer/distrib_optimizer.py (``sharded_state_dict``).  Every one of them reads
``common.pt``; the objects of 0.19 that take its place are read by 0.19 alone.
"""

from __future__ import annotations

from typing import cast

from ckpt2pt.core.state import State, Values
from ckpt2pt.errors import MissingInputError, aside, ref
from ckpt2pt.formats.megatron.scaler import SCALER, scaler_tree
from ckpt2pt.formats.torchfile.archive import archive_bytes
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Value, namespace

SHARDING = "fully_reshardable"
"""How the optimizer's state is sharded: as the weights are, so that it can be loaded into any layout."""

METADATA_JSON = (
    b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    b'"common_backend": "torch", "common_backend_version": 1}'
)

_CONTENT: dict[Value, Value] = {
    "distrib_optim_sharding_type": SHARDING,
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
_ARGUMENTS = (
    "add_position_embedding",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
    "tokenizer_type",
    "global_batch_size",
    "data_parallel_random_init",
    "seq_length",
)
"""Arguments that a run compares with its own, besides those of the model; written where they are known."""
_GRADIENTS = "accumulate_allreduce_grads_in_fp32"
"""Of fp16 trainings, for whoever converts the result into a form that keeps the type of gradients."""


def common_tree(
    state: State, sizes: Values, *, full: bool, chained: bool = False
) -> tuple[dict[Value, Value], dict[str, bytes]]:
    """The tree in ``common.pt`` and the storages that it names; ``sizes`` are arguments that the tensors themselves tell, by Megatron's names.

    ``chained``: the run to come has an optimizer of experts beside that of dense parameters, whose tensors are the same; a
    loader asks for as many states as it has optimizers (core/optimizer/optimizer.py, ``ChainedOptimizer``).

    Raises :class:`MissingInputError` where nothing states the number of attention heads, hyperparameters of the optimizer, or the scheduler.
    """
    stated = {name: state.args[name] for name in _ARGUMENTS if name in state.args}
    args = {
        **stated,
        **state.architecture,
        **({} if state.scaler is None else {"fp16": True, _GRADIENTS: state.args.get(_GRADIENTS) is True}),
        "num_attention_heads": state.number("num_attention_heads"),
        **sizes,
        "iteration": state.iteration,
        "consumed_train_samples": state.samples or 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "no_save_optim": not full,
        "no_save_rng": True,  # a loader then looks for no states of random generators
    }
    tree: dict[Value, Value] = {
        "args": namespace(cast("dict[str, Value]", args)),
        "checkpoint_version": 3.0,
        "iteration": state.iteration,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": dict(_CONTENT),
    }
    storages: dict[str, bytes] = {}
    if full:
        if not state.scheduler:
            raise MissingInputError(
                "nothing states the scheduler of learning rate and weight decay",
                where=state.where,
                hint=f"give a pt_meta, or the launch script of the Megatron run, in {ref('metadata.path')}, or convert weights alone{aside('mode')}",
                field="metadata.path",
            )
        more: dict[Value, Value] = {}
        if state.scaler is not None:
            more[SCALER], storages = scaler_tree(state.scaler, "0")
        more["param_state_sharding_type"] = SHARDING
        states: list[Value] = [
            {"optimizer": {"param_groups": _groups(state, experts=experts)}, **more}
            for experts in ((False, True) if chained else (False,))
        ]
        tree["optimizer"] = dict(enumerate(states)) if chained else states[0]
        tree["opt_param_scheduler"] = cast("Value", dict(state.scheduler))
    return tree, storages


def write_common(state: State, sizes: Values, *, full: bool, chained: bool = False) -> bytes:
    """``common.pt``, as :func:`common_tree` describes it."""
    tree, storages = common_tree(state, sizes, full=full, chained=chained)
    return archive_bytes("common", write_pickle(tree), [*storages.values()])


def _groups(state: State, *, experts: bool) -> list[Value]:
    """Every group with the true step, those with weight decay first; a loader finds its own by their keys, whatever the order.

    There may be more than one of a kind: embedding and output layer with a learning rate of their own.
    """
    for decays in (True, False):
        state.group(decays=decays)  # refuses where nothing states it
    own = [group for group in state.groups if bool(group.get("is_expert_parallel")) == experts]
    kinds = {bool(group.get("wd_mult", 1.0)) for group in own}
    own += [state.group(decays=decays, experts=experts) for decays in (True, False) if decays not in kinds]
    ordered = sorted(own, key=lambda group: not group.get("wd_mult", 1.0))
    return [cast("Value", {**group, "is_expert_parallel": experts, "step": state.step}) for group in ordered]
