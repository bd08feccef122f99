"""What a Megatron-LM newer than 0.6 saves beside tensors, as 0.6 would have saved it: what metadata and results of 0.6 are made from.

Arguments keep what is no object of a class, and entries what 0.6 reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.torchfile.pickles import Call, Global, Value, is_namespace, namespace

_ENTRIES = frozenset(
    {"args", "checkpoint_version", "iteration", "optimizer", "opt_param_scheduler", "rng_state",
     "num_floating_point_operations_so_far"}
)  # fmt: skip
_HYPERPARAMETERS = frozenset(
    {"wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "max_lr", "min_lr", "lr", "bias_correction", "betas", "eps",
     "weight_decay", "step"}
)  # fmt: skip
"""What 0.6 has in a parameter group; 0.19 adds what it finds a group by."""
_CLASSES = frozenset({("megatron.core.enums", "ModelType")})
"""What 0.6 itself puts into its arguments (Megatron-LM cac60ce4, megatron/training.py), beside types of torch."""


def legacy_template(template: Template, decays: tuple[bool, ...]) -> Template:
    """What is no tensor as 0.6 saves it; ``decays`` tells of each parameter group whether its weights decay, in the order of 0.6."""
    tree = {key: value for key, value in template.tree.items() if key in _ENTRIES}
    if is_namespace(tree.get("args")):
        tree["args"] = namespace({name: value for name, value in template.args.items() if _is_plain(value)})
    groups = {group.get("wd_mult", 1.0) != 0: group for group in template.groups}
    if len(groups) == len(template.groups) and set(decays) <= set(groups):
        listed: list[Value] = [
            {key: value for key, value in groups[kind].items() if key in _HYPERPARAMETERS} for kind in decays
        ]
        outer = tree["optimizer"]
        others = {key: value for key, value in outer.items() if key != "optimizer"} if isinstance(outer, dict) else {}
        tree["optimizer"] = {"optimizer": {"param_groups": listed}, **others}
    return replace(template, tree=tree)


def _is_plain(value: Value) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, Call):
        return (value.func.module, value.func.name) in _CLASSES
    if isinstance(value, Global):
        return value.module == "torch"
    return value is None or isinstance(value, bool | int | float | str)
