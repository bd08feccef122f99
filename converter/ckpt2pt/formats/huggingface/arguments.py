"""The arguments of Megatron-LM that compute what a class of transformers does, from its config.json: the way back of ``config``.  Pure.

Defaults of fields that are left out: transformers 4.57.6, src/transformers/models/*/configuration_*.py.  Both spellings of rotary
embeddings are read: ``rope_theta`` and ``rope_scaling``, and 5's ``rope_parameters``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

from ckpt2pt.errors import FormatError
from ckpt2pt.formats.huggingface.config import LLAMA3, LLAMA3_FACTOR, MLA_ORIGINAL
from ckpt2pt.formats.huggingface.names import (
    DEEPSEEK_V3,
    FAMILIES,
    GPT2,
    MIXTRAL,
    QWEN2_MOE,
    Family,
)
from ckpt2pt.formats.huggingface.views import Heads

Argument = int | float | str | bool | list[int] | None

_TANH = frozenset({"gelu_new", "gelu_pytorch_tanh", "gelu_fast"})
_TIED = {GPT2.model_type}
"""Classes whose head is the embedding where ``tie_word_embeddings`` is left out."""
_THETA = {MIXTRAL.model_type: 1e6}
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "partial_rotary_factor": (1, 1.0),
    "use_sliding_window": (False,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "scale_attn_weights": (True,),
    "add_cross_attention": (False,),
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
"""Fields that change what a class computes, and that no argument of Megatron-LM has a counterpart for: the values that change nothing."""


@dataclass(frozen=True, slots=True)
class Fields:
    """What a config.json says; ``where`` is its path."""

    values: Mapping[str, object]
    where: str

    def refused(self, what: str, hint: str = "give a model that Megatron-LM computes") -> FormatError:
        """The error for what cannot be."""
        return FormatError(what, where=self.where, hint=hint)

    def get(self, name: str, default: object = None) -> object:
        """A value; null is as if it were left out."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None) -> int:
        """A number of something.  Raises :class:`FormatError` for what is none, and for a missing one without ``default``."""
        value = self.get(name, default)
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.refused(
                f"{name} is {'missing' if value is None else repr(value)[:80]}",
                "give the config.json that belongs to these tensors",
            )
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """A number that is not negative."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
            raise self.refused(
                f"{name} is {'missing' if value is None else repr(value)[:80]}",
                "give the config.json that belongs to these tensors",
            )
        return float(value)

    def word(self, name: str, default: str) -> str:
        """A word."""
        value = self.get(name, default)
        return value if isinstance(value, str) else repr(value)[:80]

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refused(f"{name} is {repr(value)[:80]}", "give the config.json that belongs to these tensors")
        return value

    def inner(self, name: str) -> Fields:
        """A mapping inside; empty where there is none."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.refused(f"{name} is {repr(value)[:80]}")
        return Fields(cast("dict[str, object]", value), self.where)


def family_of(fields: Fields) -> Family:
    """The class.  Raises :class:`FormatError` for one that is not read."""
    stated = fields.get("model_type")
    found = FAMILIES.get(stated) if isinstance(stated, str) else None
    named = fields.get("architectures")
    if found is None:
        raise fields.refused(
            f"model_type is {repr(stated)[:80]}, which is not read", f"give a model of {', '.join(FAMILIES)}"
        )
    if named is not None and named != [found.architecture]:
        raise fields.refused(
            f"architectures is {repr(named)[:120]}, and models of {stated} are read as {found.architecture} alone",
            "give a causal language model",
        )
    return found


def is_tied(fields: Fields, family: Family) -> bool:
    """Whether the head is the embedding."""
    return fields.flag("tie_word_embeddings", default=family.model_type in _TIED)


def layers_of(fields: Fields, family: Family) -> int:
    """How many layers there are."""
    return fields.count("n_layer" if family is GPT2 else "num_hidden_layers")


def heads_of(fields: Fields, family: Family) -> Heads:
    """Heads, and the channels of each."""
    if family is GPT2:
        heads = fields.count("n_head")
        return Heads(groups=heads, queries=1, channels=fields.count("n_embd") // heads)
    heads = fields.count("num_attention_heads")
    groups = heads if family is DEEPSEEK_V3 else fields.count("num_key_value_heads", heads)
    if heads % groups:
        raise fields.refused(f"num_attention_heads is {heads} and num_key_value_heads {groups}")
    return Heads(
        groups=groups,
        queries=heads // groups,
        channels=fields.count("head_dim", max(1, fields.count("hidden_size") // heads)),
    )


def arguments_of(
    fields: Fields, family: Family, *, biases: Collection[str], sparse: Collection[int], tokens: int
) -> tuple[dict[str, Argument], tuple[str, ...]]:
    """Arguments, and remarks on what a run has to be given besides.

    ``biases`` are the modules of a layer that have one, ``sparse`` the layers with experts, ``tokens`` the rows of the embedding.
    Raises :class:`FormatError` for what Megatron-LM does not compute.
    """
    for name, neutral in _NEUTRAL.items():
        value = fields.get(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
            raise fields.refused(f"{name} is {repr(value)[:80]}, which Megatron-LM does not compute")
    remarks: list[str] = []
    found = _gpt2(fields) if family is GPT2 else _decoder(fields, family, biases, remarks)
    if fields.count("vocab_size", tokens) > tokens:
        raise fields.refused(
            f"vocab_size is {fields.count('vocab_size')}, and the embedding has {tokens} rows",
            "give the config.json that belongs to these tensors",
        )
    if sparse:
        found |= _experts(fields, family, sparse)
    found |= {
        "untie_embeddings_and_output_weights": not is_tied(fields, family),
        "vocab_size": tokens,
        # Megatron-LM's own default: rows are filled up with zeros to a multiple of it for each tensor-parallel rank.
        "make_vocab_size_divisible_by": 128,
        "init_method_std": fields.real("initializer_range", 0.02),
    }
    return found, tuple(remarks)


def _decoder(fields: Fields, family: Family, biases: Collection[str], remarks: list[str]) -> dict[str, Argument]:
    if fields.word("hidden_act", "silu") not in {"silu", "swish"}:
        raise fields.refused(f"hidden_act is {fields.get('hidden_act')!r}, and Megatron-LM gates with silu (swiglu)")
    if family is MIXTRAL and fields.get("sliding_window") is not None:
        raise fields.refused(
            f"sliding_window is {repr(fields.get('sliding_window'))[:80]}: every layer attends to all tokens in Megatron-LM"
        )
    heads, epsilon = heads_of(fields, family), fields.real("rms_norm_eps", 1e-5 if family is MIXTRAL else 1e-6)
    found: dict[str, Argument] = {
        "num_layers": layers_of(fields, family),
        "hidden_size": fields.count("hidden_size"),
        "ffn_hidden_size": fields.count("intermediate_size"),
        "num_attention_heads": heads.groups * heads.queries,
        "max_position_embeddings": fields.count("max_position_embeddings", 2048),
        "normalization": "RMSNorm",
        # The second is the name of 0.19, and of 0.6.
        "norm_epsilon": epsilon,
        "layernorm_epsilon": epsilon,
        "swiglu": True,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        "rotary_percent": 1.0,
        "add_bias_linear": "self_attention.linear_proj" in biases,
        "add_qkv_bias": "self_attention.linear_qkv" in biases,
        "attention_dropout": fields.real("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
    }
    _check_biases(fields, biases)
    if family is DEEPSEEK_V3:
        return {**found, **_latent(fields, epsilon, remarks)}
    return {
        **found,
        "kv_channels": heads.channels,
        "group_query_attention": heads.queries > 1,
        "num_query_groups": heads.groups,
        "qk_layernorm": any(row.name.startswith("self_attention.q_layernorm") for row in family.layer),
        **_rotary(fields, family, remarks),
    }


def _check_biases(fields: Fields, biases: Collection[str]) -> None:
    """Megatron-LM has a bias everywhere, nowhere, or for queries, keys and values alone."""
    linear = {name for name in biases if ".linear_" in name}
    dense = {"self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"}
    if linear not in (set(), {"self_attention.linear_qkv"}, dense):
        raise fields.refused(
            f"{' and '.join(sorted(linear))} alone have a bias, which no arguments of Megatron-LM describe",
        )


def _theta(fields: Fields, family: Family) -> float:
    return fields.inner("rope_parameters").real(
        "rope_theta", fields.real("rope_theta", _THETA.get(family.model_type, 1e4))
    )


def _scaling(fields: Fields) -> tuple[Fields, str]:
    """The scaling of positions in either spelling, and its kind."""
    new, old = fields.inner("rope_parameters"), fields.inner("rope_scaling")
    found = new if new.values else old
    kind = found.get("rope_type", found.get("type", "default"))
    return found, kind if isinstance(kind, str) else repr(kind)[:80]


def _base(theta: float) -> int | float:
    return int(theta) if theta.is_integer() else theta


def _rotary(fields: Fields, family: Family, remarks: list[str]) -> dict[str, Argument]:
    found: dict[str, Argument] = {"rotary_base": _base(_theta(fields, family))}
    scaling, kind = _scaling(fields)
    if kind == "default":
        return found
    factor = scaling.real("factor")
    if kind == "linear" and factor.is_integer():
        return {**found, "rotary_seq_len_interpolation_factor": int(factor)}
    if kind != "llama3" or any(scaling.get(name) != value for name, value in LLAMA3.items() if name != "rope_type"):
        raise fields.refused(
            f"positions are scaled by {repr(dict(scaling.values))[:200]}, which no argument of Megatron-LM says"
        )
    if factor != LLAMA3_FACTOR:
        remarks.append(
            f"the factor of rope_scaling is {factor}: pretrain_gpt.py of Megatron-LM computes {LLAMA3_FACTOR} whatever "
            "rope_scaling_factor of its arguments says, other programs what it says"
        )
    return {**found, "use_rope_scaling": True, "rope_scaling_factor": factor}


def _latent(fields: Fields, epsilon: float, remarks: list[str]) -> dict[str, Argument]:
    if abs(epsilon - 1e-6) > 1e-9:
        remarks.append(
            f"rms_norm_eps is {epsilon}, and transformers has 1e-06 in the norms of latent vectors, whatever config.json says: "
            "logits differ in the fourth decimal"
        )
    if not fields.flag("norm_topk_prob", default=True):
        raise fields.refused("norm_topk_prob is False, and Megatron-LM normalises the scores of a sigmoid router")
    query = fields.get("q_lora_rank")
    if query is None:
        # 0.19.2, megatron/core/transformer/mla_qk_norm_config.py; 0.12 to 0.18 build a plain linear_q_proj.
        remarks.append(
            "q_lora_rank is null: Megatron-LM 0.19 puts a norm before linear_q_proj then, which this model has not; 0.12 to 0.18 do not"
        )
    return {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "q_lora_rank": None if query is None else fields.count("q_lora_rank"),
        "kv_lora_rank": fields.count("kv_lora_rank", 512),
        "qk_head_dim": fields.count("qk_nope_head_dim", 128),
        "qk_pos_emb_head_dim": fields.count("qk_rope_head_dim", 64),
        "v_head_dim": fields.count("v_head_dim", 128),
        "qk_layernorm": True,
        **_yarn(fields),
    }


def _yarn(fields: Fields) -> dict[str, Argument]:
    """The original length is no argument in releases with ``rope_type`` (config.MLA_ORIGINAL)."""
    found: dict[str, Argument] = {
        "rotary_base": _base(_theta(fields, DEEPSEEK_V3)),
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    }
    scaling, kind = _scaling(fields)
    if kind == "default":
        return found
    numbers = {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": MLA_ORIGINAL}
    if kind != "yarn" or any(scaling.real(name, value) != value for name, value in numbers.items()):
        raise fields.refused(
            f"positions are scaled by {repr(dict(scaling.values))[:200]}, which no argument of Megatron-LM says"
        )
    return {
        **found,
        "rope_type": "yarn",
        "rotary_scaling_factor": scaling.real("factor"),
        "mscale": scaling.real("mscale", 1.0),
        "mscale_all_dim": scaling.real("mscale_all_dim", 0.0),
    }


def experts_of(fields: Fields, family: Family) -> int:
    """How many experts a layer has.

    Qwen3-MoE has one name in transformers 4 and the other in 5 (configuration_qwen3_moe.py of 4.57.6 and of 5.24.0).
    """
    if family is DEEPSEEK_V3:
        return fields.count("n_routed_experts")
    names = ("num_local_experts", "num_experts") if family is MIXTRAL else ("num_experts", "num_local_experts")
    return fields.count(next((name for name in names if fields.get(name) is not None), names[0]))


def _experts(fields: Fields, family: Family, sparse: Collection[int]) -> dict[str, Argument]:
    layers = layers_of(fields, family)
    top = fields.count("num_experts_per_tok", {MIXTRAL: 2, QWEN2_MOE: 4}.get(family, 8))
    found: dict[str, Argument] = {
        "num_experts": experts_of(fields, family),
        "moe_router_topk": top,
        "moe_layer_freq": 1 if len(sparse) == layers else [int(layer in sparse) for layer in range(layers)],
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": fields.real("router_aux_loss_coef", 0.0),
        "moe_router_score_function": "softmax",
    }
    if family is MIXTRAL:
        return {
            **found,
            "moe_ffn_hidden_size": fields.count("intermediate_size"),
            "moe_router_pre_softmax": False,
        }
    ffn = fields.count("moe_intermediate_size")
    if family is not DEEPSEEK_V3:
        found |= {
            "moe_ffn_hidden_size": ffn,
            "moe_router_pre_softmax": not fields.flag("norm_topk_prob", default=False),
        }
        if family is QWEN2_MOE:
            found |= {
                "moe_shared_expert_intermediate_size": fields.count("shared_expert_intermediate_size"),
                "moe_shared_expert_gate": True,
            }
        return found
    groups, chosen = fields.count("n_group", 1), fields.count("topk_group", 1)
    if groups > 1 and top != 2 * chosen:
        raise fields.refused(
            f"num_experts_per_tok is {top} and topk_group {chosen}, of which not twice as many: Megatron-LM sums other scores of a group"
        )
    if top < 2:
        raise fields.refused("num_experts_per_tok is 1, whose score Megatron-LM does not normalise")
    return {
        **found,
        "moe_ffn_hidden_size": ffn,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": chosen if groups > 1 else None,
        "moe_router_topk_scaling_factor": fields.real("routed_scaling_factor", 1.0),
        "moe_shared_expert_intermediate_size": fields.count("n_shared_experts", 1) * ffn,
    }


def _gpt2(fields: Fields) -> dict[str, Argument]:
    heads, hidden, act = fields.count("n_head"), fields.count("n_embd"), fields.word("activation_function", "gelu_new")
    if act not in _TANH | {"gelu"}:
        raise fields.refused(f"activation_function is {act!r}, and Megatron-LM computes gelu")
    if hidden % heads:
        raise fields.refused(f"n_embd is {hidden} and n_head {heads}")
    epsilon = fields.real("layer_norm_epsilon", 1e-5)
    return {
        "num_layers": layers_of(fields, GPT2),
        "hidden_size": hidden,
        "ffn_hidden_size": fields.count("n_inner", 4 * hidden),
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
        "group_query_attention": False,
        "num_query_groups": heads,
        "max_position_embeddings": fields.count("n_positions", 1024),
        "normalization": "LayerNorm",
        "norm_epsilon": epsilon,
        "layernorm_epsilon": epsilon,
        "swiglu": False,
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "bias_gelu_fusion": act in _TANH,
        "attention_dropout": fields.real("attn_pdrop", 0.1),
        "hidden_dropout": fields.real("resid_pdrop", 0.1),
    }
