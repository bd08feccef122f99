"""A checkpoint that is not read is named, with what its owner does next; what is read is never taken for one."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.errors import UnsupportedFormatError
from ckpt2pt.formats.families import FAMILIES, family_of, kind_of_tensors, refuse_unsupported
from ckpt2pt.formats.registry import detect


def safetensors(*names: str) -> bytes:
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4 * len(names))


SIGNS: dict[str, tuple[dict[str, bytes], str]] = {
    "gguf": ({"model-q4.gguf": b"GGUF\3\0\0\0"}, "a GGUF file"),
    "deepspeed, its root": ({"global_step500/mp_rank_00_model_states.pt": b"", "latest": b"global_step500"}, "a DeepSpeed checkpoint"),
    "deepspeed, its optimizer": (
        {"global_step500/bf16_zero_pp_rank_3_mp_rank_01_optim_states.pt": b""}, "a DeepSpeed checkpoint",
    ),
    "deepspeed, its stages": ({"layer_00-model_01-model_states.pt": b""}, "a DeepSpeed checkpoint"),
    "deepspeed, one step": ({"zero_pp_rank_0_mp_rank_00_model_states.pt": b""}, "a DeepSpeed checkpoint"),
    "zarr, its arrays": ({"iter_0000500/decoder.final_layernorm.weight/.zarray": b"{}"}, "a distributed checkpoint in zarr"),
    "zarr, by its name": ({"metadata.json": b'{"sharded_backend": "zarr"}'}, "a distributed checkpoint in zarr"),
    "lora of peft": ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "a LoRA adapter"),
    "lora of mindformers": ({"iteration_00000003/x": b"", "mindformers_adapter_config.json": b"{}"}, "a LoRA adapter"),
    "lora by its tensors": ({"rank_0/a.safetensors": safetensors("layers.0.linear_qkv.lora_A.weight")}, "a LoRA adapter"),
    "quantised, by its configuration": (
        {"config.json": b'{"quantization_config": {"quant_method": "fp8"}}', "model.safetensors": b""}, "a quantised checkpoint",
    ),
    "quantised, by its tensors": ({"rank_0/a.safetensors": safetensors("layers.0.mlp.qweight")}, "a quantised checkpoint"),
    "hugging face, pickles": (
        {"config.json": b"{}", "pytorch_model.bin": b""}, r"a Hugging Face model in pickles \(pytorch_model\.bin\)",
    ),
    "hugging face, pickled shards": ({"pytorch_model.bin.index.json": b"{}"}, "a Hugging Face model in pickles"),
    "experts of core-ms": (
        {"rank_0/a.safetensors": safetensors("language_model.encoder.layers.0.mlp.experts.local_experts.0.mapping.weight")},
        "a mixture of experts of MindSpeed-Core-MS",
    ),
}  # fmt: skip


def laid_out(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize(("files", "name"), SIGNS.values(), ids=SIGNS)
def test_a_family_that_is_not_read_is_named_with_the_next_step(
    tmp_path: Path, files: dict[str, bytes], name: str
) -> None:
    with pytest.raises(UnsupportedFormatError, match=f"this is {name}") as caught:
        detect(laid_out(tmp_path, files))
    assert caught.value.exit_code == 65
    assert caught.value.where == str(tmp_path)
    assert caught.value.hint in {family.hint for family in FAMILIES}


@pytest.mark.parametrize("command", ["inspect", "convert", "plan", "import"])
@pytest.mark.parametrize("case", ["gguf", "lora of peft", "zarr, its arrays"])
def test_every_command_names_it(command: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, name = SIGNS[case]
    source = str(laid_out(tmp_path / "in", files))
    words = [source] if command == "inspect" else ["--source", source, "--target", str(tmp_path / "out")]
    assert main([command, *words]) == 65
    assert f"this is {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_is_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laid_out(tmp_path, {"m.gguf": b"GGUF\3\0\0\0"})
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 65
    assert "hint:  give the checkpoint that it was made from" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["__0_0.distcp", "network.ckpt", "model_optim_rng.pt"])
def test_a_single_file_asks_for_its_folder_and_not_for_metadata(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    laid_out(tmp_path, {name: b""})
    assert main(["convert", "--source", str(tmp_path / name), "--target", str(tmp_path / "out")]) == 65
    assert "this is a file, and a checkpoint is read with the files of all its ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files",
    [
        {"rank_0/network.ckpt": b""},
        {"iter_0000002/mp_rank_00/model_optim_rng.pt": b"", "latest_checkpointed_iteration.txt": b"2"},
        {"iter_0000002/.metadata": b"", "iter_0000002/metadata.json": b'{"sharded_backend": "torch_dist"}'},
        {"config.json": b"{}"},
        {"metadata.json": b"\xff\xfe no JSON"},
        {"latest": b""},
        {"config.json": b"{}", "model.safetensors": b"", "pytorch_model.bin": b""},
        {"model.safetensors.index.json": b"{}"},
        {"iteration_00000003/common.json": b"{}"},
        {"qwen3-model-0000000-0000004.safetensors": b""},
    ],
    ids=str,
)
def test_what_is_read_or_unknown_is_of_no_family(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert family_of(laid_out(tmp_path, files)) is None


def test_without_its_contents_no_file_is_opened(tmp_path: Path) -> None:
    laid_out(tmp_path, SIGNS["lora by its tensors"][0])
    refuse_unsupported(tmp_path, contents=False)
    with pytest.raises(UnsupportedFormatError):
        refuse_unsupported(tmp_path)


def test_what_is_to_come_is_of_no_family(tmp_path: Path) -> None:
    assert family_of(tmp_path / "none") is None


def test_a_file_that_is_written_again_is_looked_at_again(tmp_path: Path) -> None:
    file = tmp_path / "rank_0" / "a.safetensors"
    laid_out(tmp_path, {"rank_0/a.safetensors": safetensors("decoder.layers.0.x")})
    assert family_of(tmp_path) is None
    file.write_bytes(safetensors("decoder.layers.0.x", "decoder.layers.0.x.lora_A.weight"))
    assert family_of(tmp_path) is not None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "Hugging Face weights"),
        ("model.layers.1.mlp.experts.3.gate_proj.weight", "Hugging Face weights"),
        ("model.norm.weight", "Hugging Face weights"),
        ("transformer.h.0.attn.c_attn.weight", "Hugging Face weights"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA adapter"),
        ("model.layers.0.mlp.down_proj.qweight", "quantised weights"),
        ("adam_v.embedding.word_embeddings.weight", "MindFormers checkpoint"),
        ("language_model.encoder.layers.0.input_norm.weight", "MindSpore checkpoint"),
        ("decoder.layers.0.mlp.linear_fc1.weight", "MindSpore checkpoint"),
    ],
)
def test_a_single_file_is_reported_by_its_tensors(name: str, kind: str) -> None:
    assert kind_of_tensors([name]) == kind
