"""The parameters of a model chunk as Megatron-LM 0.7 to 0.19 registers them: names and order.  Pure.

The order is that of the state dict and, reversed, of the optimizer's buffer; the file of the optimizer holds no names.
Megatron core: megatron/core/transformer/attention.py (``Attention.__init__`` registers ``linear_proj`` before
``SelfAttention.__init__`` adds ``linear_qkv`` and the norms of q and k), transformer_layer.py, models/gpt/gpt_model.py; with
Transformer Engine norms are fused into the linear layer behind them (models/gpt/gpt_layer_specs.py).  Legacy models:
megatron/legacy/model (up to core_v0.17.0), in the order of 0.6.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ckpt2pt.core.names import TIED_HEAD
from ckpt2pt.core.params import EMBEDDING, HEAD, LAYER_MODULES, legacy_name
from ckpt2pt.core.topology import Topology

_LOCAL = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_FUSED = ("self_attention.linear_proj", "input_layernorm", *_LOCAL[2:])
_LEGACY = (
    "input_layernorm",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_LEAVES = ("weight", "bias")
_SPELLED = {row.name: row.fused or f"{row.name}." for row in LAYER_MODULES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How the Megatron run to come builds its model; ``release`` is (0, 19) of 0.19."""

    release: tuple[int, int] = (0, 19)
    names: Literal["mcore", "legacy"] = "mcore"
    transformer_engine: bool = False

    @property
    def needs(self) -> str:
        """What a run needs to build the same model."""
        if self.names == "legacy":
            return "legacy models (releases up to 0.17)"
        return "the layer spec of Transformer Engine" if self.transformer_engine else "the local layer spec"


class Registered(NamedTuple):
    """A parameter: its canonical name, with the global number of its layer, and what the chunk calls it."""

    name: str
    spelled: str
    shared: bool = False
    """Whether it is an embedding that the first and the last stage both hold."""


def chunk_parameters(
    names: Collection[str], layout: Topology, *, pp: int, vpp: int, tied: bool, style: Style
) -> Iterator[Registered]:
    """The parameters of a chunk in order of registration; ``names`` are those of the whole model."""
    ends = layout.holds_embedding(pp, vpp), layout.holds_head(pp, vpp)
    return registered(
        names, layout.real_slots(pp, vpp), ends, tied=tied, shared=tied and layout.pipeline > 1, style=style
    )


def registered(
    names: Collection[str], slots: Mapping[int, int], ends: tuple[bool, bool], *, tied: bool, shared: bool, style: Style
) -> Iterator[Registered]:
    """The same of a chunk with the layers ``slots`` (local -> global number); ``ends``: whether it has embeddings, and the head.

    ``shared``: the first and the last stage both hold the embedding, as they are tied.
    """
    if ends[0]:
        yield from _outside(("embedding.word_embeddings", "embedding.position_embeddings"), names, style, shared=shared)
    for local, layer in slots.items():
        yield from _layer(names, local, layer, style)
    if ends[1]:
        yield from _outside(("decoder.final_layernorm", *(() if tied else ("output_layer",))), names, style)
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


def _layer(names: Collection[str], local: int, layer: int, style: Style) -> Iterator[Registered]:
    legacy = style.names == "legacy"
    fused = style.transformer_engine and not legacy
    for module in _LEGACY if legacy else _FUSED if fused else _LOCAL:
        for leaf in _LEAVES:
            name, here = f"decoder.layers.{layer}.{module}.{leaf}", f"decoder.layers.{local}.{module}.{leaf}"
            if name not in names:
                continue
            if legacy:
                here = legacy_name(here)
            elif fused:
                here = f"decoder.layers.{local}.{_SPELLED[module]}{leaf}"
            yield Registered(name, here)
