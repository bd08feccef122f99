"""Keys of a distributed checkpoint by roles and canonical names."""

from __future__ import annotations

import pytest

from ckpt2pt.core.tensor import Role
from ckpt2pt.formats.torch_dist.names import named


@pytest.mark.parametrize(
    ("key", "role", "numbers", "name"),
    [
        ("embedding.word_embeddings.weight", "param", (), "embedding.word_embeddings.weight"),
        ("decoder.layers.mlp.linear_fc2.bias", "param", (7,), "decoder.layers.7.mlp.linear_fc2.bias"),
        ("decoder.layers.7.mlp.linear_fc2.bias", "param", (), "decoder.layers.7.mlp.linear_fc2.bias"),
        (
            "optimizer.state.fp32_param.decoder.layers.self_attention.linear_qkv.layer_norm_bias",
            "main_param",
            (2,),
            "decoder.layers.2.input_layernorm.bias",
        ),
        (
            "chained_0.optimizer.state.exp_avg_sq.decoder.layers.3.mlp.linear_fc1.layer_norm_weight",
            "exp_avg_sq",
            (),
            "decoder.layers.3.pre_mlp_layernorm.weight",
        ),
        (
            "optimizer.state.exp_avg.decoder.layers.mlp.experts.experts.linear_fc1.weight",
            "exp_avg",
            (1, 5),
            "decoder.layers.1.mlp.experts.local_experts.5.linear_fc1.weight",
        ),
        (
            "decoder.layers.4.mlp.experts.experts.12.linear_fc2.weight",
            "param",
            (),
            "decoder.layers.4.mlp.experts.local_experts.12.linear_fc2.weight",
        ),
    ],
)
def test_keys_are_named_as_megatron_core_names_them(key: str, role: Role, numbers: tuple[int, ...], name: str) -> None:
    found = named(key)
    assert found is not None
    assert (found.role, found.leading, found.name(numbers)) == (role, len(numbers), name)


@pytest.mark.parametrize("key", ["optimizer.state.momentum_buffer.a", "optimizer.distributed.dp_group_idx_0.x.param"])
def test_state_in_another_form_has_no_name(key: str) -> None:
    assert named(key) is None
