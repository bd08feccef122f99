"""A run that was stopped, or orphaned, and goes on behind another one's back: never a mixture of two under a tracker."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from synthetic import Model, build
from workers import alive, children, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TRACKER = "latest_checkpointed_iteration.txt"
NO_LOCKS = """
import errno, fcntl


def flock(fd, operation):
    raise OSError(errno.ENOLCK, "No locks available")


fcntl.flock = flock
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    build(
        folder, Model(topology=Topology(num_layers=8, tensor=2, pipeline=2, virtual=2), hidden=64, ffn=128, vocab=512)
    )
    return folder


@pytest.fixture
def environment(tmp_path: Path, locks: bool) -> dict[str, str]:
    """That of a machine with or without locks, worker processes included."""
    if locks:
        return dict(os.environ)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_LOCKS)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


def begin(source: Path, target: Path, environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    """A conversion in a process group of its own."""
    words = ["--num-layers", "8", "--tp-size", "2", "--pp-size", "2", "--vpp-size", "2", "--process-limit", "2"]
    places = [
        "--ms-path",
        str(source / "ms"),
        "--param-map-path",
        str(source / "pt_meta"),
        "--megatron-path",
        str(target),
    ]
    command = [sys.executable, "-m", "ckpt2pt", "convert", *words, *places, "--progress", "none", *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=pipe, stderr=pipe, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def prove(target: Path) -> None:
    """One whole result under the tracker, and nothing besides."""
    assert (target / TRACKER).read_text() == "500"
    done = subprocess.run(
        [sys.executable, "-m", "ckpt2pt", "verify", str(target)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


OTHERS = {
    "options": ("--convert-param-only", "--overwrite"),
    "the-same": (),
}


@pytest.mark.parametrize("locks", [False, True], ids=["no-locks", "locks"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_stopped_run_that_goes_on_writes_nothing_into_anothers_result(
    other: str,
    locks: bool,
    source: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    dice = random.Random(20261129)
    began = time.monotonic()
    assert end(begin(source, tmp_path / "undisturbed", environment))[0] == 0
    duration = time.monotonic() - began
    for number in range(4):
        target = tmp_path / f"out-{number}"
        first = begin(source, target, environment)
        time.sleep(dice.uniform(0.2, 0.95) * duration)
        os.killpg(first.pid, signal.SIGSTOP)
        second = begin(source, target, environment, *OTHERS[other])
        code, said = end(second)
        # With locks whoever comes second is refused while the first has a stage; without them nobody can know.
        assert code in ({0, 64, 75} if locks else {0, 64}), said
        os.killpg(first.pid, signal.SIGCONT)
        late, reported = end(first)
        assert late in {0, 64, 75}, reported
        assert "Traceback" not in reported
        if code and late:
            assert end(begin(source, target, environment, *OTHERS[other]))[0] == 0
        prove(target)


@pytest.mark.parametrize("locks", [False, True], ids=["no-locks", "locks"])
def test_of_two_that_race_to_replace_a_result_one_is_whole(
    locks: bool,
    source: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    target = tmp_path / "out"
    assert end(begin(source, target, environment))[0] == 0
    kinds = [("--convert-param-only", "--overwrite"), ("--zero-consumed-samples", "--overwrite")]
    for _ in range(4):
        both = [begin(source, target, environment, *kind) for kind in kinds]
        ends = [end(process) for process in both]
        assert {code for code, _ in ends} <= {0, 75}, ends
        assert all("Traceback" not in reported for _, reported in ends)
        prove(target)
    assert end(begin(source, target, environment, *kinds[0]))[0] == 0
    prove(target)
    assert sorted(path.name for path in target.iterdir()) == ["iter_0000500", TRACKER]


@pytest.mark.parametrize("locks", [True], ids=["locks"])
def test_a_rerun_right_after_a_kill_works_and_no_worker_outlives_its_run(
    source: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    for number in range(4):
        target = tmp_path / f"out-{number}"
        first = begin(source, target, environment)
        wait_for(lambda process=first: len(children(process.pid)) > 1)  # type: ignore[misc]
        time.sleep(0.1 * number)
        workers = children(first.pid)
        os.kill(first.pid, signal.SIGKILL)
        code, said = end(begin(source, target, environment))
        assert code == 0, said
        first.communicate(timeout=60)
        assert not [pid for pid in workers if alive(pid)]
        prove(target)
        assert not list(target.rglob("*.partial"))
