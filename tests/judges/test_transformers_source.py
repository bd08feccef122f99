"""Models of real transformers 4.57 and 5, converted: real Megatron-LM 0.19 computes their logits, and the way back gives their bits.

The logits are float32 ones of some 5, of weights of the size that trained ones have: most mistakes hide behind freshly initialised weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt2pt.cli.commands import main
from goldens import REPOSITORY
from models_judged import MODELS

pytestmark = [pytest.mark.transformers, pytest.mark.timeout(300)]

RELEASES = ("4.57.6", "5.24.0")
PLACES = {**{release: f".venv-transformers/{release}" for release in RELEASES}, "megatron": ".venv-megatron/0.19.2"}
PROGRAM = REPOSITORY / "tests" / "support" / "models_judged.py"


class Judge:
    """A process in which one release stays imported."""

    def __init__(self, name: str, folder: Path) -> None:
        place = REPOSITORY / PLACES[name]
        if not (place / ".ready").exists():
            pytest.fail(f"{PLACES[name]} is not there: make transformers megatron")
        self.log = folder / f"{name}.log"
        given = {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, "megatron" if name == "megatron" else "transformers"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | given,
            )  # fmt: skip

    def ask(self, said: Path, **case: str) -> Any:
        """The logits, which are then in ``said``."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps({"said": str(said), **case}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        assert json.loads(line) == ""
        return np.load(said)["logits"]


@dataclass
class Born:
    """A model of transformers, and what became of it."""

    name: str
    release: str
    folder: Path
    logits: Any

    @property
    def said(self) -> str:
        """Which tokens, and what the model said of them."""
        return str(self.folder / "born.npz")

    def difference(self, judge: Judge, folder: str) -> float:
        """The largest of any logit."""
        found = judge.ask(self.folder / "found.npz", folder=str(self.folder / folder), given=self.said)
        return float(np.abs(found[..., : self.logits.shape[-1]] - self.logits).max())


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Judge]]:
    """All at once: they spend most of their time on imports."""
    folder = tmp_path_factory.mktemp("judges")
    started = {name: Judge(name, folder) for name in PLACES}
    yield started
    for judge in started.values():
        judge.process.kill()
        judge.process.communicate()


def convert(folder: Path, source: str, target: str, kind: str, *more: str) -> None:
    places = ["--source", str(folder / source), "--target", str(folder / target)]
    assert main(["convert", *places, "--target-format", kind, "--progress", "none", *more]) == 0


def born(name: str, release: str, folder: Path, judges: dict[str, Judge]) -> Born:
    said = folder / "born.npz"
    return Born(name, release, folder, judges[release].ask(said, folder=str(folder / "born"), name=name))


@pytest.fixture(scope="module", params=[(name, release) for name in MODELS for release in RELEASES], ids="-".join)
def model(request: pytest.FixtureRequest, judges: dict[str, Judge], tmp_path_factory: pytest.TempPathFactory) -> Born:
    name, release = request.param
    made = born(name, release, tmp_path_factory.mktemp("model"), judges)
    convert(made.folder, "born", "megatron", "megatron")
    convert(made.folder, "megatron", "back", "safetensors", "--vocab-size", str(MODELS[name]["vocab_size"]))
    return made


def tensors(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """By the documented layout of the file, without a library of ours."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entries = {name: entry for name, entry in json.loads(raw[8:start]).items() if name != "__metadata__"}
    return {
        name: (entry["dtype"], entry["shape"], raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]])
        for name, entry in entries.items()
    }


def test_megatron_says_what_transformers_said(model: Born, judges: dict[str, Judge]) -> None:
    assert np.abs(model.logits).max() > 3
    assert model.difference(judges["megatron"], "megatron") < 1e-5


def test_the_way_back_gives_every_bit(model: Born) -> None:
    assert tensors(model.folder / "back" / "model.safetensors") == tensors(model.folder / "born" / "model.safetensors")


@pytest.mark.parametrize("release", RELEASES)
def test_what_came_back_says_the_same(release: str, model: Born, judges: dict[str, Judge]) -> None:
    assert model.difference(judges[release], "back") < 1e-5


@pytest.mark.parametrize("release", RELEASES)
def test_the_judge_sees_another_base_of_the_rotary_embedding(
    release: str, judges: dict[str, Judge], tmp_path: Path
) -> None:
    """What it would not see, it could not prove."""
    made = born("llama_biases", release, tmp_path, judges)
    file = tmp_path / "born" / "config.json"
    config = json.loads(file.read_text())
    config.get("rope_parameters", config)["rope_theta"] = 10000.0
    file.write_text(json.dumps(config))
    convert(tmp_path, "born", "megatron", "megatron")
    assert made.difference(judges["megatron"], "megatron") > 0.01
