"""The one table: every spelling, what is cut, and what the shapes of a rank tell of the model."""

from __future__ import annotations

import pytest

from ckpt2pt.core.params import (
    LAYER_MODULES,
    MODULES,
    axes_of,
    canonical_name,
    expert_of,
    in_legacy_models,
    is_buffer,
    is_gated,
    is_padded,
    kind_of,
    layer_of,
    legacy_spelling,
    model_order,
    with_expert,
)
from ckpt2pt.errors import TopologyError

LAYER = "language_model.encoder.layers"

# Spelled out a second time: legacy name, Megatron core's name, axis of the weight and of the bias that is cut.
TABLE = [
    (f"{LAYER}.3.input_norm", "decoder.layers.3.input_layernorm", None, None),
    (f"{LAYER}.3.self_attention.query_key_value", "decoder.layers.3.self_attention.linear_qkv", 0, 0),
    (f"{LAYER}.3.self_attention.q_layernorm", "decoder.layers.3.self_attention.q_layernorm", None, None),
    (f"{LAYER}.3.self_attention.k_layernorm", "decoder.layers.3.self_attention.k_layernorm", None, None),
    (f"{LAYER}.3.self_attention.dense", "decoder.layers.3.self_attention.linear_proj", 1, None),
    (f"{LAYER}.3.post_attention_norm", "decoder.layers.3.pre_mlp_layernorm", None, None),
    (f"{LAYER}.3.mlp.dense_h_to_4h", "decoder.layers.3.mlp.linear_fc1", 0, 0),
    (f"{LAYER}.3.mlp.dense_4h_to_h", "decoder.layers.3.mlp.linear_fc2", 1, None),
    ("language_model.embedding.word_embeddings", "embedding.word_embeddings", 0, 0),
    ("language_model.embedding.position_embeddings", "embedding.position_embeddings", None, None),
    ("language_model.encoder.final_norm", "decoder.final_layernorm", None, None),
    ("language_model.output_layer", "output_layer", 0, 0),
]


@pytest.mark.parametrize(("legacy", "name", "weight", "bias"), TABLE, ids=[row[1] for row in TABLE])
def test_a_module_has_its_name_and_its_cut(legacy: str, name: str, weight: int | None, bias: int | None) -> None:
    for leaf, cut in (("weight", weight), ("bias", bias)):
        assert canonical_name(f"{legacy}.{leaf}") == f"{name}.{leaf}"
        local = (6, 4) if leaf == "weight" else (6,)
        axes = axes_of(f"{name}.{leaf}", local, 4, gated=False)
        assert axes.cut == cut
        assert axes.shape == tuple(n * 4 if number == cut else n for number, n in enumerate(local))
        assert axes.fused == axes.shape


EXPERTS = [
    ("mlp.router.weight", None),
    ("mlp.router.bias", None),
    ("mlp.router.expert_bias", None),
    ("mlp.experts.local_experts.11.linear_fc1.weight", 0),
    ("mlp.experts.local_experts.11.linear_fc1.bias", 0),
    ("mlp.experts.local_experts.11.linear_fc2.weight", 1),
    ("mlp.experts.local_experts.11.linear_fc2.bias", None),
    ("mlp.shared_experts.linear_fc1.weight", 0),
    ("mlp.shared_experts.linear_fc2.weight", 1),
    ("mlp.shared_experts.gate_weight", None),
]

# Multi-latent attention, and the modules around a transformer layer that predicts further tokens.
LATENT = [
    ("decoder.layers.3.self_attention.linear_q_proj", 0),
    ("decoder.layers.3.self_attention.linear_q_down_proj", None),
    ("decoder.layers.3.self_attention.linear_q_up_proj", 0),
    ("decoder.layers.3.self_attention.linear_kv_down_proj", None),
    ("decoder.layers.3.self_attention.linear_kv_up_proj", 0),
    ("decoder.layers.3.self_attention.kv_layernorm", None),
    ("mtp.layers.0.enorm", None),
    ("mtp.layers.0.hnorm", None),
    ("mtp.layers.0.eh_proj", 0),
    ("mtp.layers.0.final_layernorm", None),
]


@pytest.mark.parametrize(("inner", "cut"), EXPERTS)
def test_what_is_cut_of_a_mixture_of_experts(inner: str, cut: int | None) -> None:
    name = f"decoder.layers.3.{inner}"
    axes = axes_of(name, (6, 4), 2, gated=True)
    gated = "linear_fc1" in inner
    assert axes.cut == (1 if gated else cut)
    assert axes.shape == ((2, 6, 4) if gated else (6, 8) if cut == 1 else (6, 4))
    assert canonical_name(legacy_spelling(name)) == name
    assert not in_legacy_models(name)


@pytest.mark.parametrize(("module", "cut"), LATENT)
def test_what_is_cut_of_latent_attention_and_of_prediction(module: str, cut: int | None) -> None:
    name = f"{module}.weight"
    assert axes_of(name, (6, 4), 2, gated=True).cut == cut
    assert kind_of(name) is not None
    assert canonical_name(legacy_spelling(name)) == name
    assert not in_legacy_models(name)


def test_a_layer_that_predicts_holds_the_modules_of_any_layer() -> None:
    inside = "mtp.layers.1.transformer_layer."
    expert = f"{inside}mlp.experts.local_experts.3.linear_fc1.weight"
    assert kind_of(expert) == kind_of("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight")
    assert (layer_of(expert), expert_of(expert)) == (None, 3)
    assert is_buffer(f"{inside}mlp.router.expert_bias")
    assert kind_of("enorm.weight") is kind_of("mtp.layers.0.mlp.linear_fc1.weight") is None


def test_experts_are_numbered_on_by_rank() -> None:
    name = "decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight"
    assert expert_of(name) == 1
    assert with_expert(name, 6) == "decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight"
    assert expert_of("decoder.layers.3.mlp.shared_experts.linear_fc1.weight") is None
    grouped = "decoder.layers.3.mlp.experts.linear_fc1.weight1"
    assert legacy_spelling(grouped) == f"{LAYER}.3.mlp.experts.local_experts.1.linear_fc1.weight"
    assert is_buffer("decoder.layers.3.mlp.router.expert_bias")
    assert not is_buffer("decoder.layers.3.mlp.router.weight")


def test_the_tables_above_are_complete() -> None:
    experts = {name.replace(".11.", ".").rpartition(".")[0] for name, _ in EXPERTS}
    assert len(TABLE) + len(experts) + len(LATENT) == len(LAYER_MODULES) + len(MODULES)


def test_the_layer_spec_of_transformer_engine_calls_the_same_modules_otherwise() -> None:
    for name, legacy in {
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight": f"{LAYER}.3.input_norm.weight",
        "decoder.layers.3.self_attention.linear_qkv.layer_norm_bias": f"{LAYER}.3.input_norm.bias",
        "decoder.layers.3.mlp.linear_fc1.layer_norm_weight": f"{LAYER}.3.post_attention_norm.weight",
        "decoder.layers.3.mlp.linear_fc1.weight": f"{LAYER}.3.mlp.dense_h_to_4h.weight",
        "output_layer.weight": "language_model.output_layer.weight",
        "decoder.layers.3.self_attention.linear_q_up_proj.layer_norm_weight": f"{LAYER}.3.self_attention.q_layernorm.weight",
        "decoder.layers.3.self_attention.linear_kv_up_proj.layer_norm_weight": f"{LAYER}.3.self_attention.kv_layernorm.weight",
    }.items():
        assert legacy_spelling(name) == legacy


def test_a_legacy_model_has_no_q_and_k_layernorm() -> None:
    assert not in_legacy_models("decoder.layers.3.self_attention.q_layernorm.weight")
    assert in_legacy_models("decoder.layers.3.self_attention.linear_proj.weight")
    assert in_legacy_models("decoder.layers.3.self_attention.gate.weight")  # of a rule file


def test_local_layers_become_global_ones() -> None:
    name = canonical_name(f"{LAYER}.1.mlp.dense_4h_to_h.weight", range(6, 8))
    assert name == "decoder.layers.7.mlp.linear_fc2.weight"
    assert layer_of(name) == 7
    assert layer_of("decoder.final_layernorm.weight") is None


def test_a_module_of_a_rule_file_keeps_its_name() -> None:
    assert (
        canonical_name(f"{LAYER}.0.self_attention.gate.weight", range(5, 6))
        == "decoder.layers.5.self_attention.gate.weight"
    )
    assert canonical_name("language_model.adapter.weight") == "language_model.adapter.weight"
    assert kind_of("decoder.layers.5.self_attention.gate.weight") is None
    assert kind_of("decoder.layers.5.mlp.linear_fc1.scale") is None


def test_what_nobody_knows_is_cut_by_rank() -> None:
    assert axes_of("language_model.adapter.weight", (3, 2), 4, gated=True) == ((4, 3, 2), (4, 3, 2), 0)
    assert axes_of("language_model.adapter.weight", (3, 2), 1, gated=True) == ((3, 2), (3, 2), None)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_gate_and_up_are_an_axis_of_their_own(leaf: str) -> None:
    local = (10, 3)[: 2 if leaf == "weight" else 1]
    axes = axes_of(f"decoder.layers.0.mlp.linear_fc1.{leaf}", local, 4, gated=True)
    assert axes == ((2, 20, *local[1:]), (40, *local[1:]), 1)


def test_only_the_vocabulary_is_padded() -> None:
    assert is_padded("embedding.word_embeddings.weight")
    assert is_padded("output_layer.weight")
    assert not is_padded("decoder.layers.0.mlp.linear_fc1.weight")
    assert not is_padded("language_model.adapter.weight")


@pytest.mark.parametrize(("rows", "gated"), [(16, True), (8, False)])
def test_shapes_tell_whether_the_mlp_has_a_gate(rows: int, gated: bool) -> None:
    shapes = {"decoder.layers.1.mlp.linear_fc1.weight": (rows, 4), "decoder.layers.1.mlp.linear_fc2.weight": (4, 8)}
    assert is_gated(shapes, "here") is gated


@pytest.mark.parametrize("other", [{}, {"decoder.layers.1.mlp.linear_fc2.weight": (4, 5)}])
def test_an_mlp_that_is_neither_is_refused(other: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(TopologyError, match="neither equal nor twice as many"):
        is_gated({"decoder.layers.1.mlp.linear_fc1.weight": (16, 4), **other}, "here")


def test_a_stage_without_layers_has_no_gate() -> None:
    assert is_gated({"output_layer.weight": (4, 4)}, "here") is False


def test_names_sort_as_the_model_runs() -> None:
    names = [
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
        "decoder.layers.2.input_layernorm.weight",
        "decoder.layers.2.mlp.linear_fc1.weight",
        "decoder.layers.2.mlp.linear_fc2.bias",
        "decoder.layers.2.mlp.linear_fc2.weight",
        "decoder.layers.2.mlp.of_a_rule_file.weight",
        "decoder.layers.10.input_layernorm.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
        "language_model.adapter.weight",
    ]
    shuffled = sorted(names)
    assert sorted(shuffled, key=model_order) == names
