"""The request of a conversion by global tensors: what a kind of result is asked for, and what no result takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion import schema
from ckpt2pt.kube.tensors import level_in, resolve_huggingface, resolve_mcore

SIZES = schema.Parallelism(tensor=1, pipeline=1)


def spec(target: schema.Target) -> schema.Spec:
    return schema.Spec(source=schema.Source(path="a"), target=target, parallelism=SIZES)


def test_weights_for_transformers_have_no_optimizer() -> None:
    files = schema.HuggingFaceFiles(vocab_size=101, rope_scaling_factor=32.0, tokenizer_path="t")
    request = resolve_huggingface(spec(schema.Target(path="b", format="Safetensors", huggingface=files)))
    assert not request.full
    assert (request.choices.vocabulary, request.choices.rope_scaling_factor) == (101, 32.0)
    assert request.tokenizer == Path("t")


@pytest.mark.parametrize("version", ["0.6", "0.20", "1.0", "x"])
def test_a_release_that_is_not_written_is_refused(version: str) -> None:
    with pytest.raises(UsageError, match="a release from") as refused:
        resolve_mcore(spec(schema.Target(path="b", format="Megatron", megatron_version=version)))
    assert refused.value.field == "target.megatronVersion"


def test_the_level_is_that_of_the_document() -> None:
    found = {level_in(schema.Spec(verify=verify)) for verify in ("None", "Digest", "Full")}
    assert found == {"none", "digest", "full"}
