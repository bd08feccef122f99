"""The parameters of a model chunk as Megatron-LM 0.7 to 0.19 registers them: names and order.  Pure.

The order is that of the state dict and, reversed, of the optimizer's buffer; the file of the optimizer holds no names.
Megatron core: megatron/core/transformer/attention.py (``Attention.__init__`` registers ``linear_proj`` before
``SelfAttention.__init__`` adds ``linear_qkv`` and the norms of q and k), transformer_layer.py, models/gpt/gpt_model.py; with
Transformer Engine norms are fused into the linear layer behind them, but for one before experts (models/gpt/gpt_layer_specs.py).
Experts: moe/moe_layer.py (router, experts, shared experts), moe/experts.py (``SequentialMLP`` has one module for each,
``TEGroupedMLP`` numbers the weights of two), moe/shared_experts.py.  A module's own parameters come before those of modules
inside it.  Legacy models: megatron/legacy/model (up to core_v0.17.0), in the order of 0.6.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from ckpt2pt.core.names import TIED_HEAD
from ckpt2pt.core.params import EMBEDDING, HEAD, LAYER_MODULES, legacy_name
from ckpt2pt.core.topology import Topology

_EXPERTS = "mlp.experts.local_experts"
_LATENT = tuple(f"self_attention.linear_{name}_proj" for name in ("q", "q_down", "q_up", "kv_down", "kv_up"))
_LOCAL = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    *_LATENT,
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "self_attention.kv_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.router",
    _EXPERTS,
    "mlp.shared_experts",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
)
_FUSED = ("self_attention.linear_proj", "input_layernorm", *_LOCAL[2:])
_NORMED = {
    "self_attention.linear_q_up_proj": "self_attention.q_layernorm",
    "self_attention.linear_kv_up_proj": "self_attention.kv_layernorm",
}
_FUSED_LATENT = tuple(
    one
    for module in _LOCAL
    if module not in _NORMED.values()
    for one in ((_NORMED[module], module) if module in _NORMED else (module,))
)
"""With latent attention, whose input has a norm of its own: norms of the low ranks are fused with the projections behind them."""
_LEGACY = (
    "input_layernorm",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_OF_EXPERTS = ("linear_fc1", "linear_fc2")
_LEAVES = ("weight", "bias")
_OWN_LEAVES = {"mlp.router": (*_LEAVES, "expert_bias"), "mlp.shared_experts": ("gate_weight",)}
_SPELLED = {row.name: row.fused or f"{row.name}." for row in LAYER_MODULES}
_SPELLED_LATENT = {
    **_SPELLED,
    "input_layernorm": "input_layernorm.",
    "self_attention.q_layernorm": "self_attention.linear_q_up_proj.layer_norm_",
}
_AROUND = ("enorm", "hnorm", "eh_proj")
_MODEL_LAYER = (0, 18)
"""The release from which on the transformer layer of one that predicts is called ``mtp_model_layer``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How the Megatron run to come builds its model; ``release`` is (0, 19) of 0.19.

    ``grouped`` says that a rank's experts are one module of Transformer Engine (``moe_grouped_gemm``).
    """

    release: tuple[int, int] = (0, 19)
    names: Literal["mcore", "legacy"] = "mcore"
    transformer_engine: bool = False
    grouped: bool = False

    @property
    def needs(self) -> str:
        """What a run needs to build the same model."""
        if self.names == "legacy":
            return "legacy models (releases up to 0.17)"
        spec = "the layer spec of Transformer Engine" if self.transformer_engine else "the local layer spec"
        return f"{spec} and moe_grouped_gemm" if self.grouped else spec


class Registered(NamedTuple):
    """A parameter: its canonical name, with the global number of its layer, and what the chunk calls it."""

    name: str
    spelled: str
    shared: bool = False
    """Whether it is an embedding that the first and the last stage both hold."""


def chunk_parameters(
    names: Collection[str], layout: Topology, *, pp: int, vpp: int, tied: bool, style: Style, experts: range = range(0)
) -> Iterator[Registered]:
    """The parameters of a chunk in order of registration, and buffers among them.

    ``names`` are those of the whole model, ``experts`` the global numbers of the rank's experts.
    """
    ends = layout.holds_embedding(pp, vpp), layout.holds_head(pp, vpp)
    shared = tied and layout.pipeline > 1
    return registered(names, layout.real_slots(pp, vpp), ends, tied=tied, shared=shared, style=style, experts=experts)


def registered(
    names: Collection[str],
    slots: Mapping[int, int],
    ends: tuple[bool, bool],
    *,
    tied: bool,
    shared: bool,
    style: Style,
    experts: range = range(0),
) -> Iterator[Registered]:
    """The same of a chunk with the layers ``slots`` (local -> global number); ``ends``: whether it has embeddings, and the head.

    ``shared``: the first and the last stage both hold the embedding, as they are tied.
    """
    if ends[0]:
        yield from _outside(("embedding.word_embeddings", "embedding.position_embeddings"), names, style, shared=shared)
    for local, layer in slots.items():
        yield from _layer(names, f"decoder.layers.{layer}.", f"decoder.layers.{local}.", style, experts)
    if ends[1]:
        yield from _outside(("decoder.final_layernorm",), names, style)
        yield from _predictions(names, style, experts)
        yield from _outside(() if tied else ("output_layer",), names, style)
        if shared:
            yield Registered(EMBEDDING, TIED_HEAD if style.names == "legacy" else HEAD, shared=True)


def _outside(
    modules: Collection[str], names: Collection[str], style: Style, *, shared: bool = False
) -> Iterator[Registered]:
    for module in modules:
        for leaf in _LEAVES:
            name = f"{module}.{leaf}"
            if name in names:
                spelled = legacy_name(name) if style.names == "legacy" else name
                yield Registered(name, spelled, shared and name == EMBEDDING)


def _predictions(names: Collection[str], style: Style, experts: range) -> Iterator[Registered]:
    """The layers that predict further tokens (core/transformer/multi_token_prediction.py), all of them on the last stage."""
    layer = 0
    while f"mtp.layers.{layer}.enorm.weight" in names:
        prefix = f"mtp.layers.{layer}."
        yield from _outside([prefix + module for module in _AROUND], names, style)
        inner = "mtp_model_layer." if style.release >= _MODEL_LAYER else "transformer_layer."
        yield from _layer(names, f"{prefix}transformer_layer.", prefix + inner, style, experts)
        yield from _outside([f"{prefix}final_layernorm"], names, style)
        layer += 1


def _layer(names: Collection[str], theirs: str, ours: str, style: Style, experts: range) -> Iterator[Registered]:
    """A layer, by what stands before its canonical names, and before those of the chunk."""
    legacy = style.names == "legacy"
    fused = style.transformer_engine and not legacy
    latent = f"{theirs}self_attention.linear_kv_up_proj.weight" in names
    spelling = _SPELLED_LATENT if latent else _SPELLED
    has_experts = f"{theirs}mlp.router.weight" in names
    for module in _LEGACY if legacy else (_FUSED_LATENT if latent else _FUSED) if fused else _LOCAL:
        if module == _EXPERTS:
            if has_experts:
                spelled = _grouped(experts) if style.grouped else _sequential(experts)
                yield from (Registered(theirs + inner, ours + own) for inner, own in spelled if theirs + inner in names)
            continue
        for leaf in _OWN_LEAVES.get(module, _LEAVES):
            name, here = f"{theirs}{module}.{leaf}", f"{ours}{module}.{leaf}"
            if name not in names:
                continue
            if legacy:
                here = legacy_name(here)
            elif fused and not (has_experts and module == "pre_mlp_layernorm"):
                here = f"{ours}{spelling[module]}{leaf}"
            yield Registered(name, here)


def _sequential(experts: range) -> Iterator[tuple[str, str]]:
    """What a layer calls the parameters of its experts, all of them and those of a rank."""
    for own, number in enumerate(experts):
        for module, leaf in product(_OF_EXPERTS, _LEAVES):
            yield f"{_EXPERTS}.{number}.{module}.{leaf}", f"{_EXPERTS}.{own}.{module}.{leaf}"


def _grouped(experts: range) -> Iterator[tuple[str, str]]:
    for module in _OF_EXPERTS:
        for (own, number), leaf in product(enumerate(experts), _LEAVES):
            yield f"{_EXPERTS}.{number}.{module}.{leaf}", f"mlp.experts.{module}.{leaf}{own}"
