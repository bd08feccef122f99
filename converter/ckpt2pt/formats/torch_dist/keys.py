"""What a distributed checkpoint calls a parameter, and where in the tensor of that name a layer lies.  Pure.

    decoder.layers.3.self_attention.linear_qkv.weight  ->  decoder.layers.self_attention.linear_qkv.weight  [3] of 4 layers
    and where layers differ from each other:               decoder.layers.3.self_attention.linear_qkv.weight
    decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight
                                                       ->  decoder.layers.mlp.experts.experts.linear_fc1.weight  [3, 5]

Megatron-LM core_v0.15.0 to core_v0.19.0: megatron/core/transformer/transformer_block.py (``sharded_state_dict``: one tensor
for all layers where they are alike), transformer_layer.py (``sharded_state_dict_keys_map``: a norm is named after the linear
module behind it), mlp.py (``apply_swiglu_sharded_factory``: gate and up are halves), moe/experts.py (all experts are one
tensor, whatever their modules), optimizer/distrib_optimizer.py.  The norm before experts is named after a linear module that
is not there with the local layer specification, and by its own name with that of Transformer Engine: it is written under both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import NamedTuple

from ckpt2pt.core.extents import Shape
from ckpt2pt.core.index import Index, layer_numbers
from ckpt2pt.core.params import expert_count, expert_of, has_experts, prediction_of, split_layer, without_expert
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
_LATENT_NORMS = (
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
"""Those of a layer with latent attention go by either name, that of their own or of the module they are fused with, as the run has it."""
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
"""Modules of a layer for which some release or layer specification asks for an ``_extra_state``; extra ones are ignored."""


_LATENT_STATES = tuple(f"self_attention.linear_{name}_proj" for name in ("q", "q_down", "q_up", "kv_down", "kv_up"))
_SHARED_STATES = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
_AROUND = ("enorm", "hnorm", "eh_proj", "final_layernorm")
_EXPERT_STATES = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
"""The same for a layer with experts, and for each of them."""


class Layers(NamedTuple):
    """``numbers`` are those of the source, and which layer of the result each is; ``alike``: one tensor holds all of them.

    ``with_experts`` are the layers of the result that have ``experts`` in place of one MLP.
    """

    numbers: Mapping[int, int]
    alike: bool
    with_experts: frozenset[int] = frozenset()
    experts: int = 0
    latent: bool = False
    predictions: tuple[str, ...] = ()
    """What stands before the names of transformer layers that predict further tokens."""

    def stage(self, pp: int, stages: int) -> range:
        """The layers of the result that one of ``stages`` workers writes: consecutive ones, about as many as the others."""
        count = len(self.numbers)
        return range(pp * count // stages, (pp + 1) * count // stages)


class Key(NamedTuple):
    """The name, and the place among layers and among experts with their numbers, which are axes where all are one tensor."""

    name: str
    lead: Shape = ()
    of: Shape = ()


def layers_of(index: Index, where: str, frequency: object = None) -> Layers:
    """The layers of a model; no-op layers, which have no parameters, are not counted.

    ``frequency`` is Megatron's ``moe_layer_freq``: a list of it, or more than 1, makes Megatron-LM look for a tensor of each layer also
    where all are alike (transformer_block.py).  Raises :class:`MissingInputError` without any layer.
    """
    numbers = layer_numbers(index)
    if not numbers:
        raise MissingInputError("the source holds no layer", where=where, hint="copy the folders of all ranks")
    held: dict[int | None, dict[str, Shape]] = {number: {} for number in numbers}
    for key, tensor in index.items():
        layer, inner = split_layer(key.name)
        held.setdefault(layer, {})[inner] = tensor.fused
    first = held[min(numbers)]
    listed = isinstance(frequency, list | tuple) or (isinstance(frequency, int) and frequency > 1)
    return Layers(
        numbers,
        not listed and all(held[number] == first for number in numbers),
        frozenset(numbers[layer] for layer in numbers if any(map(has_experts, held[layer]))),
        expert_count(key.name for key in index),
        any(key.name.endswith(".self_attention.linear_kv_up_proj.weight") for key in index),
        tuple(dict.fromkeys(found[0] for key in index if (found := prediction_of(key.name)))),
    )


def keys_of(name: str, layers: Layers) -> tuple[Key, ...]:
    """The keys of a parameter by its canonical name, without that of a role; more than one for a norm that goes by two names."""
    layer, inner = split_layer(name)
    predicted, expert = prediction_of(name), expert_of(name)
    lead: Shape = ()
    of: Shape = ()
    if predicted:
        prefix, inner = predicted
        own_norm = True  # by both names: a dense layer asks for one, a layer with experts for the other
    elif layer is None:
        return (Key(name),)
    else:
        number = layers.numbers[layer]
        own_norm = number in layers.with_experts
        lead, of = ((number,), (len(layers.numbers),)) if layers.alike else ((), ())
        prefix = "decoder.layers." if layers.alike else f"decoder.layers.{number}."
    if expert is not None:
        inner = without_expert(inner).replace(".local_experts.", ".experts.", 1)
        return (Key(prefix + inner, (*lead, expert), (*of, layers.experts)),)
    names = [inner]
    for norm, module in _LATENT_NORMS if layers.latent else _NORMS:
        if inner.startswith(norm):
            by_module = module + inner.removeprefix(norm)
            own = layers.latent or (own_norm and norm.startswith("pre_mlp_"))
            names = [by_module, inner] if own else [by_module]
    return tuple(Key(prefix + one, lead, of) for one in names)


def extra_states(layers: Layers, numbers: Iterable[int], *, last: bool) -> Iterator[str]:
    """The objects of the given layers of the result, and with the ``last`` ones that of the norm behind them and of what predicts."""
    for number in numbers:
        expert = number in layers.with_experts
        if not layers.alike:
            yield from _of_layer(f"decoder.layers.{number}.", layers, expert=expert)
            continue
        for module in _states(layers, expert=expert):
            yield f"decoder.layers.{module}._extra_state/shard_{number}_{len(layers.numbers)}"
        for module, one in product(_EXPERT_STATES, range(layers.experts) if expert else ()):
            yield f"decoder.layers.{module}._extra_state/shard_{number}.{one}_{len(layers.numbers)}.{layers.experts}"
    if last:
        yield "decoder.final_layernorm._extra_state/shard_0_1"
        for prefix in layers.predictions:
            around = prefix.removesuffix("transformer_layer.")
            yield from (f"{around}{module}._extra_state/shard_0_1" for module in _AROUND)
            yield from _of_layer(prefix, layers, expert=bool(layers.experts))


def _states(layers: Layers, *, expert: bool) -> tuple[str, ...]:
    return (*_STATES, *(_LATENT_STATES if layers.latent else ()), *(_SHARED_STATES if expert else ()))


def _of_layer(prefix: str, layers: Layers, *, expert: bool) -> Iterator[str]:
    for module in _states(layers, expert=expert):
        yield f"{prefix}{module}._extra_state/shard_0_1"
    for module, one in product(_EXPERT_STATES, range(layers.experts) if expert else ()):
        yield f"{prefix}{module}._extra_state/shard_{one}_{layers.experts}"
