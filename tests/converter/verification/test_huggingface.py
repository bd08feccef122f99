"""A file for transformers against the source: what differs is known by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ckpt2pt
from ckpt2pt.cli.commands import build_parser, main
from ckpt2pt.errors import VerificationError
from ckpt2pt.kube.asked import spec_of
from ckpt2pt.kube.resolve import resolve_any
from ckpt2pt.run.targets.huggingface import Found, find
from ckpt2pt.run.targets.request import HuggingFaceRequest
from ckpt2pt.run.targets.shards import prove_file
from hfsets import save_megatron

NAME = "model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_megatron("qwen3_moe", tmp_path_factory.mktemp("megatron"))


@pytest.fixture
def result(source: Path, tmp_path: Path) -> Path:
    ckpt2pt.convert(source=source, target=tmp_path / "out", target_format="safetensors")
    return tmp_path / "out" / NAME


def found(source: Path, target: Path) -> Found:
    words = ["plan", "--source", str(source), "--target", str(target), "--target-format", "safetensors"]
    request = resolve_any(spec_of(build_parser().parse_args(words)))
    assert isinstance(request, HuggingFaceRequest)
    return find(request)


def prove(source: Path, path: Path) -> None:
    held = found(source, path.parent)
    shard = held.shard((0, 0))
    assert shard
    prove_file(held, shard, {NAME: path}, lambda: None)


def test_what_was_written_is_proved(source: Path, result: Path) -> None:
    prove(source, result)


def header(path: Path) -> tuple[int, dict[str, Any]]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return 8 + size, json.loads(raw[8 : 8 + size])


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.2.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.2.mlp.experts.0.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_a_bit_that_is_flipped_is_found_by_name(name: str, source: Path, result: Path) -> None:
    start, entries = header(result)
    begin, end = entries[name]["data_offsets"]
    raw = bytearray(result.read_bytes())
    raw[start + (begin + end) // 2] ^= 4
    result.write_bytes(raw)
    with pytest.raises(VerificationError, match=name):
        prove(source, result)


def test_tensors_that_changed_places_are_found(source: Path, result: Path) -> None:
    start, entries = header(result)
    one, other = (entries[f"model.layers.0.mlp.{part}_proj.weight"]["data_offsets"] for part in ("gate", "up"))
    raw = bytearray(result.read_bytes())
    first, second = (bytes(raw[start + begin : start + end]) for begin, end in (one, other))
    assert first != second
    raw[start + one[0] : start + one[1]], raw[start + other[0] : start + other[1]] = second, first
    result.write_bytes(raw)
    with pytest.raises(VerificationError, match="gate_proj"):
        prove(source, result)


def test_a_config_that_was_changed_is_found(source: Path, result: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = result.with_name("config.json")
    path.write_text(path.read_text().replace("1000000.0", "1000001.0"))
    words = ["verify", "--source", str(source), "--target", str(result.parent), "--target-format", "safetensors"]
    assert main([*words, "--progress", "none"]) == 76
    assert "config.json" in capsys.readouterr().out
