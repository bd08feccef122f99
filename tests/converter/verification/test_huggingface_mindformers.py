"""A file for MindFormers against the source: what differs is known by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import build_parser, main
from ckpt2pt.errors import VerificationError
from ckpt2pt.kube.asked import spec_of
from ckpt2pt.kube.resolve import resolve_any
from ckpt2pt.run.targets.mindformers import find_weights
from ckpt2pt.run.targets.request import MindFormersRequest
from ckpt2pt.run.targets.shards import prove_file
from mindformers_made import LAUNCH, Model, save

NAME = "checkpoint-model-0000000-0000001.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    save(root / "in", Model(experts=4, pynative=True, optimizer=False).arrays)
    (root / "launch.sh").write_text(LAUNCH + " --num-experts 4 --moe-ffn-hidden-size 12")
    words = ["--source", str(root / "in"), "--target", str(root / "out"), "--target-format", "torch_dist"]
    words += ["--param-map-path", str(root / "launch.sh"), "--convert-param-only", "--progress", "none"]
    assert main(["convert", *words]) == 0
    return root / "out"


@pytest.fixture
def result(source: Path, tmp_path: Path) -> Path:
    words = ["--source", str(source), "--target", str(tmp_path), "--target-format", "mindformers", "--progress", "none"]
    assert main(["convert", *words]) == 0
    return tmp_path / "iteration_00000003" / NAME


def prove(source: Path, path: Path) -> None:
    words = ["plan", "--source", str(source), "--target", str(path.parents[1]), "--target-format", "mindformers"]
    request = resolve_any(spec_of(build_parser().parse_args(words)))
    assert isinstance(request, MindFormersRequest)
    held = find_weights(request)
    shard = held.shard((0, 0))
    assert shard
    prove_file(held, shard, {NAME: path}, lambda: None)


def test_what_was_written_is_proved(source: Path, result: Path) -> None:
    prove(source, result)


@pytest.mark.parametrize(
    "name",
    [
        "embedding.word_embeddings.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.weight1",
        "decoder.layers.1.mlp.experts.weight2",
        "decoder.layers.1.mlp.expert_bias",
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
    ],
)
def test_a_bit_that_is_flipped_is_found_by_name(name: str, source: Path, result: Path) -> None:
    raw = bytearray(result.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8:start])[name]["data_offsets"]
    raw[start + (begin + end) // 2] ^= 1
    result.write_bytes(raw)
    with pytest.raises(VerificationError, match=f"{name}.*1 of"):
        prove(source, result)


def test_tensors_that_are_missing_unexpected_or_of_another_shape_are_named(source: Path, result: Path) -> None:
    raw = result.read_bytes()
    for old, new, wanted in (
        (b'"output_layer.weight"', b'"output_layer.Weight"', "output_layer.weight.*is not in the file"),
        (b'"shape":[48,8]', b'"shape":[8,48]', "another type or shape"),
    ):
        assert old in raw or b'"shape":[24,8]' in raw
        result.write_bytes(raw.replace(old, new) if old in raw else raw.replace(b'"shape":[24,8]', b'"shape":[8,24]'))
        with pytest.raises(VerificationError, match=wanted):
            prove(source, result)
    result.write_bytes(raw[:-1])
    with pytest.raises(VerificationError):
        prove(source, result)
