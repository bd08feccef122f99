"""Which class of Hugging Face computes what a run of Megatron-LM trained; what none computes is refused by name.  Pure.

Arguments: Megatron-LM core_v0.8.0 to 0.19.0, megatron/training/arguments.py.  What a class computes: transformers 4.57.6 and
5.24.0, src/transformers/models/*/modeling_*.py; each choice was proved by equal logits of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ckpt2pt.core.params import HEAD, has_experts, layer_of, split_layer
from ckpt2pt.core.state import State
from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.huggingface.names import (
    DEEPSEEK_V3,
    GPT2,
    LLAMA,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    Family,
)

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "activation_func_clamp_value": (None,),
    "apply_layernorm_1p": (None, False),
    "apply_residual_connection_post_layernorm": (None, False),
    "attention_output_gate": (None, False),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (None, 0, 0.0),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "heterogeneous_layers_config_path": (None, ""),
    "hybrid_layer_pattern": (None, ""),
    "hybrid_override_pattern": (None, ""),
    "is_hybrid_model": (None, False),
    "layernorm_zero_centered_gamma": (None, False),
    "linear_attention_freq": (None,),
    "moe_apply_probs_on_input": (None, False),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "mtp_num_layers": (None, 0),
    "no_rope_freq": (None, 0),
    "openai_gelu": (None, False),
    "qk_l2_norm": (None, False),
    "quick_geglu": (None, False),
    "rotary_percent": (None, 1, 1.0),
    "softmax_type": (None, "vanilla"),
    "squared_relu": (None, False),
    "use_mup": (None, False),
    "window_size": (None,),
}
"""Arguments that change what a layer computes and that no class has a counterpart for: the values that change nothing."""


POSITIONS = "embedding.position_embeddings.weight"


class Model(NamedTuple):
    """A trained model: its class, and what arguments and tensors say of it.

    ``biases`` are the modules of a layer with a bias; ``dense`` are the layers with one MLP, ``layers`` counts all of them.
    """

    family: Family
    state: State
    layers: int
    dense: tuple[int, ...]
    tied: bool
    biases: frozenset[str]
    experts: int


def model_of(state: State, names: Mapping[str, object], *, layers: int, experts: int) -> Model:
    """The class for a model with parameters of these canonical ``names``.

    Raises :class:`FormatError` for what no class computes.
    """
    _refuse(state)
    inner = {split_layer(name)[1] for name in names if layer_of(name) is not None}
    biases = frozenset(name.removesuffix(".bias") for name in inner if name.endswith(".bias"))
    sparse = {layer for name in names if (layer := layer_of(name)) is not None and has_experts(split_layer(name)[1])}
    dense = tuple(layer for layer in range(layers) if layer not in sparse)
    untied = state.args.get("untie_embeddings_and_output_weights")
    found = Model(LLAMA, state, layers, dense, HEAD not in names, biases, experts)
    if isinstance(untied, bool) and untied is found.tied:
        raise _refused(
            state,
            f"untie_embeddings_and_output_weights is {untied}, and the checkpoint has {'no' if untied else 'an'} {HEAD}",
        )
    return found._replace(family=_family(found, inner, learned=POSITIONS in names))


def _refuse(state: State) -> None:
    for name, neutral in NEUTRAL.items():
        value = state.args.get(name)
        if not any(value is one or (type(value) is type(one) and value == one) for one in neutral):
            raise _refused(state, f"{name} is {value!r}, which no class of transformers computes")


def _family(model: Model, inner: set[str], *, learned: bool) -> Family:
    args = model.state.args
    if learned:
        return _checked(model, GPT2, _not_gpt2(model, inner))
    if args.get("position_embedding_type") not in {None, "rope"}:
        raise _refused(model.state, f"position_embedding_type is {args['position_embedding_type']}")
    kinds = {name.rpartition(".")[0] for name in inner}
    if args.get("multi_latent_attention") is True or "self_attention.linear_kv_down_proj" in kinds:
        return _checked(model, DEEPSEEK_V3, _not_deepseek(model, inner))
    normed = "self_attention.q_layernorm" in kinds
    if not model.experts:
        family = QWEN3 if normed else QWEN2 if _qkv_alone(model) else LLAMA
        return _checked(model, family, _not_dense(model, normed=normed))
    shared = "mlp.shared_experts.linear_fc1" in kinds
    if shared:
        return _checked(model, QWEN2_MOE, _not_qwen2_moe(model, inner, normed=normed))
    if normed:
        return _checked(model, QWEN3_MOE, _not_moe(model, allowed=_QKV))
    return _checked(model, MIXTRAL, _not_mixtral(model))


_QKV = frozenset({"self_attention.linear_qkv"})
_ATTENTION = _QKV | {"self_attention.linear_proj"}
_MLP = frozenset({"mlp.linear_fc1", "mlp.linear_fc2"})


def _qkv_alone(model: Model) -> bool:
    return model.biases == _QKV


def _checked(model: Model, family: Family, problems: Iterator[str]) -> Family:
    for problem in problems:
        raise _refused(model.state, f"{problem}, which {family.architecture}, the nearest class, does not compute")
    return family


def _not_decoder(model: Model, biases: frozenset[str]) -> Iterator[str]:
    """What holds for all but GPT-2."""
    args = model.state.args
    if args.get("normalization") not in {None, "RMSNorm"}:
        yield f"normalization is {args['normalization']}"
    if args.get("swiglu") is False:
        yield "swiglu is False"
    if more := sorted(model.biases - biases):
        yield f"{more[0]} has a bias"


def _not_dense(model: Model, *, normed: bool) -> Iterator[str]:
    yield from _not_decoder(model, _ATTENTION if normed else _ATTENTION | _MLP)
    if not normed and model.biases not in {frozenset(), _QKV, _ATTENTION, _ATTENTION | _MLP}:
        yield f"{' and '.join(sorted(model.biases))} alone have a bias"


def _not_moe(model: Model, allowed: frozenset[str]) -> Iterator[str]:
    """A softmax router without groups and factor."""
    yield from _not_decoder(model, allowed)
    args = model.state.args
    if args.get("moe_router_score_function") not in {None, "softmax"}:
        yield f"moe_router_score_function is {args['moe_router_score_function']}"
    for name in ("moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor"):
        if args.get(name) not in {None, 1}:
            yield f"{name} is {args[name]}"
    if args.get("moe_router_enable_expert_bias") is True:
        yield "moe_router_enable_expert_bias is True"


def _not_mixtral(model: Model) -> Iterator[str]:
    yield from _not_moe(model, frozenset())
    if model.dense:
        yield f"layer {model.dense[0]} has no experts"
    if model.state.args.get("moe_router_pre_softmax") is True and _top(model) > 1:
        yield "moe_router_pre_softmax is True"


def _not_qwen2_moe(model: Model, inner: set[str], *, normed: bool) -> Iterator[str]:
    yield from _not_moe(model, _QKV)
    if normed:
        yield "qk_layernorm is True"
    if "mlp.shared_experts.gate_weight" not in inner:
        yield "the shared expert has no gate"


def _not_deepseek(model: Model, inner: set[str]) -> Iterator[str]:
    yield from _not_decoder(model, frozenset())
    args = model.state.args
    if not model.experts:
        yield "there are no experts"
    if model.dense != tuple(range(len(model.dense))):
        yield f"layer {model.dense[-1]} has no experts, and one before it has"
    if args.get("moe_router_score_function") != "sigmoid":
        yield f"moe_router_score_function is {args.get('moe_router_score_function')}"
    if "mlp.router.expert_bias" not in inner:
        yield "moe_router_enable_expert_bias is False"
    if "mlp.shared_experts.linear_fc1.weight" not in inner:
        yield "there is no shared expert"
    if "mlp.shared_experts.gate_weight" in inner:
        yield "the shared expert has a gate"
    groups, chosen = args.get("moe_router_num_groups"), args.get("moe_router_group_topk")
    # Megatron sums the best topk / group_topk scores of a group (moe_utils.py, group_limited_topk), transformers the best two.
    if groups not in {None, 1} and _top(model) != 2 * _int(chosen):
        yield f"moe_router_topk is {_top(model)} and moe_router_group_topk {chosen}, of which not twice as many"
    if _top(model) < 2:
        yield "moe_router_topk is 1"


def _not_gpt2(model: Model, inner: set[str]) -> Iterator[str]:
    args = model.state.args
    if args.get("normalization") not in {None, "LayerNorm"}:
        yield f"normalization is {args['normalization']}"
    if args.get("swiglu") is True:
        yield "swiglu is True"
    if model.experts:
        yield "there are experts"
    wanted = _ATTENTION | _MLP | {"input_layernorm", "pre_mlp_layernorm"}
    if lacking := sorted(wanted - model.biases):
        yield f"{lacking[0]} has no bias"
    if "self_attention.q_layernorm.weight" in inner:
        yield "qk_layernorm is True"
    if args.get("group_query_attention") is True:
        yield "group_query_attention is True"


def _top(model: Model) -> int:
    return _int(model.state.args.get("moe_router_topk"))


def _int(value: object) -> int:
    return value if type(value) is int else 0


def _refused(state: State, what: str) -> FormatError:
    return FormatError(
        what,
        where=state.where,
        hint=f"choose another format{_TARGET}: no result for transformers would be the same model",
    )


_TARGET = f" in {ref('target.format')}"
