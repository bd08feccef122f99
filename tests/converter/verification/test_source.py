"""What the source holds for a rank: tied embeddings, and tensors that have no place in the result or none in the source."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from changed import EMBEDDING, HEAD, append, converted, copied, drop, payload, tie
from ckpt2pt.core.names import Rules
from ckpt2pt.core.tensor import Key
from ckpt2pt.discover import discover, meta_of
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import InputError
from ckpt2pt.verification.source import held_for
from ckpt2pt.verification.tensors import Held
from ckptfiles import Tensor
from results import Result, convert_request, set_element


@pytest.fixture
def inputs(golden: Path, tmp_path: Path) -> Request:
    """Copies of a set's source and metadata, to be changed."""
    return copied(golden / "megatron06" / "j_tp1pp2dp2", tmp_path)


def held(request: Request, rank: tuple[int, int] = (0, 0)) -> Held:
    return held_for(request, discover(request), rank, meta_of(request, rank))[0]


def reported(result: Result) -> str:
    """The differences, or why the source is refused."""
    try:
        return "\n".join(map(str, result.verify().differences))
    except InputError as error:
        return error.what


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        pytest.param(
            Tensor("language_model.encoder.layers.3.input_norm.weight", "float32", (64,), bytes(256)),
            "decoder.layers.3.input_layernorm.weight: is in the source, and not in the result",
            id="a-layer-of-another-stage",
        ),
        pytest.param(
            Tensor("language_model.encoder.layers.0.input_norm.bias", "float32", (64,), bytes(256)),
            "decoder.layers.0.input_layernorm.bias: is in the source, and not in the result",
            id="a-parameter-more",
        ),
        pytest.param(
            Tensor("exp_avg.language_model.encoder.layers.0.input_norm.bias", "float32", (64,), bytes(256)),
            "exp_avg of decoder.layers.0.input_layernorm.bias: is in the source, and not in the result",
            id="a-moment-more",
        ),
        pytest.param(
            Tensor("language_model.encoder.layers.0.input_norm.gamma", "float32", (64,), bytes(256)),
            "decoder.layers.0.input_layernorm.weight is on two pipeline stages, or in one file by two names",
            id="a-parameter-twice",
        ),
        pytest.param(
            Tensor("mystery", "float32", (1,), bytes(4)), "no mapping for the MindSpore", id="an-unknown-name"
        ),
    ],
)
def test_a_source_tensor_without_a_place_is_reported(inputs: Request, tensor: Tensor, problem: str) -> None:
    again = converted(inputs)
    append(inputs, 0, tensor)
    assert problem in reported(again())


def test_what_a_rule_file_ignores_is_no_difference(inputs: Request) -> None:
    request = replace(inputs, rules=Rules(ignore=("mystery",)))
    append(request, 0, Tensor("mystery", "float32", (1,), bytes(4)))
    assert reported(converted(request)()) == ""


def test_a_moment_that_is_missing_is_reported(inputs: Request) -> None:
    again = converted(inputs)
    drop(inputs, 0, "exp_avg_sq.language_model.encoder.layers.1.input_norm")
    assert (
        reported(again())
        == "mp_rank_00_000: exp_avg_sq of decoder.layers.1.input_layernorm.weight: is not in the source"
    )


def test_a_tied_copy_on_the_last_stage_is_the_source_of_the_head(inputs: Request) -> None:
    tie(inputs)
    result = convert_request(inputs)
    assert [result.verify((0, pp)).differences for pp in (0, 1)] == [(), ()]
    assert Key("exp_avg", "output_layer.weight") in held(inputs, (0, 1)).tensors
    path = result.file("model_optim_rng.pt", (0, 1))
    set_element(path, "/model/word_embeddings_for_head/weight", 9, struct.pack("<H", 0x4242))
    assert {d.tensor for d in result.verify((0, 1)).differences} == {"word_embeddings.weight"}


def test_a_last_stage_without_a_copy_takes_the_first_stages(inputs: Request) -> None:
    tie(inputs)
    drop(inputs, 2, HEAD)
    result = convert_request(inputs)
    assert result.verify((0, 1)).differences == ()
    found = held(inputs, (0, 1)).tensors
    tensors = [found[key] for key in found if key.name == "embedding.word_embeddings.weight"]
    assert [tensor.key.role for tensor in tensors] == ["param", "exp_avg", "exp_avg_sq"]
    assert all(tensor.views[0].storage[0].path.endswith("rank_0/network.ckpt") for tensor in tensors)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("copy", [HEAD, "word_embeddings_for_head.weight"])
def test_a_copy_that_is_not_carried_must_be_equal(golden: Path, tmp_path: Path, copy: str, equal: bool) -> None:
    request = copied(golden / "megatron06" / "a2_tp1pp1_tied_bias", tmp_path)
    again = converted(request)
    for prefix in ("", "exp_avg.", "exp_avg_sq."):
        data = bytearray(payload(request, 0, prefix + EMBEDDING))
        if not equal and prefix == "exp_avg.":
            data[400] ^= 1
        append(request, 0, Tensor(prefix + copy, "float32", (256, 64), bytes(data)))
    found = again().verify().differences
    assert [(d.tensor, d.index) for d in found] == ([] if equal else [(f"exp_avg of {EMBEDDING}", 100)])
