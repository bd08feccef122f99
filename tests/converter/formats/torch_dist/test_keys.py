"""Keys as Megatron-LM asks for them: one for all layers where these are alike."""

from __future__ import annotations

import pytest

from ckpt2pt.errors import FormatError, MissingInputError
from ckpt2pt.formats.torch_dist.keys import extra_states, key_of, layers_of
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
    assert key_of("decoder.layers.5.mlp.linear_fc2.weight", layers) == (
        "decoder.layers.mlp.linear_fc2.weight",
        (3,),
        (4,),
    )


def test_the_reader_gives_every_key_its_canonical_name_again() -> None:
    held = index()
    layers = layers_of(held, "here")
    for key in held:
        made = key_of(key.name, layers)
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


def test_experts_are_refused_by_name() -> None:
    with pytest.raises(FormatError, match="experts"):
        layers_of(index(decoder__layers__0__mlp__router__weight=(4, 8)), "here")
    with pytest.raises(MissingInputError, match="no layer"):
        layers_of({}, "here")
