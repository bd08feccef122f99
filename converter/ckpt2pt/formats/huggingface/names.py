"""The one table of names in Hugging Face's classes: a row for each tensor, and how its elements lie in Megatron core's.  Pure.

Names: transformers 4.57.6 and 5.24.0, src/transformers/models/*/modeling_*.py; both read and write one tensor for each expert
under these (5 joins them in memory alone).  Layouts: Megatron-LM core_v0.19.0, megatron/core/transformer/attention.py
(``linear_qkv``: the queries of a group, its key, its value), mlp.py (gate, up).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from ckpt2pt.core.params import expert_of, split_layer, without_expert

Form = Literal["whole", "transposed", "query", "key", "value", "attention", "channels", "gate", "up", "vocabulary"]
"""Which part of Megatron core's tensor it is.

``channels`` are those of a head, as queries and keys have them; ``attention`` are all queries, then all keys, then all values.
``transposed`` and ``attention`` have the axes of a matrix the other way round (``Conv1D`` of GPT-2); ``vocabulary`` is without
the padding.
"""


class Row(NamedTuple):
    """``name`` is Megatron core's without the layer and the number of the expert, for which ``*`` stands in ``own``."""

    name: str
    own: str
    form: Form = "whole"


class Family(NamedTuple):
    """A class of transformers: its ``layer`` rows stand behind ``prefix`` and the number of the layer."""

    model_type: str
    architecture: str
    prefix: str
    layer: tuple[Row, ...]
    outside: tuple[Row, ...]


def _linear(name: str, own: str, form: Form = "whole", *, bias: bool = True) -> tuple[Row, ...]:
    """The weight, and a bias where the class can have one."""
    leaves = ("weight", "bias") if bias else ("weight",)
    return tuple(Row(f"{name}.{leaf}", f"{own}.{leaf}", form) for leaf in leaves)


def _gated(
    name: str, own: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Row, ...]:
    return (
        *_linear(f"{name}.linear_fc1", f"{own}.{gate}", "gate"),
        *_linear(f"{name}.linear_fc1", f"{own}.{up}", "up"),
        *_linear(f"{name}.linear_fc2", f"{own}.{down}"),
    )


_NORMS = (
    Row("input_layernorm.weight", "input_layernorm.weight"),
    Row("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
)
_ATTENTION = (
    *_linear("self_attention.linear_qkv", "self_attn.q_proj", "query"),
    *_linear("self_attention.linear_qkv", "self_attn.k_proj", "key"),
    *_linear("self_attention.linear_qkv", "self_attn.v_proj", "value"),
    *_linear("self_attention.linear_proj", "self_attn.o_proj"),
)
_QK_NORMS = (
    Row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "channels"),
    Row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "channels"),
)
_LATENT = (
    *_linear("self_attention.linear_q_proj", "self_attn.q_proj", bias=False),
    *_linear("self_attention.linear_q_down_proj", "self_attn.q_a_proj", bias=False),
    *_linear("self_attention.q_layernorm", "self_attn.q_a_layernorm", bias=False),
    *_linear("self_attention.linear_q_up_proj", "self_attn.q_b_proj", bias=False),
    *_linear("self_attention.linear_kv_down_proj", "self_attn.kv_a_proj_with_mqa", bias=False),
    *_linear("self_attention.kv_layernorm", "self_attn.kv_a_layernorm", bias=False),
    *_linear("self_attention.linear_kv_up_proj", "self_attn.kv_b_proj", bias=False),
    *_linear("self_attention.linear_proj", "self_attn.o_proj", bias=False),
)
_MLP = _gated("mlp", "mlp")
_ROUTER = (Row("mlp.router.weight", "mlp.gate.weight"),)
_EXPERTS = _gated("mlp.experts.local_experts", "mlp.experts.*")
_OUTSIDE = (
    Row("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocabulary"),
    Row("decoder.final_layernorm.weight", "model.norm.weight"),
    Row("output_layer.weight", "lm_head.weight", "vocabulary"),
)


def _decoder(model_type: str, architecture: str, *rows: tuple[Row, ...]) -> Family:
    return Family(
        model_type, architecture, "model.layers.", (*_NORMS, *(row for group in rows for row in group)), _OUTSIDE
    )


LLAMA = _decoder("llama", "LlamaForCausalLM", _ATTENTION, _MLP)
QWEN2 = _decoder("qwen2", "Qwen2ForCausalLM", _ATTENTION, _MLP)
QWEN3 = _decoder("qwen3", "Qwen3ForCausalLM", _ATTENTION, _QK_NORMS, _MLP)
QWEN3_MOE = _decoder("qwen3_moe", "Qwen3MoeForCausalLM", _ATTENTION, _QK_NORMS, _MLP, _ROUTER, _EXPERTS)
QWEN2_MOE = _decoder(
    "qwen2_moe", "Qwen2MoeForCausalLM", _ATTENTION, _MLP, _ROUTER, _EXPERTS,
    _gated("mlp.shared_experts", "mlp.shared_expert"),
    (Row("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight"),),
)  # fmt: skip
MIXTRAL = _decoder(
    "mixtral", "MixtralForCausalLM", _ATTENTION,
    (Row("mlp.router.weight", "block_sparse_moe.gate.weight"),),
    _gated("mlp.experts.local_experts", "block_sparse_moe.experts.*", "w1", "w3", "w2"),
)  # fmt: skip
DEEPSEEK_V3 = _decoder(
    "deepseek_v3", "DeepseekV3ForCausalLM", _LATENT, _MLP, _ROUTER,
    (Row("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias"),),
    _EXPERTS, _gated("mlp.shared_experts", "mlp.shared_experts"),
)  # fmt: skip
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "transformer.h.",
    (
        *_linear("input_layernorm", "ln_1"),
        *_linear("self_attention.linear_qkv", "attn.c_attn", "attention"),
        *_linear("self_attention.linear_proj", "attn.c_proj", "transposed"),
        *_linear("pre_mlp_layernorm", "ln_2"),
        *_linear("mlp.linear_fc1", "mlp.c_fc", "transposed"),
        *_linear("mlp.linear_fc2", "mlp.c_proj", "transposed"),
    ),
    (
        Row("embedding.word_embeddings.weight", "transformer.wte.weight", "vocabulary"),
        Row("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        *_linear("decoder.final_layernorm", "transformer.ln_f"),
        Row("output_layer.weight", "lm_head.weight", "vocabulary"),
    ),
)
FAMILIES: Mapping[str, Family] = {
    family.model_type: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE, QWEN2_MOE, MIXTRAL, DEEPSEEK_V3, GPT2)
}
"""By ``model_type`` of config.json."""


def rows_of(family: Family, name: str) -> Iterator[Row]:
    """The rows of a canonical name of Megatron core, with whole names in the place of the class's own; none where it has no such tensor."""
    layer, inner = split_layer(name)
    plain, number = without_expert(inner), expert_of(name)
    for row in family.outside if layer is None else family.layer:
        if row.name == plain:
            own = row.own if layer is None else f"{family.prefix}{layer}.{row.own}"
            yield Row(name, own if number is None else own.replace("*", str(number)), row.form)
