"""Results that we write, loaded by real transformers 4.57 and 5 on the CPU: no key missing or unexpected, the logits of real Megatron-LM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ckpt2pt.cli.commands import main
from goldens import REPOSITORY, golden_root
from hfsets import SETS, TOKENS, folder_of, save_megatron
from mindformers_made import save

pytestmark = [pytest.mark.transformers, pytest.mark.timeout(300)]

ENVIRONMENTS = REPOSITORY / ".venv-transformers"
RELEASES = ("4.57.6", "5.24.0")
PROGRAM = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
import transformers

folder, expected = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32)
wanted = np.load(expected)
with torch.no_grad():
    logits = model.eval()(torch.from_numpy(wanted["ids"]).long()).logits.numpy()
difference = float(np.abs(logits - wanted["logits"][..., :logits.shape[-1]]).max()) if "logits" in wanted else -1.0
left = {key: sorted(map(str, value)) for key, value in info.items() if value}
print(json.dumps([transformers.__version__, type(model).__name__, difference, left, list(logits.shape)]))
"""


def judged(release: str, folder: Path, expected: Path) -> list[object]:
    place = ENVIRONMENTS / release
    if not (place / ".ready").exists():
        pytest.fail(f"transformers {release} is not there: make transformers")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, expected],
        env={"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "HOME": str(folder.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module", params=SETS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    save_megatron(name, folder / "megatron")
    tokens = ["--vocab-size", str(TOKENS[name])] if name in TOKENS else []
    words = ["convert", "--source", str(folder / "megatron"), "--target", str(folder / "hf"), "--progress", "none"]
    assert main([*words, "--target-format", "safetensors", *tokens]) == 0
    return name, folder / "hf"


@pytest.mark.parametrize("release", RELEASES)
def test_the_logits_are_those_of_megatron(release: str, exported: tuple[str, Path]) -> None:
    name, folder = exported
    version, architecture, difference, left, shape = judged(release, folder, folder_of(name) / "expected.npz")
    assert version == release
    assert [architecture] == json.loads((folder / "config.json").read_text())["architectures"]
    assert left == {}
    assert isinstance(difference, float)
    assert difference < 1e-5
    assert shape == [2, 16, TOKENS.get(name, 128)] or name == "qwen3_moe"


def test_the_judge_sees_a_wrong_configuration(exported: tuple[str, Path], tmp_path: Path) -> None:
    """What it would not see, it could not prove: another base of the rotary embedding."""
    name, folder = exported
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": config["rope_theta"] / 2}))
    difference = judged(RELEASES[0], tmp_path, folder_of(name) / "expected.npz")[2]
    assert isinstance(difference, float)
    assert difference > 1e-5


TRAININGS = {
    "0.19.0/odd_dp2": "GPT2LMHeadModel",
    "0.19.0/moe_ep2": "MixtralForCausalLM",
    "0.19.0/qwen_tp1pp1": "Qwen3ForCausalLM",
    "0.8.0/llama_tp2pp2": "LlamaForCausalLM",
}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", [name for name in TRAININGS if (golden_root() / "mcore" / name).is_dir()])
def test_real_trainings_load_without_a_key_too_few_or_too_many(name: str, release: str, tmp_path: Path) -> None:
    """Of classes whose logits nobody computed: the names and shapes of every parameter, and that it computes."""
    source = golden_root() / "mcore" / name
    words = ["convert", "--source", str(source), "--target", str(tmp_path / "hf"), "--progress", "none"]
    assert main([*words, "--target-format", "safetensors"]) == 0
    np.savez(tmp_path / "ids.npz", ids=np.arange(16).reshape(2, 8))
    _, architecture, _, left, shape = judged(release, tmp_path / "hf", tmp_path / "ids.npz")
    assert architecture == TRAININGS[name]
    assert left == {}
    assert isinstance(shape, list)
    assert shape[:2] == [2, 8]


SCRIPT = (
    "torchrun pretrain_gpt.py --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --kv-channels 8 --qk-layernorm --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --position-embedding-type rope --rotary-base 10000 --norm-epsilon 1e-6 "
    "--max-position-embeddings 64 --seq-length 16 --micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --train-iters 3"
)


@pytest.mark.parametrize(("interleaved", "alike"), [("true", True), ("false", False)])
def test_the_logits_are_those_of_mindformers(interleaved: str, alike: bool, tmp_path: Path) -> None:
    """Its PyNative Qwen3, whose kernels for Ascend were replaced: Megatron-LM 0.12.1 with these weights differs by 0.012 of 4.5."""
    given = np.load(golden_root() / "mindformers" / "qwen3_logits" / "weights_ids_logits.npz")
    save(tmp_path / "mf", {name: given[name] for name in given.files if name not in {"ids", "logits"}})
    np.savez(tmp_path / "expected.npz", ids=given["ids"], logits=given["logits"].reshape(2, 16, 128))
    (tmp_path / "pretrain.sh").write_text(SCRIPT)
    words = ["convert", "--source", str(tmp_path / "mf"), "--target", str(tmp_path / "hf"), "--progress", "none"]
    words += ["--target-format", "safetensors", "--param-map-path", str(tmp_path / "pretrain.sh")]
    words += ["--use-interleaved-weight-layout-mlp", interleaved, "--use-contiguous-weight-layout-attention", "false"]
    assert main(words) == 0
    _, architecture, difference, left, _ = judged(RELEASES[0], tmp_path / "hf", tmp_path / "expected.npz")
    assert (architecture, left) == ("Qwen3ForCausalLM", {})
    assert isinstance(difference, float)
    assert (difference < 0.013) is alike
