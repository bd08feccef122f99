"""A rank of a Megatron-LM newer than 0.6, as 0.6 would have saved it: what metadata and results of 0.6 are made from.

Parameters stand in the order of a legacy GPT model; arguments keep what is no object of a class, and entries what 0.6 reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.layout import weight_decay_groups
from ckpt2pt.core.names import is_tied_head
from ckpt2pt.core.params import canonical_name, in_legacy_models, model_order
from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.megatron.headers import MegatronRank
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.torchfile.trees import Call, Global, Value, is_namespace, namespace

_ENTRIES = frozenset(
    {"args", "checkpoint_version", "iteration", "optimizer", "opt_param_scheduler", "rng_state",
     "num_floating_point_operations_so_far"}
)  # fmt: skip
_CLASSES = frozenset({("megatron.core.enums", "ModelType")})
"""What 0.6 itself puts into its arguments (Megatron-LM cac60ce4, megatron/training.py), beside types of torch."""
_LEAVES = {"weight": 0, "bias": 1}


def is_newer(rank: MegatronRank) -> bool:
    """Whether a release after 0.6 wrote it, by the form of the optimizer or the names."""
    return rank.coalesced or rank.core_names


def as_legacy(rank: MegatronRank) -> MegatronRank:
    """The same rank where 0.6 wrote it."""
    if not is_newer(rank):
        return rank
    chunks = tuple(tuple(sorted(chunk, key=_place)) if rank.core_names else chunk for chunk in rank.chunks)
    flat = [ref for chunk in chunks for _, ref in chunk]
    return replace(rank, chunks=chunks, template=legacy_template(rank.template, weight_decay_groups(flat)))


def check_legacy(rank: MegatronRank) -> None:
    """Refuse a model that no legacy GPT model is: :class:`FormatError`."""
    names = (canonical_name(name) for chunk in rank.chunks for name, _ in chunk)
    other = next((name for name in names if not in_legacy_models(name)), None)
    if other:
        raise not_legacy(other, rank.folder)


def not_legacy(name: str, where: Path) -> FormatError:
    """The error for a parameter that no legacy GPT model has."""
    return FormatError(
        f"a legacy GPT model of Megatron-LM 0.6 has no {name}",
        where=where,
        hint=f"choose another {ref('target.format')}",
        field="target.format",
    )


def _place(parameter: tuple[str, TensorRef]) -> tuple[bool, tuple[int, int, int], int, str]:
    """Where a legacy model registers it: modules by the one table, weight before bias, the tied head last."""
    name = parameter[0]
    *module, _ = model_order(canonical_name(name))
    return is_tied_head(name), (module[0], module[1], module[2]), _LEAVES.get(name.rpartition(".")[2], 2), name


def legacy_template(template: Template, decays: tuple[bool, ...]) -> Template:
    """What is no tensor as 0.6 saves it; ``decays`` tells of each parameter group whether its weights decay, in the order of 0.6."""
    tree = {key: value for key, value in template.tree.items() if key in _ENTRIES}
    if is_namespace(tree.get("args")):
        tree["args"] = namespace({name: value for name, value in template.args.items() if _is_plain(value)})
    groups = {group.get("wd_mult", 1.0) != 0: group for group in template.groups}
    if len(groups) == len(template.groups) and set(decays) <= set(groups):
        listed: list[Value] = [dict(groups[kind].items()) for kind in decays]
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
