"""Keys as Megatron-LM asks for them: one for all layers where these are alike."""

from __future__ import annotations

import pytest

from ckpt2pt.errors import MissingInputError
from ckpt2pt.formats.torch_dist.keys import Layers, extra_states, keys_of, layers_of
from ckpt2pt.formats.torch_dist.names import named
from distcp import division, index


def test_layers_that_differ_have_keys_of_their_own() -> None:
    held = index(decoder__layers__1__mlp__linear_fc1__bias=(20,))
    found = division(held, 1, 1)
    keys = {part.key for part in found.file((0, 0))[0].parts}
    assert "decoder.layers.1.mlp.linear_fc1.bias" in keys
    assert "optimizer.state.param.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in keys
    assert not any(key.startswith("decoder.layers.mlp") for key in keys)
    assert "decoder.layers.3.mlp.linear_fc2._extra_state/shard_0_1" in found.file((0, 0))[0].objects


def test_no_op_layers_are_not_counted() -> None:
    layers = layers_of(index((0, 1, 3, 5)), "here")
    assert layers.numbers == {0: 0, 1: 1, 3: 2, 5: 3}
    assert keys_of("decoder.layers.5.mlp.linear_fc2.weight", layers) == (
        ("decoder.layers.mlp.linear_fc2.weight", (3,), (4,)),
    )


def test_the_reader_gives_every_key_its_canonical_name_again() -> None:
    held = index()
    layers = layers_of(held, "here")
    for key in held:
        [made] = keys_of(key.name, layers)
        found = named(made.name)
        assert found
        assert found.name(made.lead) == key.name


def test_states_are_asked_for_once_for_each_layer_and_for_the_last_norm() -> None:
    found = division(index(), 2, 2)
    objects = [key for rank in found.ranks() for key in found.file(rank)[0].objects]
    assert len(objects) == len(set(objects)) == 4 * 9 + 1
    assert "decoder.layers.self_attention.core_attention._extra_state/shard_3_4" in objects
    assert "decoder.final_layernorm._extra_state/shard_0_1" in objects
    assert list(extra_states(found.layers, (), last=False)) == []


def test_experts_are_one_tensor_and_the_norm_before_them_has_two_names() -> None:
    held = index(
        decoder__layers__0__mlp__router__weight=(2, 8),
        **{
            f"decoder__layers__0__mlp__experts__local_experts__{expert}__linear_fc{number}__weight": shape
            for expert in range(2)
            for number, shape in ((1, (20, 8)), (2, (8, 20)))
        },
    )
    layers = layers_of(held, "here")
    assert (layers.alike, layers.with_experts, layers.experts) == (False, frozenset({0}), 2)
    name = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"
    assert keys_of(name, layers) == (("decoder.layers.0.mlp.experts.experts.linear_fc2.weight", (1,), (2,)),)
    names = [made.name for made in keys_of("decoder.layers.0.pre_mlp_layernorm.weight", layers)]
    assert names == ["decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"]
    assert len(keys_of("decoder.layers.1.pre_mlp_layernorm.weight", layers)) == 1
    states = list(extra_states(layers, [0], last=False))
    assert "decoder.layers.0.mlp.experts.experts.linear_fc1._extra_state/shard_1_2" in states


def test_layers_that_are_listed_have_keys_of_their_own_though_all_are_alike() -> None:
    held = index()
    assert layers_of(held, "here", 1).alike
    assert not layers_of(held, "here", [1, 1, 1, 1]).alike
    assert not layers_of(held, "here", 2).alike


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(MissingInputError, match="no layer"):
        layers_of({}, "here")


LATENT = Layers(
    {0: 0, 1: 1},
    alike=False,
    with_experts=frozenset({1}),
    experts=2,
    latent=True,
    predictions=("mtp.layers.0.transformer_layer.",),
)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("input_layernorm.weight", ["input_layernorm.weight"]),
        (
            "self_attention.q_layernorm.weight",
            ["self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"],
        ),
        (
            "self_attention.kv_layernorm.weight",
            ["self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"],
        ),
        ("pre_mlp_layernorm.weight", ["mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"]),
        ("mlp.experts.local_experts.1.linear_fc1.weight", ["mlp.experts.experts.linear_fc1.weight"]),
    ],
)
@pytest.mark.parametrize("prefix", ["decoder.layers.1.", "mtp.layers.0.transformer_layer."])
def test_with_latent_attention_norms_go_by_the_names_of_either_layer_spec(
    prefix: str, name: str, keys: list[str]
) -> None:
    found = keys_of(prefix + name, LATENT)
    assert [key.name for key in found] == [prefix + key for key in keys]
    assert all(key.of == ((2,) if "experts" in name else ()) for key in found)
    for key in found:
        back = named(key.name)
        assert back
        assert back.name(key.lead) == prefix + name


def test_states_of_layers_that_predict_are_with_the_last_stage() -> None:
    last = [*extra_states(LATENT, range(1, 2), last=True)]
    assert len(last) == len(set(last))
    assert "mtp.layers.0.eh_proj._extra_state/shard_0_1" in last
    assert "mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc1._extra_state/shard_1_2" in last
    assert "decoder.layers.1.self_attention.linear_q_up_proj._extra_state/shard_0_1" in last
    assert not [key for key in extra_states(LATENT, range(1), last=False) if key.startswith("mtp.")]
