"""Which parameters a model chunk registers, in which order: the optimizer's file holds no names, so the order is everything."""

from __future__ import annotations

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.formats.megatron.order import Style, chunk_parameters

_MODULES = (
    "input_layernorm.weight", "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias",
    "self_attention.q_layernorm.weight", "self_attention.linear_proj.weight", "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
)  # fmt: skip
NAMES = {
    "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight",
    "decoder.final_layernorm.weight",
    *(f"decoder.layers.{layer}.{module}" for layer in range(2) for module in _MODULES),
}
LAYOUT = Topology(num_layers=2, pipeline=2)


def spelled(pp: int, *, tied: bool = True, names: set[str] = NAMES, **style: object) -> list[str]:
    found = chunk_parameters(names, LAYOUT, pp=pp, vpp=0, tied=tied, style=Style(**style))  # type: ignore[arg-type]
    return [one.spelled for one in found]


def test_local_layers_register_the_projection_before_q_k_and_v() -> None:
    assert spelled(0) == [
        "embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
    ]


def test_transformer_engine_has_norms_inside_the_linear_layer_behind_them() -> None:
    assert spelled(1, transformer_engine=True) == [
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]


def test_legacy_models_register_q_k_and_v_first_and_the_tied_head_last() -> None:
    names = {name for name in NAMES if "q_layernorm" not in name}
    found = chunk_parameters(names, LAYOUT, pp=1, vpp=0, tied=True, style=Style(names="legacy"))
    listed = [one.spelled for one in found]
    assert listed[:2] == [
        "language_model.encoder.layers.0.input_norm.weight",
        "language_model.encoder.layers.0.self_attention.query_key_value.weight",
    ]
    assert listed[-2:] == ["language_model.encoder.final_norm.weight", "word_embeddings.weight"]


@pytest.mark.parametrize(("pp", "shared"), [(0, "embedding.word_embeddings.weight"), (1, "output_layer.weight")])
def test_tied_embedding_is_shared_by_both_ends(pp: int, shared: str) -> None:
    found = list(chunk_parameters(NAMES, LAYOUT, pp=pp, vpp=0, tied=True, style=Style()))
    assert [(one.spelled, one.name) for one in found if one.shared] == [(shared, "embedding.word_embeddings.weight")]


def test_no_op_layer_keeps_its_slot_and_a_chunk_may_be_empty() -> None:
    layout = Topology(num_layers=4, pipeline=2, virtual=2, noop=frozenset({2}))
    names = {name.replace("layers.1.", "layers.3.") for name in NAMES}
    chunks = [
        [one.name for one in chunk_parameters(names, layout, pp=pp, vpp=vpp, tied=False, style=Style())]
        for vpp in range(2)
        for pp in range(2)
    ]
    assert [len(chunk) for chunk in chunks] == [10, 0, 0, 9]
