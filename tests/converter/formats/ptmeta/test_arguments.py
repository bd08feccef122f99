"""What follows from a description, and what is taken as the default; both are named."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt2pt.errors import UsageError
from ckpt2pt.formats.ptmeta.arguments import Arguments, complete, floating, integer, topology_of
from ckpt2pt.formats.ptmeta.describe import Description

SAID: dict[str, Any] = {
    "num_layers": 8, "hidden_size": 1024, "num_attention_heads": 16, "micro_batch_size": 2, "lr": 1e-3,
    "use_distributed_optimizer": True, "bf16": True, "seq_length": 512, "train_iters": 10,
}  # fmt: skip


def full(*, data: int | None = None, world: int | None = None, vocabulary: int | None = 64, **more: Any) -> Arguments:
    said = Description(path="here", given=SAID | more, unknown={}, world_size=world)
    return complete(said, data=data, vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("more", "name", "value"),
    [
        ({}, "ffn_hidden_size", 4096),
        ({"swiglu": True}, "ffn_hidden_size", 2688),
        ({}, "kv_channels", 64),
        ({}, "encoder_num_layers", 8),
        ({}, "max_position_embeddings", 512),
        ({}, "params_dtype", "bfloat16"),
        ({"bf16": False}, "params_dtype", "float32"),
        ({}, "accumulate_allreduce_grads_in_fp32", True),
        ({}, "start_weight_decay", 0.01),
        ({"use_rotary_position_embeddings": True}, "position_embedding_type", "rope"),
        ({"add_bias_linear": False}, "bias_gelu_fusion", False),
        ({"sequence_parallel": True}, "sequence_parallel", False),
        ({"sequence_parallel": True, "tensor_model_parallel_size": 2}, "async_tensor_model_parallel_allreduce", False),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2}, "virtual_pipeline_model_parallel_size", 2),
        ({}, "padded_vocab_size", 64),
        ({"data": 3}, "global_batch_size", 6),
        ({"data": 3}, "world_size", 3),
        ({"world": 8, "tensor_model_parallel_size": 2}, "data_parallel_size", 4),
        ({"world_size": 4}, "data_parallel_size", 4),
        ({"data_parallel_size": 5}, "world_size", 5),
        ({"data": 6, "context_parallel_size": 2}, "data_parallel_size", 3),
    ],
)  # fmt: skip
def test_rules_of_megatron(more: dict[str, Any], name: str, value: object) -> None:
    found = full(**more)
    assert found.values[name] == value
    assert name in found.derived


def test_degrees_that_agree_may_both_be_said() -> None:
    assert full(world_size=4, data_parallel_size=2, tensor_model_parallel_size=2).values["data_parallel_size"] == 2


def test_what_was_said_is_neither_worked_out_nor_a_default() -> None:
    found = full(ffn_hidden_size=7, seed=5)
    assert (found.values["ffn_hidden_size"], found.values["seed"]) == (7, 5)
    assert not {"ffn_hidden_size", "seed"} & {*found.derived, *found.defaults}
    assert found.defaults["adam_beta1"] == 0.9
    assert set(found.values) == set(SAID) | {"ffn_hidden_size", "seed"} | set(found.derived) | set(found.defaults)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"hidden_size": None}, "does not give hidden_size"),
        ({"num_experts": 4}, "num_experts is 4"),
        ({"fp16": True}, "fp16 is True"),
        ({"use_mcore_models": True}, "use_mcore_models"),
        ({"use_distributed_optimizer": False}, "use_distributed_optimizer"),
        ({"world": 6, "tensor_model_parallel_size": 4}, "do not divide"),
        ({"num_attention_heads": "many"}, "not a number above 0"),
        (
            {"world_size": 2, "data_parallel_size": 3, "pipeline_model_parallel_size": 2},
            "data_parallel_size is 3, but 2 ranks by tensor 1 x pipeline 2 x context 1 are 1",
        ),
        ({"world": 8, "data_parallel_size": 3}, "data_parallel_size is 3, but 8 ranks"),
        ({"world_size": 0}, "world_size is 0, not a number above 0"),
        ({"data_parallel_size": 0}, "data_parallel_size is 0, not a number above 0"),
    ],
)
def test_what_cannot_be_made_from_a_description_is_refused(more: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        full(**more)


def test_the_cut() -> None:
    found = full(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    cut = topology_of(found.values, data=3, context=2, noop=frozenset({1}), layers_per_stage=None)
    assert (cut.pipeline, cut.virtual, cut.data, cut.context, cut.noop) == (2, 2, 3, 2, frozenset({1}))


def test_numbers_are_numbers() -> None:
    assert (integer({"a": 1}, "a"), floating({"a": 1}, "a"), floating({}, "a", 2.0)) == (1, 1, 2.0)
    for value in (True, 0, 1.5, "1", None):
        with pytest.raises(UsageError):
            integer({"a": value}, "a")
    for value in (True, "1", None):
        with pytest.raises(UsageError):
            floating({"a": value}, "a")
