"""Results that we write, loaded by real transformers 4.57 and 5 on the CPU: no key missing or unexpected, the logits of real Megatron-LM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main
from goldens import REPOSITORY
from hfsets import SETS, TOKENS, folder_of, save_megatron

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
difference = float(np.abs(logits - wanted["logits"][..., :logits.shape[-1]]).max())
left = {key: sorted(map(str, value)) for key, value in info.items() if value}
print(json.dumps([transformers.__version__, type(model).__name__, difference, left, list(logits.shape)]))
"""


def judged(release: str, folder: Path, name: str) -> list[object]:
    place = ENVIRONMENTS / release
    if not (place / ".ready").exists():
        pytest.fail(f"transformers {release} is not there: make transformers")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, folder_of(name) / "expected.npz"],
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
    version, architecture, difference, left, shape = judged(release, folder, name)
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
    difference = judged(RELEASES[0], tmp_path, name)[2]
    assert isinstance(difference, float)
    assert difference > 1e-5
