"""config.json: what transformers has to know of a model, from the arguments of its training.  Pure.

The spelling is the one that transformers 4 and 5 both read: ``rope_theta`` and ``rope_scaling`` (4.57 ignores 5's
``rope_parameters``), ``torch_dtype`` (4.46 ignores ``dtype``).  Every field of every class was proved by equal logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckpt2pt.errors import FormatError, MissingInputError, ref
from ckpt2pt.formats.huggingface.families import Model
from ckpt2pt.formats.huggingface.names import (
    DEEPSEEK_V3,
    GPT2,
    LLAMA,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
)
from ckpt2pt.formats.huggingface.views import Heads

MLA_ORIGINAL = 4096
"""``original_max_position_embeddings`` of MLA's yarn in releases with ``rope_type``: no argument reaches it
(core_v0.19.0, megatron/core/transformer/transformer_config.py, ``MLATransformerConfig``)."""
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""megatron/core/models/common/embeddings/rotary_pos_embedding.py, ``_apply_scaling``."""
LLAMA3_FACTOR = 8.0
"""pretrain_gpt.py of 0.12 to 0.19 passes ``--rope-scaling-factor`` on to no model, so that it is always this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What arguments do not say, or not truly: the number of tokens (None: as many as rows), the factor of llama3's scaling."""

    vocabulary: int | None = None
    rope_scaling_factor: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """``fields`` are those of config.json, ``remarks`` what nobody said, or what a user should know."""

    fields: Mapping[str, object]
    heads: Heads
    vocabulary: int
    remarks: tuple[str, ...]


def config_of(model: Model, rows: int, dtype: str, choices: Choices) -> Config:
    """The configuration of a model whose embedding has ``rows`` rows.

    Raises :class:`MissingInputError` for what neither arguments nor ``choices`` say, and :class:`FormatError` for sizes that
    no class takes.
    """
    remarks: list[str] = []
    tokens = rows if choices.vocabulary is None else choices.vocabulary
    if choices.vocabulary is None and model.state.args.get("tokenizer_type") is not None:
        remarks.append(
            f"nothing states how many tokens the tokenizer has: vocab_size is {rows}, with the rows that may be padding "
            f"({ref('target.huggingface.vocabSize')} cuts them)"
        )
    if not 1 <= tokens <= rows:
        raise FormatError(
            f"{ref('target.huggingface.vocabSize')} is {tokens}, and the embedding has {rows} rows",
            where=model.state.where,
            hint=f"give 1 to {rows}",
            field="target.huggingface.vocabSize",
        )
    fields = _gpt2(model) if model.family is GPT2 else _decoder(model, choices, remarks)
    shared: dict[str, object] = {
        "architectures": [model.family.architecture],
        "model_type": model.family.model_type,
        "vocab_size": tokens,
        "tie_word_embeddings": model.tied,
        "torch_dtype": dtype,
        "initializer_range": _number(model, "init_method_std", 0.02),
        # Left out, Llama and Mixtral take 1 and 2 for them, DeepSeek 0 and 1, and GPT-2 50256.
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": True,
    }
    return Config(fields={**shared, **fields}, heads=_heads(model), vocabulary=tokens, remarks=tuple(remarks))


def _heads(model: Model) -> Heads:
    args, heads = model.state.args, model.state.number("num_attention_heads")
    groups = model.state.number("num_query_groups") if args.get("group_query_attention") is True else heads
    if heads % groups:
        raise FormatError(
            f"num_attention_heads is {heads} and num_query_groups {groups}",
            where=model.state.where,
            hint="give the arguments of this model",
        )
    return Heads(
        groups=groups,
        queries=heads // groups,
        channels=_channels(model),
        interleaved=args.get("rotary_interleaved") is True and model.family is not DEEPSEEK_V3,
    )


def _channels(model: Model) -> int:
    own = model.state.args.get("kv_channels")
    if type(own) is int and own > 0:
        return own
    return model.state.number("hidden_size") // model.state.number("num_attention_heads")


def _decoder(model: Model, choices: Choices, remarks: list[str]) -> dict[str, object]:
    number = model.state.number
    heads, hidden = number("num_attention_heads"), number("hidden_size")
    fields: dict[str, object] = {
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": number("ffn_hidden_size"),
        "num_hidden_layers": model.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _heads(model).groups,
        "max_position_embeddings": number("max_position_embeddings"),
        "rms_norm_eps": _epsilon(model),
        "attention_dropout": _number(model, "attention_dropout", 0.0),
        "rope_theta": _base(model, remarks),
    }
    if model.family is DEEPSEEK_V3:
        return {**fields, **_latent(model, remarks), **_deepseek_experts(model), **_yarn(model)}
    fields["head_dim"] = _channels(model)
    if model.family is LLAMA and hidden % heads:
        remarks.append(f"hidden_size {hidden} is no multiple of {heads} heads: transformers 5 refuses such a Llama")
    bias = "self_attention.linear_qkv" in model.biases
    if model.family in {LLAMA, QWEN3, QWEN3_MOE}:
        fields["attention_bias"] = bias or "self_attention.linear_proj" in model.biases
    if model.family is LLAMA:
        fields["mlp_bias"] = "mlp.linear_fc1" in model.biases
    if model.family in {QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE}:
        fields["use_sliding_window"] = False
    if model.family is MIXTRAL:
        fields["sliding_window"] = None
    if model.experts:
        fields |= _experts(model)
    scaling = _scaling(model, choices)
    return {**fields, **({"rope_scaling": scaling} if scaling else {})}


def _experts(model: Model) -> dict[str, object]:
    args = model.state.args
    ffn = _expert_ffn(model)
    found: dict[str, object] = {
        "num_experts_per_tok": model.state.number("moe_router_topk"),
        "router_aux_loss_coef": _aux_loss(model),
    }
    if model.family is MIXTRAL:
        return {**found, "intermediate_size": ffn, "num_local_experts": model.experts}
    found |= {
        "num_experts": model.experts,
        "moe_intermediate_size": ffn,
        # Softmax before top-k is not normalised again; after it, it is that of the chosen ones (moe_utils.py, topk_softmax...).
        "norm_topk_prob": args.get("moe_router_pre_softmax") is not True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(model.dense),
    }
    if model.family is QWEN2_MOE:
        found["shared_expert_intermediate_size"] = model.state.number("moe_shared_expert_intermediate_size")
    return found


def _expert_ffn(model: Model) -> int:
    own = model.state.args.get("moe_ffn_hidden_size")
    return own if type(own) is int and own > 0 else model.state.number("ffn_hidden_size")


def _aux_loss(model: Model) -> float:
    """A list of several losses has a coefficient each since 0.15; it decides nothing of what is computed."""
    value = model.state.args.get("moe_aux_loss_coeff")
    return float(value) if isinstance(value, int | float) else 0.0


def _deepseek_experts(model: Model) -> dict[str, object]:
    args, ffn = model.state.args, _expert_ffn(model)
    shared = model.state.number("moe_shared_expert_intermediate_size")
    if shared % ffn:
        raise FormatError(
            f"moe_shared_expert_intermediate_size is {shared}, and moe_ffn_hidden_size {ffn}",
            where=model.state.where,
            hint="DeepseekV3ForCausalLM counts shared experts of the size of the others: choose another format",
        )
    factor = args.get("moe_router_topk_scaling_factor")
    return {
        "n_routed_experts": model.experts,
        "num_experts_per_tok": model.state.number("moe_router_topk"),
        "moe_intermediate_size": ffn,
        "n_shared_experts": shared // ffn,
        "first_k_dense_replace": len(model.dense),
        "moe_layer_freq": 1,
        "n_group": args.get("moe_router_num_groups") or 1,
        "topk_group": args.get("moe_router_group_topk") or 1,
        "routed_scaling_factor": 1.0 if factor is None else factor,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
    }


def _latent(model: Model, remarks: list[str]) -> dict[str, object]:
    args, number = model.state.args, model.state.number
    # The norms of the latent vectors have 1e-6 in transformers, whatever rms_norm_eps says (modeling_deepseek_v3.py).
    if abs(_epsilon(model) - 1e-6) > 1e-9:
        remarks.append(
            f"the epsilon of norms is {_epsilon(model)}, and transformers has 1e-06 in those of latent vectors, whatever "
            "config.json says: logits differ in the fourth decimal"
        )
    query = args.get("q_lora_rank")
    return {
        "num_key_value_heads": number("num_attention_heads"),
        "q_lora_rank": query if type(query) is int and query > 0 else None,
        "kv_lora_rank": number("kv_lora_rank"),
        "qk_nope_head_dim": number("qk_head_dim"),
        "qk_rope_head_dim": number("qk_pos_emb_head_dim"),
        "v_head_dim": number("v_head_dim"),
        "head_dim": number("qk_pos_emb_head_dim"),
        "rope_interleave": True,
        "attention_bias": False,
    }


def _yarn(model: Model) -> dict[str, object]:
    """Positions of MLA: releases without ``rope_type`` always compute yarn, of which the factor 1 is plain rope.

    They take ``max_position_embeddings`` for the original length; those with it know no argument for that.
    """
    args = model.state.args
    factor = _number(model, "rotary_scaling_factor", 1.0)
    kind = args.get("rope_type", "yarn") or "yarn"
    if kind != "yarn" or factor == 1.0:
        return {}
    original = MLA_ORIGINAL if "rope_type" in args else model.state.number("max_position_embeddings")
    return {
        "rope_scaling": {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": factor,
            "mscale": _number(model, "mscale", 1.0),
            "mscale_all_dim": _number(model, "mscale_all_dim", 0.0),
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": original,
        }
    }


def _scaling(model: Model, choices: Choices) -> dict[str, object] | None:
    args = model.state.args
    factor = args.get("rotary_seq_len_interpolation_factor")
    llama3 = args.get("use_rope_scaling") is True
    if factor not in {None, 1} and llama3:
        raise FormatError(
            "use_rope_scaling and rotary_seq_len_interpolation_factor are both given",
            where=model.state.where,
            hint="no class of transformers computes both: choose another format",
        )
    if isinstance(factor, int | float) and factor != 1:
        return {"rope_type": "linear", "factor": float(factor)}
    if not llama3:
        return None
    stated = _number(model, "rope_scaling_factor", LLAMA3_FACTOR)
    if choices.rope_scaling_factor is None and stated != LLAMA3_FACTOR:
        raise MissingInputError(
            f"rope_scaling_factor is {stated}: pretrain_gpt.py trains with {LLAMA3_FACTOR} whatever it says, other programs do not",
            where=model.state.where,
            hint=f"say which one the training had: {ref('target.huggingface.ropeScalingFactor')} {LLAMA3_FACTOR} or {stated}",
            field="target.huggingface.ropeScalingFactor",
        )
    return {**LLAMA3, "factor": choices.rope_scaling_factor or stated}


def _gpt2(model: Model) -> dict[str, object]:
    args, number = model.state.args, model.state.number
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    if _channels(model) * heads != hidden:
        raise FormatError(
            f"kv_channels is {_channels(model)}, and GPT2LMHeadModel has hidden_size {hidden} / {heads} heads",
            where=model.state.where,
            hint="no class computes this model: choose another format",
        )
    # The fused kernel computes the tanh approximation (megatron/core/fusions/fused_bias_gelu.py), torch's own gelu is exact.
    fused = args.get("bias_gelu_fusion") is True
    return {
        "activation_function": "gelu_pytorch_tanh" if fused else "gelu",
        "n_embd": hidden,
        "n_inner": number("ffn_hidden_size"),
        "n_layer": model.layers,
        "n_head": heads,
        "n_positions": number("max_position_embeddings"),
        "layer_norm_epsilon": _epsilon(model),
        "attn_pdrop": _number(model, "attention_dropout", 0.0),
        "resid_pdrop": _number(model, "hidden_dropout", 0.0),
        "embd_pdrop": _number(model, "hidden_dropout", 0.0),
    }


def _base(model: Model, remarks: list[str]) -> float:
    if model.state.args.get("rotary_base") is None:
        remarks.append("nothing states rotary_base: 10000, as releases without this argument compute")
    return _number(model, "rotary_base", 10000.0)


def _epsilon(model: Model) -> float:
    """``norm_epsilon`` of 0.7 to 0.12 and later, ``layernorm_epsilon`` of 0.6 and of 0.19."""
    args = model.state.args
    found = args.get("norm_epsilon", args.get("layernorm_epsilon"))
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise MissingInputError(
            "nothing states norm_epsilon",
            where=model.state.where,
            hint=f"give the launch script of the training in {ref('metadata.path')}",
            field="metadata.path",
        )
    return float(found)


def _number(model: Model, name: str, default: float) -> float:
    """A real number; ``default`` is the argument parser's own."""
    value = model.state.args.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default
