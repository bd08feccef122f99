"""The table of names, both ways."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.names import (
    NameTable,
    Rules,
    bare,
    local_layer,
    nearest,
    rules_remark,
    state_dict_path,
    without_pipeline_suffix,
)
from ckpt2pt.errors import UnmappedNameError, UsageError

TABLE = NameTable()
LAYER = "language_model.encoder.layers"

PAIRS = [
    (f"{LAYER}.1.self_attention.query_key_value.weight", f"{LAYER}.7.attention.qkv_proj.weight"),
    (f"{LAYER}.1.self_attention.query_key_value.bias", f"{LAYER}.7.attention.qkv_proj.bias"),
    (f"{LAYER}.1.self_attention.dense.weight", f"{LAYER}.7.attention.out_proj.weight"),
    (f"{LAYER}.1.mlp.dense_h_to_4h.weight", f"{LAYER}.7.mlp.mapping.weight"),
    (f"{LAYER}.1.mlp.dense_4h_to_h.bias", f"{LAYER}.7.mlp.projection.bias"),
    (f"{LAYER}.1.input_norm.weight", f"{LAYER}.7.input_norm.weight"),
    (f"{LAYER}.1.post_attention_norm.bias", f"{LAYER}.7.post_attention_norm.bias"),
    ("language_model.encoder.final_norm.weight", "language_model.encoder.final_norm.weight"),
    ("language_model.embedding.word_embeddings.weight", "language_model.embedding.word_embeddings.weight"),
    ("language_model.embedding.position_embeddings.weight", "language_model.embedding.position_embeddings.weight"),
    ("language_model.output_layer.weight", "language_model.output_layer.weight"),
]


@pytest.mark.parametrize(("megatron", "mindspore"), PAIRS)
def test_each_pair_maps_both_ways(megatron: str, mindspore: str) -> None:
    assert TABLE.to_mindspore(megatron, lambda local: local + 6)[0] == mindspore
    assert TABLE.to_megatron(mindspore) == megatron.replace("layers.1.", "layers.7.")


def test_a_norm_may_be_spelled_gamma_and_beta() -> None:
    spellings = TABLE.to_mindspore(f"{LAYER}.0.input_norm.bias", lambda local: local)
    assert spellings == (f"{LAYER}.0.input_norm.bias", f"{LAYER}.0.input_norm.beta")
    assert TABLE.to_megatron(f"{LAYER}.3.input_norm.gamma") == f"{LAYER}.3.input_norm.weight"


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.1.self_attention.dense.scale",
        f"{LAYER}.1.self_attention.dense_extra.weight",
        f"{LAYER}.1.my_self_attention.dense.weight",
        f"{LAYER}.x.self_attention.dense.weight",
        f"prefix.{LAYER}.1.self_attention.dense.weight",
        "language_model.output_layer.weight.more",
        "output_layer.weight",
    ],
)
def test_a_name_that_only_contains_a_known_one_is_refused(name: str) -> None:
    with pytest.raises(UnmappedNameError, match="rule file"):
        TABLE.to_mindspore(name, lambda local: local)


@given(st.text(max_size=60))
def test_any_text_maps_or_is_refused(text: str) -> None:
    try:
        TABLE.to_megatron(text)
    except UnmappedNameError:
        assert text not in {mindspore for _, mindspore in PAIRS}


def test_a_rule_adds_a_sandwich_norm_in_both_directions() -> None:
    table = NameTable(Rules(layer_modules={"attn_post_norm": "attn_post_norm", "post_mlp_norm": "ffn_post_norm"}))
    assert (
        table.to_mindspore(f"{LAYER}.0.post_mlp_norm.weight", lambda local: 4)[0] == f"{LAYER}.4.ffn_post_norm.weight"
    )
    assert table.to_megatron(f"{LAYER}.4.ffn_post_norm.weight") == f"{LAYER}.4.post_mlp_norm.weight"


def test_two_modules_may_not_share_a_mindspore_name() -> None:
    with pytest.raises(UsageError, match=r"attention\.qkv_proj"):
        NameTable(Rules(layer_modules={"self_attention.other": "attention.qkv_proj"}))


@pytest.mark.parametrize(
    ("entry", "role", "name"),
    [
        ("exp_avg.language_model.output_layer.weight", "exp_avg", "language_model.output_layer.weight"),
        ("exp_avg_sq.language_model.output_layer.weight", "exp_avg_sq", "language_model.output_layer.weight"),
        ("adam_v.a", "exp_avg_sq", "a"),
        ("moment1.a", "exp_avg", "a"),
        ("step_num", "ignored", "training progress"),
        ("learning_rate_group_3", "ignored", "optimizer scalar"),
        ("max_exp_avg_sq.a", "ignored", "moment of amsgrad, which Megatron does not have"),
        ("moments.a", "ignored", "momentum without a second moment, which Adam needs"),
        ("momentum", "ignored", "momentum without a second moment, which Adam needs"),
        # A substring is no match: these are parameters and must be mapped or refused.
        ("my_step_num", "param", "my_step_num"),
        ("language_model.state_step.weight", "param", "language_model.state_step.weight"),
        ("epoch_num_x", "param", "epoch_num_x"),
    ],
)
def test_entries_are_distinguished_by_their_whole_name(entry: str, role: str, name: str) -> None:
    found = TABLE.classify(entry)
    assert (found.role, found.name) == (role, name)


def test_a_rule_ignores_by_name_or_by_prefix() -> None:
    table = NameTable(Rules(ignore=("lora.scale", "vision.*")))
    assert [table.classify(n).role for n in ("lora.scale", "vision.a.b", "lora.scale2")] == [
        "ignored",
        "ignored",
        "param",
    ]


def test_a_rule_ignores_by_a_pattern_with_a_star_anywhere() -> None:
    table = NameTable(Rules(ignore=("layers.*.lora_?.weight", "*.scale", "a[0]")))
    names = ("layers.3.lora_a.weight", "x.y.scale", "a[0]", "layers.3.lora_a.weight2", "scale")
    assert [table.classify(name).role for name in names] == ["ignored", "ignored", "ignored", "param", "param"]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (
            "language_model.embedding.word_embeddings.weight",
            ("language_model", "embedding", "word_embeddings", "weight"),
        ),
        (f"{LAYER}.0.mlp.dense_h_to_4h.weight", ("language_model", "encoder", "layers.0.mlp.dense_h_to_4h.weight")),
        ("language_model.encoder.final_norm.bias", ("language_model", "encoder", "final_norm.bias")),
        ("language_model.output_layer.weight", ("language_model", "output_layer", "weight")),
        ("word_embeddings.weight", ("word_embeddings_for_head", "weight")),
    ],
)
def test_weights_nest_as_megatron_nests_them(name: str, path: tuple[str, ...]) -> None:
    assert state_dict_path(name) == path


PARTS = (
    "input_norm.weight", "attention.qkv_proj.weight", "attention.out_proj.weight", "post_attention_norm.weight",
    "mlp.mapping.weight", "mlp.projection.weight",
)  # fmt: skip
MANY = [f"{LAYER}.{layer}.{part}" for layer in range(17_000) for part in PARTS]


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        pytest.param(f"{LAYER}.3000.mlp.mapping.gamma", f"{LAYER}.3000.mlp.mapping.weight", id="its-end"),
        pytest.param(f"model.encoder.layers.42.{PARTS[0]}", f"{LAYER}.42.{PARTS[0]}", id="its-beginning"),
        pytest.param(f"{LAYER}.30.attention.qkv_prj.weight", f"{LAYER}.30.attention.qkv_proj.weight", id="its-middle"),
        pytest.param("visual.patches", "", id="nothing-like-it"),
        pytest.param("a" * 50_000, "", id="absurdly-long"),
    ],
)
def test_the_nearest_of_a_hundred_thousand_names_is_found_at_once(wanted: str, near: str) -> None:
    began = time.process_time()
    assert nearest(wanted, MANY) == near
    assert time.process_time() - began < 1


def test_absurdly_long_names_are_not_compared() -> None:
    # Texts like these take difflib minutes.
    words = ["".join(chr(200 + (seed * number) % 199) for number in range(20_000)) for seed in range(3, 40)]
    began = time.process_time()
    assert nearest(words[0], [*words[1:], "short"]) == ""
    assert time.process_time() - began < 1


def test_prefixes_and_suffixes_come_off_once() -> None:
    assert bare("module.module.x") == "module.x"
    assert bare("model1.language_model.a") == "language_model.a"
    assert bare("modelling.a") == "modelling.a"
    assert without_pipeline_suffix(f"{LAYER}.3_pp1_vpp0_id3.mlp.mapping.weight") == f"{LAYER}.3.mlp.mapping.weight"
    assert (local_layer(f"{LAYER}.12.input_norm.weight"), local_layer("language_model.output_layer.weight")) == (
        12,
        None,
    )


def test_rules_that_match_nothing_are_known() -> None:
    rules = Rules(
        ignore=("lora.scale", "vision.*", "debug.?"),
        modules={"language_model.adapter": "language_model.a", "language_model.other": "language_model.b"},
        layer_modules={"mlp.extra": "mlp.x", "mlp.more": "mlp.y"},
    )
    parameters = ("language_model.adapter.weight", "language_model.encoder.layers.3.mlp.extra.bias")
    unused = NameTable(rules).unused(("lora.scale", "vision.a.weight", "debug.12"), parameters)
    assert rules_remark([unused, unused | {"ignore: of another rank"}]) == (
        "rules that match no name of this checkpoint: ignore: debug.?; layer_modules: mlp.more; modules: language_model.other",
    )
    assert rules_remark([NameTable().unused(("a",), parameters)]) == ()
