"""kill -9 at random moments: no final name ever holds partial bytes, and the end is as if nothing had happened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from handmade import Handmade
from sharding import Sharding
from synthetic import Model, build

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TRACKER = "latest_checkpointed_iteration.txt"
CUT = Topology(num_layers=8, tensor=2, pipeline=2, virtual=2)


@dataclass(frozen=True, kw_only=True)
class Road:
    """A command from one folder to another, what it writes, how many files, and what is there when all of them are."""

    words: Callable[[Path, Path], list[str]]
    pattern: str
    files: int
    marker: str
    kills: int


def flags(given: Mapping[str, object]) -> list[str]:
    return [str(word) for pair in given.items() for word in pair]


def convert(source: Path, target: Path) -> list[str]:
    cut = {"--num-layers": 8, "--tp-size": 2, "--pp-size": 2, "--vpp-size": 2, "--process-limit": 2}
    places = {"--ms-path": source / "ms", "--param-map-path": source / "pt_meta", "--megatron-path": target}
    return ["convert", *flags(cut), *flags(places)]


def relay(source: Path, target: Path) -> list[str]:
    layout = {"--target-tp-size": 1, "--target-pp-size": 4, "--target-vpp-size": 1, "--process-limit": 2}
    return ["convert", *flags({"--source": source / "A", "--target": target}), *flags(layout)]


def import_back(source: Path, target: Path) -> list[str]:
    return ["import", *flags({"--megatron-path": source / "A", "--ms-path": target, "--process-limit": 2})]


def combine(source: Path, target: Path) -> list[str]:
    places = {"--checkpoint-dir": source / "shards", "--strategy-dir": source / "shards" / "opt_shard_info"}
    return ["combine", *flags(places), *flags({"--output-dir": target, "--max-proccess-limit": 2})]


ROADS = {
    "convert": Road(words=convert, pattern="*.pt", files=8, marker=TRACKER, kills=50),
    "relayout": Road(words=relay, pattern="*.pt", files=8, marker=TRACKER, kills=10),
    "import": Road(words=import_back, pattern="*.[cp]*t", files=8, marker=".ckpt2pt/report.json", kills=15),
    "combine": Road(words=combine, pattern="*.ckpt", files=4, marker="", kills=15),
}


def command(road: str, source: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "ckpt2pt", *ROADS[road].words(source, target), "--progress", "none"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``ms`` and ``pt_meta``; the Megatron checkpoint that they become in ``A``; data-parallel shards in ``shards``."""
    folder = tmp_path_factory.mktemp("source")
    build(folder, Model(topology=CUT, hidden=384, ffn=1024, vocab=4096))
    subprocess.run(command("convert", folder, folder / "A"), check=True, capture_output=True)
    made = Handmade(replace(CUT, virtual=1, data=2), hidden=256, ffn=700, vocab=4096)
    Sharding(per_bucket=5).write(made, folder / "shards")
    return folder


def digests(folder: Path, pattern: str) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob(pattern)
        if path.is_file() and path.suffix != ".json"
    }


@pytest.mark.parametrize("road", ROADS)
def test_after_many_kills_the_result_is_byte_identical(road: str, checkpoint: Path, tmp_path: Path) -> None:
    way = ROADS[road]
    began = time.monotonic()
    subprocess.run(command(road, checkpoint, tmp_path / "undisturbed"), check=True, capture_output=True)
    duration = time.monotonic() - began
    expected = digests(tmp_path / "undisturbed", way.pattern)
    assert len(expected) == way.files
    dice = random.Random(20261124)
    target, killed = tmp_path / "out", 0
    while killed < way.kills:
        process = subprocess.Popen(
            command(road, checkpoint, target),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
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
        for name, digest in digests(target, way.pattern).items():
            assert digest == expected[name]
        for path in target.rglob("*.json"):
            json.loads(path.read_text())
        if (target / way.marker).exists() and (way.marker or len(digests(target, way.pattern)) == way.files):
            assert digests(target, way.pattern) == expected
            time.sleep(0.5)  # orphans of a parent killed alone
            subprocess.run(["rm", "-rf", str(target)], check=True)
    time.sleep(1)
    subprocess.run(command(road, checkpoint, target), check=True, capture_output=True)
    assert digests(target, way.pattern) == expected
    assert not list(target.rglob("*.partial")), "a temporary file was left behind"
    for path in target.rglob("*.pt"):
        assert zipfile.ZipFile(path).testzip() is None


OVER = {
    "another mode": (convert, ["--convert-param-only"], []),
    "--overwrite": (convert, ["--zero-consumed-samples"], ["--overwrite"]),
}
"""What an older result was made with, and what it is replaced with."""


@pytest.mark.parametrize("case", OVER)
def test_a_run_that_is_killed_while_it_replaces_a_result_leaves_the_old_one_or_the_new(
    case: str, checkpoint: Path, tmp_path: Path
) -> None:
    way, older, flags = OVER[case]
    quiet = ["--progress", "none", *flags]

    def run(target: Path, *more: str) -> None:
        words = [sys.executable, "-m", "ckpt2pt", *way(checkpoint, target), *more]
        subprocess.run(words, check=True, capture_output=True)

    run(tmp_path / "old", *older)
    began = time.monotonic()
    run(tmp_path / "new", *quiet)
    duration = time.monotonic() - began
    shutil.copytree(tmp_path / "old", tmp_path / "both")
    old, new = (digests(tmp_path / name, "iter_*/mp_rank_*/*.pt") for name in ("old", "new"))
    assert old != new
    dice = random.Random(20261130)
    killed, target = 0, tmp_path / "both"
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-m", "ckpt2pt", *way(checkpoint, target), *quiet],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            began = time.monotonic()
            process.wait(dice.uniform(0.3, 1.3) * duration)
            duration = min(duration, time.monotonic() - began)  # the first one may have been slow for another reason
        except subprocess.TimeoutExpired:
            killed += 1
            (os.killpg if killed % 2 else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(0.3)  # orphans of a parent killed alone
        assert digests(target, "iter_*/mp_rank_*/*.pt") in (old, new)
        assert (target / TRACKER).read_text() == "500"
        verified = subprocess.run(
            [sys.executable, "-m", "ckpt2pt", "verify", str(target)], capture_output=True, check=False
        )
        assert verified.returncode == 0, verified.stderr
        if digests(target, "iter_*/mp_rank_*/*.pt") == new:
            subprocess.run(["rm", "-rf", str(target)], check=True)
            shutil.copytree(tmp_path / "old", target)
    assert killed > 3
    run(target, *quiet)
    assert digests(target, "*.pt") == new
    assert sorted(path.name for path in target.iterdir()) == ["iter_0000500", TRACKER]


def test_of_two_runs_at_once_one_wins_and_the_other_says_why_not(checkpoint: Path, tmp_path: Path) -> None:
    both = [
        subprocess.Popen(
            command("convert", checkpoint, tmp_path / "out"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in both]
    assert sorted(process.returncode for process in both) == [0, 75], outputs
    loser = next(err for process, (_, err) in zip(both, outputs, strict=True) if process.returncode)
    assert "another run is converting this stage" in loser
    assert (tmp_path / "out" / TRACKER).read_text() == "500"
