"""Conversions into weights for transformers: the tensors that an independent script made, stage by stage, again, and refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.run.targets.huggingface import conversion_of
from ckpt2pt.run.targets.request import HuggingFaceRequest
from goldens import golden_root
from hfsets import NAMES, SETS, TOKENS, folder_of, save_megatron


def convert(source: Path, target: Path, *more: str, command: str = "convert") -> int:
    return main([
        command, "--source", str(source), "--target", str(target), "--target-format", "safetensors", "--progress", "none", *more,
    ])  # fmt: skip


def tensors(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor by the documented layout of the files, without a library of ours."""
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name == "__metadata__":
                assert entry == {"format": "pt"}
                continue
            begin, end = entry["data_offsets"]
            assert name not in found
            found[name] = entry["dtype"], entry["shape"], raw[start + begin : start + end]
    return found


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def words(name: str) -> list[str]:
    return ["--vocab-size", str(TOKENS[name])] if name in TOKENS else []


@pytest.mark.parametrize("name", SETS)
def test_every_tensor_is_that_of_an_independent_conversion(name: str, tmp_path: Path) -> None:
    source = save_megatron(name, tmp_path / "megatron")
    assert convert(source, tmp_path / "out", "--verify", "full", *words(name)) == 0
    expected = folder_of(name) / "hf"
    assert tensors(tmp_path / "out") == tensors(expected)
    own, wanted = config(tmp_path / "out"), config(expected)
    assert own["architectures"] == [NAMES[name]]
    said = {key: value for key, value in wanted.items() if key in own and value is not None}
    assert {key: own[key] for key in said} == said
    assert convert(source, tmp_path / "out", "--level", "full", *words(name), command="verify") == 0


@pytest.mark.parametrize("name", ["llama_tp2pp2", "moe_ep2"])
def test_ranks_of_a_real_training_become_one_model(name: str, tmp_path: Path) -> None:
    of = {"llama_tp2pp2": "llama", "moe_ep2": "moe"}[name]
    source = golden_root() / "mcore" / "0.19.0" / name
    if not source.is_dir():
        pytest.skip("is in the full collection alone")
    assert convert(source, tmp_path / "out", "--verify", "full") == 0
    assert tensors(tmp_path / "out") == tensors(folder_of(of) / "hf")


def test_stages_divide_the_files_and_the_last_joins_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt2pt.kube.tensors.HuggingFaceRequest", partial(HuggingFaceRequest, shard_bytes=20_000))
    source = save_megatron("moe", tmp_path / "megatron")
    assert convert(source, tmp_path / "out") == 0
    found = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert found == [f"model-{number:05d}-of-{len(found):05d}.safetensors" for number in range(1, len(found) + 1)]
    assert len(found) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = tensors(tmp_path / "out")
    assert index["weight_map"].keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(len(raw) for _, _, raw in held.values())
    assert held == tensors(folder_of("moe") / "hf")


def test_a_second_run_keeps_what_is_there_and_a_change_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_megatron("llama", tmp_path / "megatron")
    assert convert(source, tmp_path / "out") == 0
    assert convert(source, tmp_path / "out") == 0
    assert "everything was there already" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out"), "--progress", "none"]) == 0, "by its own records"
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert main(["verify", str(tmp_path / "out"), "--progress", "none"]) == 76
    assert "model.safetensors" in capsys.readouterr().out
    assert convert(source, tmp_path / "out", "--level", "full", command="verify") == 76
    assert "lm_head.weight" in capsys.readouterr().out


def test_a_model_that_would_win_over_the_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers takes model.safetensors before an index, whatever else is there: what is not ours stays as it is."""
    source = save_megatron("llama", tmp_path / "megatron")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"of somebody else")
    assert convert(source, tmp_path / "out") != 0
    assert "model.safetensors" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"of somebody else"
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_model_of_somebody_else_beside_an_index_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ckpt2pt.kube.tensors.HuggingFaceRequest", partial(HuggingFaceRequest, shard_bytes=20_000))
    source = save_megatron("moe", tmp_path / "megatron")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"of somebody else")
    assert convert(source, tmp_path / "out") != 0
    assert "model.safetensors" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_files_of_a_tokenizer_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, tokenizer = save_megatron("llama", tmp_path / "megatron"), tmp_path / "tokenizer"
    tokenizer.mkdir()
    assert convert(source, tmp_path / "out", "--tokenizer-from", str(tokenizer)) == 66
    assert "no file of a tokenizer is there" in capsys.readouterr().err
    (tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
    (tokenizer / "secret.txt").write_text("not of a tokenizer")
    assert convert(source, tmp_path / "out", "--tokenizer-from", str(tokenizer)) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert not (tmp_path / "out" / "secret.txt").exists()


REFUSED = {
    "squared_relu": True,
    "rotary_percent": 0.5,
    "normalization": "LayerNorm",
    "window_size": (128, 0),
    "qk_l2_norm": True,
    "mtp_num_layers": 1,
    "position_embedding_type": "none",
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_no_class_computes_is_refused_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_megatron("llama", tmp_path / "megatron", **{name: REFUSED[name]})
    assert convert(source, tmp_path / "out") == 65
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_factor_that_programs_disagree_about_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_megatron("llama_tied_padded", tmp_path / "megatron", rope_scaling_factor=32.0)
    assert convert(source, tmp_path / "out", *words("llama_tied_padded")) == 66
    assert "--rope-scaling-factor" in capsys.readouterr().err
    assert convert(source, tmp_path / "out", *words("llama_tied_padded"), "--rope-scaling-factor", "32") == 0
    assert config(tmp_path / "out")["rope_scaling"]["factor"] == 32.0


def test_a_warning_names_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_megatron("llama_tied_padded", tmp_path / "megatron")
    assert convert(source, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "(--vocab-size cuts them)" in out
    assert config(tmp_path / "out")["vocab_size"] == 128


def test_the_library_converts_too(tmp_path: Path) -> None:
    source = save_megatron("llama_tied_padded", tmp_path / "megatron")
    ckpt2pt.convert(source=source, target=tmp_path / "out", target_format="safetensors", vocab_size=101)
    assert tensors(tmp_path / "out") == tensors(folder_of("llama_tied_padded") / "hf")


def test_options_that_decide_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_megatron("llama", tmp_path / "megatron")
    assert convert(source, tmp_path / "out", "--convert-param-only") == 0
    assert main(["plan", "--source", str(source), "--target", str(tmp_path / "x"), "--target-format", "torch_dist", "--vocab-size", "3"]) == 64  # fmt: skip
    assert "--vocab-size" in capsys.readouterr().err


def test_more_tokens_than_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_megatron("llama", tmp_path / "megatron")
    assert convert(source, tmp_path / "out", "--vocab-size", "129") == 65
    assert "--vocab-size is 129, and the embedding has 128 rows" in capsys.readouterr().err


def test_the_first_worker_lists_the_files_of_the_copies_that_it_compares(tmp_path: Path) -> None:
    """A later stage's norms are on both ranks, and no tensor of the first file is there."""
    source = golden_root() / "megatron06" / "b_tp2pp2" / "A"
    request = HuggingFaceRequest(
        source=source, target=tmp_path, full=False, topology=Topology(num_layers=1), shard_bytes=1
    )
    inputs = conversion_of(request, [0]).inputs
    assert {"mp_rank_00_001", "mp_rank_01_001"} <= {str(one["source"]).partition("/")[0] for one in inputs[0, 0]}
    assert len(inputs[1, 0]) < len(inputs[0, 0])
