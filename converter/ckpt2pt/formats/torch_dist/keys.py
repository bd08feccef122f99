"""What a distributed checkpoint calls a parameter, and where in the tensor of that name a layer lies.  Pure.

    decoder.layers.3.self_attention.linear_qkv.weight  ->  decoder.layers.self_attention.linear_qkv.weight  [3] of 4 layers
    and where layers differ from each other:               decoder.layers.3.self_attention.linear_qkv.weight

Megatron-LM core_v0.15.0 to core_v0.19.0: megatron/core/transformer/transformer_block.py (``sharded_state_dict``: one tensor
for all layers where they are alike), transformer_layer.py (``sharded_state_dict_keys_map``: a norm is named after the linear
module behind it), mlp.py (``apply_swiglu_sharded_factory``: gate and up are halves), optimizer/distrib_optimizer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ckpt2pt.core.extents import Shape
from ckpt2pt.core.index import Index, layer_numbers
from ckpt2pt.core.params import split_layer
from ckpt2pt.core.slots import check_dense
from ckpt2pt.core.tensor import Role
from ckpt2pt.errors import MissingInputError

PREFIXES: Mapping[Role, str] = {
    "param": "",
    "main_param": "optimizer.state.param.",
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}
"""What comes before the name of a parameter."""

_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
_STATES = (
    "input_layernorm",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer for which some release or layer specification asks for an ``_extra_state``; surplus ones are ignored."""


class Layers(NamedTuple):
    """``numbers`` are those of the source, and which layer of the result each is; ``alike``: one tensor holds all of them."""

    numbers: Mapping[int, int]
    alike: bool

    def stage(self, pp: int, stages: int) -> range:
        """The layers of the result that one of ``stages`` workers writes: consecutive ones, about as many as the others."""
        count = len(self.numbers)
        return range(pp * count // stages, (pp + 1) * count // stages)


class Key(NamedTuple):
    """The name, and the index of the layer with the number of layers, which are the first axis where all are one tensor."""

    name: str
    lead: Shape = ()
    of: Shape = ()


def layers_of(index: Index, where: str) -> Layers:
    """The layers of a model; no-op layers, which have no parameters, are not counted.

    Raises :class:`MissingInputError` without any layer, and :class:`FormatError` for layers with experts.
    """
    check_dense(index, where)
    numbers = layer_numbers(index)
    if not numbers:
        raise MissingInputError("the source holds no layer", where=where, hint="copy the folders of all ranks")
    held: dict[int | None, dict[str, Shape]] = {number: {} for number in numbers}
    for key, tensor in index.items():
        layer, inner = split_layer(key.name)
        held.setdefault(layer, {})[inner] = tensor.fused
    first = held[min(numbers)]
    return Layers(numbers, all(held[number] == first for number in numbers))


def key_of(name: str, layers: Layers) -> Key:
    """The key of a parameter by its canonical name, without that of a role."""
    layer, inner = split_layer(name)
    if layer is None:
        return Key(name)
    for norm, module in _NORMS:
        if inner.startswith(norm):
            inner = module + inner.removeprefix(norm)
    number = layers.numbers[layer]
    if layers.alike:
        return Key(f"decoder.layers.{inner}", (number,), (len(layers.numbers),))
    return Key(f"decoder.layers.{number}.{inner}")


def extra_states(layers: Layers, numbers: Iterable[int], *, last: bool) -> Iterator[str]:
    """The objects of the given layers of the result, and with the ``last`` ones that of the norm behind them."""
    for number in numbers:
        for module in _STATES:
            if layers.alike:
                yield f"decoder.layers.{module}._extra_state/shard_{number}_{len(layers.numbers)}"
            else:
                yield f"decoder.layers.{number}.{module}._extra_state/shard_0_1"
    if last:
        yield "decoder.final_layernorm._extra_state/shard_0_1"
