"""Which releases of Megatron-LM load a checkpoint with its optimizer, and why others do not.  Pure.

By what the loaders of core_v0.6.0 to core_v0.19.0 ask for: megatron/core/optimizer/distrib_optimizer.py
(``load_parameter_state``, ``load_state_dict``), megatron/training/checkpointing.py, megatron/legacy (up to 0.17).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ckpt2pt.core.state import plain_values
from ckpt2pt.formats.megatron.headers import MegatronRank
from ckpt2pt.formats.megatron.order import Style
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.torchfile.trees import Call, Global

Releases = Mapping[str, str]
"""Releases, such as ``0.8 to 0.19`` -> yes or no, under which condition, or for which reason."""

_NO_LEGACY = "no: they have no legacy models"
_SIZES = "where no parameter needs a gap (all sizes are multiples of 64)"
SHARDINGS: Mapping[str, Releases] = {
    "fully_reshardable": {
        "0.8 to 0.14": "no: they do not know a fully_reshardable optimizer",
        "0.15 to 0.19": "yes, at any tensor, pipeline and data parallel size",
    },
    "dp_reshardable": {
        "0.8 to 0.14": "no: they do not know a dp_reshardable optimizer",
        "0.15 to 0.19": "yes, at the same tensor and pipeline parallel size, with the same buckets",
    },
    "fully_sharded_model_space": {
        "0.8 to 0.15": "yes, at any tensor, pipeline and data parallel size",
        "0.16 to 0.19": "no: they refuse flattened tensors",
    },
    "dp_zero_gather_scatter": {"0.6 to 0.19": "yes, at the same tensor and pipeline parallel size"},
}
"""How the optimizer's state of a distributed checkpoint is sharded -> who loads it."""
WEIGHTS: Releases = {
    "0.12 to 0.14": "yes, with Transformer Engine and --no-load-optim --no-load-rng",
    "0.15 to 0.19": "yes, with --no-load-optim --no-load-rng",
}
"""Who loads a distributed checkpoint of weights alone."""


def loads_of(rank: MegatronRank) -> Releases:
    """Who loads a checkpoint in the ``torch`` format, by one of its ranks; nothing for an optimizer that is not distributed."""
    if rank.buffers is None and rank.has_plain_optimizer:
        return {}
    parameters = [one for chunk in rank.chunks for one in chunk]
    fused = any(name.endswith("layer_norm_weight") for name, _ in parameters)
    style = Style(names="mcore" if rank.core_names else "legacy", transformer_engine=fused)
    aligned = all(not tensor.numel % 64 for _, tensor in parameters)
    found = torch_loads(style, full=rank.buffers is not None, coalesced=rank.coalesced, aligned=aligned)
    return {**found, **classes_in(rank.template)}


def classes_in(template: Template) -> Releases:
    """Who refuses a checkpoint for what its pickle names; a result of ckpt2pt names nothing that anyone refuses."""
    found: dict[str, str] = {}
    args = cast("dict[str, object]", template.args)
    if plain_values(args) != args:
        found["older than its own"] = "often no: its arguments name classes that they do not have"
    match template.tree.get("rng_state"):
        case [{"np_rng_state": (_, Call(func=Global(module=module)), *_)}, *_] if module.startswith("numpy.core"):
            found["0.14 to 0.19, numpy 2"] = "no: they refuse the arrays of numpy 1 in its random states"
        case _:
            pass
    return found


def torch_loads(style: Style, *, full: bool, coalesced: bool = True, aligned: bool) -> Releases:
    """The same; ``aligned``: all parameters have sizes that are multiples of 64.  Without gaps ``style.release`` is 0.7."""
    legacy = style.names == "legacy"
    needs = "legacy models" if legacy else style.needs
    last = "0.17" if legacy else "0.19"
    after = {"0.18 and 0.19": _NO_LEGACY} if legacy else {}
    if not full:
        return {f"0.7 to {last}": f"yes, with {needs} and --no-load-optim --no-load-rng", **after}
    if not coalesced:
        return {
            "0.6": "yes",
            "0.7 to 0.19": "no: they read coalesced optimizer files; weights alone of legacy models up to 0.17",
        }
    found = {"0.6": "no: it reads optimizer files of another form"}
    if aligned:
        return {**found, f"0.7 to {last}": f"yes, with {needs}", **after}
    seven = style.release == (0, 7)
    own, others = ("0.7", f"0.8 to {last}") if seven else (f"0.8 to {last}", "0.7")
    found |= {own: f"yes, with {needs}", others: f"no: they read it only {_SIZES}"}
    return {**dict(sorted(found.items())), **after}
