"""Files of other programs are said to be what they are, with exit code 65, by every command that reads checkpoints."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ckpt2pt.cli.commands import main
from ckpt2pt.io.foreign import HEAD_BYTES, recognise
from ckptfiles import Tensor, ckpt, safe, some_tensors


def legacy() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return stream.getvalue()


def numpy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


PARAM_MAP = json.dumps({"module.language_model.a.weight": ["torch.bfloat16", [1, 2], 0, 2, 0]}).encode()
FILES = {
    "gguf": (b"GGUF\3\0\0\0" + bytes(100), "a GGUF file"),
    "json": (b'{"a": 1}', "a JSON document"),
    "json-with-space": (b'\r\n  [1, "\xc3\xa4"]', "a JSON document"),
    "long-json": (json.dumps(["ä" * 2000]).encode(), "a JSON document"),
    "long-text": ("ä".encode() * 1000, "a text"),
    "param-map": (PARAM_MAP, "a param map"),
    "index": (b'{"metadata": {}, "weight_map": {"a": "b"}}', "an index of Hugging Face shards"),
    "text": (b"hello\tworld\n", "a text"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "legacy-torch": (legacy(), "torch before 1.6"),
    "pickle": (pickle.dumps([1], protocol=4), "a bare pickle"),
    "tar": (tar(), "tar archive"),
    "numpy": (numpy(), "an array of numpy"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "gzip": (b"\x1f\x8b\x08" + bytes(99), "compressed with gzip"),
}


@pytest.mark.parametrize("suffix", ["ckpt", "bin", "pt"])
@pytest.mark.parametrize(("data", "what"), FILES.values(), ids=FILES)
def test_each_is_named(data: bytes, what: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    for command in (["inspect", str(path)], ["verify", str(path), str(path)]):
        assert main(command) == 65
        shown = capsys.readouterr().err
        assert what in shown
        assert "ckpt2pt reads .ckpt and .safetensors files of MindSpore, and .pt files of torch" in shown
        assert "incomplete" not in shown


@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
@pytest.mark.parametrize(("data", "what"), FILES.values(), ids=FILES)
def test_in_the_place_of_megatrons_file_as_well(
    data: bytes, what: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "iter_0000001" / "mp_rank_00"
    place.mkdir(parents=True)
    torch.save(
        {"iteration": 1, "model": {"language_model": {"encoder": {"final_norm.weight": torch.ones(4)}}}},
        place / "model_optim_rng.pt",
    )
    (place / name).write_bytes(data)
    assert main(["pt-meta", "--megatron-path", str(tmp_path), "--param-map-path", str(tmp_path / "meta")]) == 65
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("write", [ckpt, safe], ids=["ckpt", "safetensors"])
def test_checkpoints_of_mindspore_are_none_of_them(write: object, tmp_path: Path) -> None:
    data = write(some_tensors())  # type: ignore[operator]
    assert recognise(data[:HEAD_BYTES]) == ("" if write is ckpt else recognise(data[:HEAD_BYTES]))
    path = tmp_path / "x.ckpt"
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == 0


def test_a_distributed_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp"):
        torch.save(torch.zeros(2), folder / name)
    (folder / ".metadata").write_bytes(pickle.dumps({}))
    torch.save({}, folder / "common.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    for path in (folder, tmp_path):
        assert main(["inspect", str(path)]) == 65
        assert "the index of the checkpoint cannot be read" in capsys.readouterr().err
    assert main(["inspect", str(folder / "__0_0.distcp")]) == 65
    assert "a part of a distributed checkpoint" in capsys.readouterr().err
    assert main(["import", "--megatron-path", str(tmp_path), "--ms-path", str(tmp_path / "out")]) == 65
    assert "the index of the checkpoint cannot be read" in capsys.readouterr().err
    assert main(["pt-meta", "--megatron-path", str(tmp_path), "--param-map-path", str(tmp_path / "out")]) == 65
    assert "this is a distributed checkpoint (torch_dist, .distcp files)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_of_hugging_face_are_named_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = [
        Tensor(f"model.layers.0.{name}.weight", "float32", (2,), bytes(8))
        for name in ("self_attn.q_proj", "input_layernorm")
    ]
    (tmp_path / "model.safetensors").write_bytes(safe(tensors))
    assert main(["inspect", str(tmp_path / "model.safetensors")]) == 0
    assert "Hugging Face weights (.safetensors)" in capsys.readouterr().out
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "pytorch_model.bin" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "pytorch_model.bin")]) == 0
