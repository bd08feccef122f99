"""The class that computes a model, by its arguments and parameters; what none computes is named."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt2pt.core.state import State
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.huggingface.families import model_of

LAYER = "decoder.layers.0."
COMMON = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")
ATTENTION = ("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight")
MLP = ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
EXPERTS = (
    "mlp.router.weight", "mlp.experts.local_experts.0.linear_fc1.weight", "mlp.experts.local_experts.0.linear_fc2.weight"
)  # fmt: skip
SHARED = ("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight")
QK = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
LATENT = ("self_attention.linear_kv_down_proj.weight", "self_attention.linear_kv_up_proj.weight")
GPT2_BIASES = tuple(
    f"{name}.bias"
    for name in ("input_layernorm", "pre_mlp_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
)  # fmt: skip
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_topk": 2}


def found(*inner: str, outside: tuple[str, ...] = COMMON, experts: int = 0, **args: Any) -> str:
    names = dict.fromkeys((*outside, *(LAYER + name for name in inner)))
    state = State(where="args", iteration=1, samples=None, step=1, args=args)
    return model_of(state, names, layers=1, experts=experts).family.architecture


CLASSES = [
    ("LlamaForCausalLM", (*ATTENTION, *MLP), {}),
    ("Qwen2ForCausalLM", (*ATTENTION, "self_attention.linear_qkv.bias", *MLP), {}),
    ("Qwen3ForCausalLM", (*ATTENTION, *QK, *MLP), {}),
    ("MixtralForCausalLM", (*ATTENTION, *EXPERTS), {"experts": 4, "moe_router_topk": 2}),
    ("Qwen3MoeForCausalLM", (*ATTENTION, *QK, *EXPERTS), {"experts": 4, "moe_router_topk": 2}),
    ("Qwen2MoeForCausalLM", (*ATTENTION, *EXPERTS, *SHARED, "mlp.shared_experts.gate_weight"), {"experts": 4}),
    ("DeepseekV3ForCausalLM", (*LATENT, *EXPERTS, *SHARED, "mlp.router.expert_bias"), {"experts": 4, **SIGMOID}),
]


@pytest.mark.parametrize(("wanted", "inner", "args"), CLASSES, ids=[name for name, *_ in CLASSES])
def test_the_class_is_the_one_that_computes_it(wanted: str, inner: tuple[str, ...], args: dict[str, Any]) -> None:
    assert found(*inner, **args) == wanted


def test_learned_positions_are_gpt2() -> None:
    outside = (*COMMON, "embedding.position_embeddings.weight")
    assert found(*ATTENTION, *MLP, *GPT2_BIASES, outside=outside) == "GPT2LMHeadModel"
    with pytest.raises(FormatError, match="has no bias, which GPT2LMHeadModel"):
        found(*ATTENTION, *MLP, outside=outside)


@pytest.mark.parametrize(
    ("inner", "args", "message"),
    [
        ((*ATTENTION, *MLP), {"normalization": "LayerNorm"}, "normalization is LayerNorm"),
        ((*ATTENTION, *MLP), {"swiglu": False}, "swiglu is False"),
        ((*ATTENTION, *MLP), {"rotary_percent": 0.5}, "rotary_percent is 0.5"),
        ((*ATTENTION, *MLP), {"untie_embeddings_and_output_weights": False}, "has an output_layer.weight"),
        ((*ATTENTION, *MLP, "mlp.linear_fc1.bias"), {}, "alone have a bias"),
        ((*ATTENTION, *EXPERTS), {"experts": 4, "moe_router_score_function": "sigmoid"}, "score_function is sigmoid"),
        ((*ATTENTION, *EXPERTS, *SHARED), {"experts": 4}, "the shared expert has no gate"),
        ((*LATENT, *EXPERTS, *SHARED), {"experts": 4, **SIGMOID}, "enable_expert_bias is False"),
        ((*ATTENTION, *EXPERTS), {"experts": 4, "moe_router_topk": 2, "moe_router_pre_softmax": True}, "pre_softmax is True"),
    ],
)  # fmt: skip
def test_what_no_class_computes_is_named(inner: tuple[str, ...], args: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        found(*inner, **args)
