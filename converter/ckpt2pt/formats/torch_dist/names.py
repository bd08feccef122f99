"""Keys of a distributed checkpoint, as roles and canonical names.  Pure.

decoder.layers.mlp.linear_fc1.weight                      (L, ...)      decoder.layers.0 ... L - 1, one key for all layers
decoder.layers.3.mlp.linear_fc1.weight                    (...)         layer 3, where layers differ from each other
decoder.layers.mlp.experts.experts.linear_fc1.weight      (L, E, ...)   every expert of every layer
optimizer.state.exp_avg.<key>                                           its first moment

Megatron-LM, megatron/core/transformer/transformer_block.py and moe/experts.py (``sharded_state_dict``);
core/optimizer/distrib_optimizer.py (``param`` in fully_reshardable, ``fp32_param`` in older forms and in
core/optimizer/optimizer.py); core/models/gpt/gpt_layer_specs.py (``sharded_state_dict_keys_map``: norms go by the names of
Transformer Engine).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ckpt2pt.core.params import FUSED, prediction_of
from ckpt2pt.core.tensor import Role

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+?)\.(.+)")
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")
_ROLES: dict[str, Role] = {
    "param": "main_param",
    "fp32_param": "main_param",
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
}
_LAYERS = "decoder.layers."
_NUMBERED = re.compile(r"(\d+)\.(.+)")
_EXPERTS = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(.+)")


class Named(NamedTuple):
    """A role, and a name in parts: the number of a layer, or of an expert, stands between two of them."""

    role: Role
    parts: tuple[str, ...]

    @property
    def leading(self) -> int:
        """How many axes of the tensor number layers and experts."""
        return len(self.parts) - 1

    def name(self, numbers: tuple[int, ...]) -> str:
        """The canonical name at a place along the leading axes."""
        first, *rest = self.parts
        return first + "".join(f"{number}{part}" for number, part in zip(numbers, rest, strict=True))


def named(key: str) -> Named | None:
    """What a key stands for; None for state of an optimizer that is stored in another form."""
    role: Role = "param"
    if found := _STATE.fullmatch(key):
        if found[1] not in _ROLES:
            return None
        role, key = _ROLES[found[1]], found[2]
    elif _OPTIMIZER.match(key):
        return None
    if predicted := prediction_of(key):
        before, (last, inner) = list[str](), predicted
    elif not key.startswith(_LAYERS):
        return Named(role, (key,))
    else:
        inner = key.removeprefix(_LAYERS)
        layer = _NUMBERED.fullmatch(inner)
        *before, last = (f"{_LAYERS}{layer[1]}.",) if layer else (_LAYERS, ".")
        inner = layer[2] if layer else inner
    inner = FUSED.get(inner, inner)
    expert = _EXPERTS.fullmatch(inner)
    if expert is None:
        return Named(role, (*before, last + inner))
    last += "mlp.experts.local_experts."
    return Named(role, (*before, f"{last}{expert[1]}.{expert[2]}") if expert[1] else (*before, last, f".{expert[2]}"))
