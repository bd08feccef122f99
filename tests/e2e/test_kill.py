"""kill -9 at random moments: no final name ever holds partial bytes, and the end is as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from ckpt2pt.mapping.topology import Topology
from synthetic import Model, build

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

KILLS = 50
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    build(
        folder,
        Model(topology=Topology(num_layers=8, tensor=2, pipeline=2, virtual=2), hidden=384, ffn=1024, vocab=4096),
    )
    return folder


def command(checkpoint: Path, target: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "ckpt2pt", "convert", "--num-layers", "8", "--tp-size", "2", "--pp-size", "2", "--vpp-size", "2"),
        *("--ms-path", str(checkpoint / "ms"), "--param-map-path", str(checkpoint / "pt_meta"), "--megatron-path", str(target)),
        *("--process-limit", "2", "--progress", "none"),
    ]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.pt")}


def test_fifty_kills_and_the_result_is_byte_identical(checkpoint: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    subprocess.run(command(checkpoint, tmp_path / "undisturbed"), check=True, capture_output=True)
    duration = time.monotonic() - began
    expected = digests(tmp_path / "undisturbed")
    assert len(expected) == 8
    dice = random.Random(20261124)
    target, killed, finished = tmp_path / "out", 0, 0
    while killed < KILLS:
        process = subprocess.Popen(
            command(checkpoint, target), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(dice.uniform(0.05, 1.1 * duration))
        except subprocess.TimeoutExpired:
            killed += 1
        # The whole group or, every other time, the parent alone: its workers must notice and end by themselves.
        if process.returncode is None:
            (os.killpg if killed % 2 else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
        # Whatever has its final name is whole, at any moment.
        for name, digest in digests(target).items():
            assert digest == expected[name]
        for path in target.rglob("*.json"):
            json.loads(path.read_text())
        if (target / TRACKER).exists():
            assert digests(target) == expected
            finished += 1
            time.sleep(0.5)  # orphans of a parent killed alone
            subprocess.run(["rm", "-rf", str(target)], check=True)
    time.sleep(1)
    result = subprocess.run(command(checkpoint, target), check=True, capture_output=True, text=True)
    assert "published" in result.stdout
    assert digests(target) == expected
    assert not list(target.rglob("*.partial")), "a temporary file was left behind"
    for path in target.rglob("*.pt"):
        assert zipfile.ZipFile(path).testzip() is None


def test_of_two_runs_at_once_one_wins_and_the_other_says_why_not(checkpoint: Path, tmp_path: Path) -> None:
    both = [
        subprocess.Popen(
            command(checkpoint, tmp_path / "out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in both]
    assert sorted(process.returncode for process in both) == [0, 75], outputs
    loser = next(err for process, (_, err) in zip(both, outputs, strict=True) if process.returncode)
    assert "another run is converting this stage" in loser
    assert (tmp_path / "out" / TRACKER).read_text() == "500"
