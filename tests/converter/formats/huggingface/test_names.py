"""The table of names: no two parameters become one tensor, and experts and layers keep their numbers."""

from __future__ import annotations

import pytest

from ckpt2pt.formats.huggingface.names import DEEPSEEK_V3, FAMILIES, GPT2, MIXTRAL, QWEN3_MOE, Family, rows_of


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_no_tensor_has_two_origins(family: Family) -> None:
    own = [row.own for row in (*family.layer, *family.outside)]
    assert len(own) == len(set(own))


def test_experts_and_layers_keep_their_numbers() -> None:
    name = "decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight"
    assert [(row.own, row.form) for row in rows_of(MIXTRAL, name)] == [
        ("model.layers.3.block_sparse_moe.experts.5.w1.weight", "gate"),
        ("model.layers.3.block_sparse_moe.experts.5.w3.weight", "up"),
    ]
    [row] = rows_of(QWEN3_MOE, name.replace("linear_fc1", "linear_fc2"))
    assert row.own == "model.layers.3.mlp.experts.5.down_proj.weight"


def test_a_parameter_without_a_place_has_no_row() -> None:
    assert not list(rows_of(GPT2, "decoder.layers.0.self_attention.q_layernorm.weight"))
    assert not list(rows_of(DEEPSEEK_V3, "decoder.layers.0.self_attention.linear_qkv.weight"))
