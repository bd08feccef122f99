"""What a checkpoint holds besides tensors: time, arguments, parameter groups, scheduler, seed.  Pure: plain values.

pt_meta, a Megatron source, a launch script  -.
                                               >  State  -->  what the writer of a format puts into its own files
what a MindSpore file states                 -'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from ckpt2pt.errors import MissingInputError, ref

Values = Mapping[str, object]
"""Names as Megatron has them; bool, int, float, str, None, and lists, tuples and dictionaries of these."""

ARCHITECTURE = (
    "ffn_hidden_size", "kv_channels", "group_query_attention", "num_query_groups", "max_position_embeddings",
    "normalization", "norm_epsilon", "layernorm_epsilon", "layernorm_zero_centered_gamma", "apply_layernorm_1p",
    "apply_residual_connection_post_layernorm", "qk_layernorm", "qk_l2_norm", "swiglu", "squared_relu", "quick_geglu",
    "openai_gelu", "bias_gelu_fusion", "glu_linear_offset", "activation_func_clamp_value", "add_bias_linear", "add_qkv_bias",
    "attention_output_gate", "softmax_type", "window_size", "experimental_attention_variant", "linear_attention_freq",
    "position_embedding_type", "rotary_base", "rotary_percent", "rotary_interleaved", "rotary_seq_len_interpolation_factor",
    "no_rope_freq", "use_rope_scaling", "rope_scaling_factor", "rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim",
    "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
    "num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_latent_size", "moe_apply_probs_on_input",
    "moe_mlp_glu_interleave_size", "moe_router_topk", "moe_router_pre_softmax", "moe_router_score_function",
    "moe_router_enable_expert_bias", "moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_shared_expert_glu_interleave_size", "moe_aux_loss_coeff",
    "mtp_num_layers", "untie_embeddings_and_output_weights", "use_mup", "is_hybrid_model", "hybrid_layer_pattern",
    "hybrid_override_pattern", "heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json",
    "init_method_std", "attention_dropout", "hidden_dropout",
)  # fmt: skip
"""Arguments of the model itself (Megatron-LM 0.6 to 0.19, megatron/training/arguments.py): written into every result that has
arguments, so that a run can take them over (``--use-checkpoint-args``), and so that it can be exported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """``args`` are training arguments by Megatron's names, without any that is no plain value.

    ``samples`` are consumed training samples, None where nothing tells them; ``step`` counts steps of the optimizer, which are
    fewer than iterations where some were skipped.  ``groups`` hold hyperparameters of the parameter groups, ``wd_mult`` 0
    for what does not decay.  ``scaler`` is the state of an fp16 training's loss scale (``scale``, ``growth_tracker``,
    ``hysteresis_tracker``), empty where the scale is constant, None for other trainings.  ``where`` names what was read,
    ``assumed`` what nobody said.
    """

    where: str
    iteration: int
    samples: int | None
    step: int
    args: Values = field(default_factory=dict[str, object])
    groups: tuple[Values, ...] = ()
    scheduler: Values = field(default_factory=dict[str, object])
    scaler: Values | None = None
    assumed: Values = field(default_factory=dict[str, object])

    @property
    def architecture(self) -> dict[str, object]:
        """The arguments that decide what the model computes, as far as they are stated."""
        return {name: self.args[name] for name in ARCHITECTURE if self.args.get(name) is not None}

    @property
    def sizes(self) -> dict[str, int | bool]:
        """The arguments that are whole numbers or switches."""
        return {name: value for name, value in self.args.items() if isinstance(value, int)}

    def number(self, name: str) -> int:
        """An argument that the result needs.  Raises :class:`MissingInputError` where nothing states it."""
        value = self.args.get(name)
        if type(value) is not int or value < 1:
            raise MissingInputError(
                f"nothing states {name}" if value is None else f"{name} is {value!r}",
                where=self.where,
                hint=f"give a pt_meta, or the launch script of the Megatron run, in {ref('metadata.path')}",
                field="metadata.path",
            )
        return value

    def group(self, *, decays: bool, experts: bool = False) -> Values:
        """The hyperparameters of what decays, or of what does not, with the true ``step``.

        ``experts`` asks for those of experts with an optimizer of their own; where nobody stated them they are those of the rest.
        """
        alike = [group for group in self.groups if bool(group.get("wd_mult", 1.0)) == decays]
        own = (group for group in alike if bool(group.get("is_expert_parallel")) == experts)
        found = next(own, next(iter(alike), None))
        if found is None:
            raise MissingInputError(
                f"nothing states the hyperparameters of parameters with{'' if decays else 'out'} weight decay",
                where=self.where,
                hint=f"give a pt_meta, or the launch script of the Megatron run, in {ref('metadata.path')}",
                field="metadata.path",
            )
        return {
            **found,
            **({"is_expert_parallel": experts} if "is_expert_parallel" in found else {}),
            "step": self.step,
        }


def plain_values(values: Mapping[str, object]) -> dict[str, object]:
    """Those of ``values`` that are plain: objects of a framework are left out."""
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, cast("list[object]", value)))
    if isinstance(value, dict):
        return all(_is_plain(one) for pair in cast("dict[object, object]", value).items() for one in pair)
    return value is None or type(value) in {bool, int, float, str}
