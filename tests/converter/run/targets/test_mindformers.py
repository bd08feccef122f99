"""Weights for MindFormers: what came from there and went to Megatron-LM comes back bit for bit; of several files; refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.foldernames import TRACKER
from ckpt2pt.run.targets.request import MindFormersRequest
from goldens import golden_root
from mindformers_made import LAUNCH, Model, save

Arrays = dict[str, npt.NDArray[Any]]
_DTYPES = {"F32": "<f4", "BF16": "<u2", "I32": "<i4", "I64": "<i8"}


def convert(source: Path, target: Path, *more: str, to: str = "mindformers", command: str = "convert") -> int:
    words = ["--source", str(source), "--target", str(target), "--target-format", to, "--progress", "none"]
    return main([command, *words[: 6 if command == "plan" else 8], *more])


def tensors(folder: Path) -> Arrays:
    """Every tensor by the documented layout of the files, without a library of ours."""
    found: Arrays = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name == "__metadata__":
                assert entry == {"format": "ms"}
                continue
            begin, end = entry["data_offsets"]
            assert name not in found
            held = np.frombuffer(raw[start + begin : start + end], _DTYPES[entry["dtype"]])
            found[name] = held.reshape(entry["shape"])
    return found


def rounded(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """float32 as it is when it was bfloat16 in between."""
    bits = array.view("u4").astype("u8")
    found: npt.NDArray[Any] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype("u4").view("f4")
    return found


def words(trainer: str, *, interleaved: bool, contiguous: bool, latent: bool = False) -> list[str]:
    if trainer == "pynative":
        return []
    said = ["--use-interleaved-weight-layout-mlp", str(interleaved).lower()]
    return said if latent else [*said, "--use-contiguous-weight-layout-attention", str(contiguous).lower()]


@pytest.mark.parametrize("form", ["torch_dist", "megatron"])
@pytest.mark.parametrize("kind", ["dense", "experts", "latent"])
@pytest.mark.parametrize(
    ("trainer", "interleaved", "contiguous"),
    [("pynative", True, False), ("graph", True, False), ("graph", False, True)],
)
def test_what_came_from_mindformers_comes_back(
    tmp_path: Path, form: str, kind: str, trainer: str, interleaved: bool, contiguous: bool
) -> None:
    latent = kind == "latent"
    model = Model(
        experts=0 if kind == "dense" else 4, latent=latent, mtp=latent, interleaved=interleaved,
        contiguous=contiguous and not latent, pynative=trainer == "pynative", optimizer=False,
    )  # fmt: skip
    save(tmp_path / "in", model.arrays)
    more = "" if kind == "dense" else " --num-experts 4 --moe-ffn-hidden-size 12"
    if latent:
        more += " --multi-latent-attention --q-lora-rank 6 --kv-lora-rank 4 --mtp-num-layers 1"
    (tmp_path / "launch.sh").write_text(LAUNCH + more)
    said = words(trainer, interleaved=interleaved, contiguous=contiguous, latent=latent)
    there = ["--param-map-path", str(tmp_path / "launch.sh"), "--convert-param-only", *said]
    assert convert(tmp_path / "in", tmp_path / "mid", *there, to=form) == 0
    back = ["--mindformers-trainer", trainer, *said]
    assert convert(tmp_path / "mid", tmp_path / "out", *back, command="plan") == 0
    assert convert(tmp_path / "mid", tmp_path / "out", *back, "--verify", "full") == 0
    assert convert(tmp_path / "mid", tmp_path / "out", *back, "--level", "full", command="verify") == 0
    folder = tmp_path / "out" / "iteration_00000003"
    found = tensors(folder)
    counters = ("fi_accu", "tokens_per_expert", "expert_load")
    expected = {name: array for name, array in model.arrays.items() if not name.endswith(counters)}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        exact = array.dtype == np.uint16 or name.endswith("expert_bias")
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array if exact else rounded(array)), name
    assert (tmp_path / "out" / TRACKER).read_text() == "3"
    assert json.loads((folder / "common.json").read_text())["global_step"] == 3


@pytest.mark.parametrize("name", ["qwen3_pynative_1rank", "dsv3_pynative_1rank"])
def test_what_the_real_writer_saved_comes_back(tmp_path: Path, name: str) -> None:
    folder = golden_root() / "mindformers" / name
    config = json.loads((folder / "config.json").read_text())
    sizes = ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "num_query_groups"]
    sizes += ["moe_ffn_hidden_size", "q_lora_rank", "kv_lora_rank", "mtp_num_layers"] if "dsv3" in name else []
    launch = " ".join(word for word in LAUNCH.split() if word != "--qk-layernorm" or "qwen3" in name)
    launch += "".join(f" --{size.replace('_', '-')} {config[size]}" for size in sizes) + " --vocab-size 128"
    launch += " --num-experts 4 --multi-latent-attention" if "dsv3" in name else ""
    (tmp_path / "launch.sh").write_text(launch)
    there = ["--param-map-path", str(tmp_path / "launch.sh"), "--convert-param-only"]
    assert convert(folder / "checkpoint", tmp_path / "mid", *there, to="torch_dist") == 0
    assert convert(tmp_path / "mid", tmp_path / "out", "--verify", "full") == 0
    expected = {
        name: array
        for name, array in tensors(folder / "checkpoint" / "iteration_00000003").items()
        if not name.startswith(("adam_", "main_param.")) and "." in name and not name.endswith("tokens_per_expert")
    }
    found = tensors(tmp_path / "out" / "iteration_00000003")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        exact = array.dtype == np.uint16 or name.endswith("expert_bias")
        assert np.array_equal(found[name], array if exact else rounded(array)), name


@pytest.fixture
def megatron(tmp_path: Path) -> Path:
    """Weights of a small mixture of experts, on one rank."""
    save(tmp_path / "in", Model(experts=4, pynative=True, optimizer=False).arrays)
    (tmp_path / "launch.sh").write_text(LAUNCH + " --num-experts 4 --moe-ffn-hidden-size 12")
    there = ["--param-map-path", str(tmp_path / "launch.sh"), "--convert-param-only"]
    assert convert(tmp_path / "in", tmp_path / "mid", *there, to="torch_dist") == 0
    return tmp_path / "mid"


def test_stages_divide_the_files_and_metadata_says_which_holds_what(
    megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert convert(megatron, tmp_path / "one") == 0
    monkeypatch.setattr("ckpt2pt.kube.tensors.MindFormersRequest", partial(MindFormersRequest, shard_bytes=1500))
    stages = ["--tp-size", "1", "--pp-size", "2"]
    assert convert(megatron, tmp_path / "out", *stages, "--stage", "1") == 65, "the sizes are those of the source"
    assert convert(megatron, tmp_path / "out", "--verify", "full") == 0
    folder = tmp_path / "out" / "iteration_00000003"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert names == [f"checkpoint-model-{k:07d}-{len(names):07d}.safetensors" for k in range(len(names))]
    assert len(names) > 3
    one, several = tensors(tmp_path / "one" / "iteration_00000003"), tensors(folder)
    assert {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in several.items()}
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["state_dict_metadata"].keys() == one.keys()
    assert not (tmp_path / "one" / "iteration_00000003" / "metadata.json").exists()
    with ckpt2pt.open(tmp_path / "out") as left, ckpt2pt.open(megatron) as right:
        assert sorted(left.keys()) == sorted(right.keys())
        assert all(np.array_equal(left[name], right[name]) for name in left)
    assert convert(megatron, tmp_path / "out") == 0, "again"


def test_an_older_result_stays_until_it_is_to_be_replaced(megatron: Path, tmp_path: Path) -> None:
    assert convert(megatron, tmp_path / "out") == 0
    said = ["--mindformers-trainer", "graph", *words("graph", interleaved=True, contiguous=False)]
    assert convert(megatron, tmp_path / "out", *said) == 64
    assert convert(megatron, tmp_path / "out", *said, "--overwrite") == 0
    assert tensors(tmp_path / "out" / "iteration_00000003")["output_layer.weight"].dtype == np.float32


def test_what_a_static_graph_needs_is_asked_for(
    megatron: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(megatron, tmp_path / "out", "--mindformers-trainer", "graph") == 64
    said = capsys.readouterr().err
    assert "nothing in the result says how the rows" in said
    assert "--mindformers-config" in said
    (tmp_path / "train.yaml").write_text("model: {model_config: {num_layers: 5}}")
    config = ["--mindformers-config", str(tmp_path / "train.yaml")]
    assert convert(megatron, tmp_path / "out", "--mindformers-trainer", "graph", *config) == 65, "of another model"
    assert convert(megatron, tmp_path / "out", "--use-interleaved-weight-layout-mlp", "false") == 64
    assert "is of a training in PyNative mode" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_mindformers_has_no_place_for_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = golden_root() / "mcore" / "0.19.0" / "moe_ep2"
    assert convert(tmp_path, tmp_path / "out") != 0
    save(tmp_path / "in", Model(pynative=True).arrays)
    assert convert(tmp_path / "in", tmp_path / "out") == 64, "it is one of MindFormers"
    assert "is a MindFormers checkpoint, of which no result for MindFormers" in capsys.readouterr().err
    assert convert(source, tmp_path / "of-two", "--verify", "full") == 0
