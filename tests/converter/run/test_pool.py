"""Ranks at work: late, stopped, killed.  Every end is received."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from ckpt2pt.discover.request import Pace
from ckpt2pt.engine import write as engine
from ckpt2pt.engine.casts import Cast, find_cast
from ckpt2pt.errors import Ckpt2ptError, TimedOutError, TooManyFilesError, TryAgainError
from ckpt2pt.publish import TRACKER
from ckpt2pt.run.conversion import run
from ckpt2pt.run.pool import stopped_by_signals, work_through
from conversions import Quiet, flags_for, request_for
from loggers import Talking
from workers import children, wait_for


@pytest.fixture
def pipelined(golden: Path) -> Path:
    return golden / "megatron06" / "j_tp1pp2dp2"


def command(folder: Path, target: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "ckpt2pt", "convert", *flags_for(folder, target), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.pt")}


def test_a_rank_that_takes_too_long_ends_the_run(
    pipelined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = find_cast

    def slow(source: str, target: str) -> Cast | None:
        time.sleep(0.1)
        return real(source, target)

    monkeypatch.setattr(engine, "find_cast", slow)
    with pytest.raises(TimedOutError, match=r"0\.3 seconds"):
        run(request_for(pipelined, tmp_path, timeout=0.3), range(2), Quiet())
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_75_and_the_next_run_finishes(
    pipelined: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run(request_for(pipelined, tmp_path / "undisturbed"), range(2), Quiet())
    process = subprocess.Popen(command(pipelined, tmp_path / "out", "--process-limit", "2"), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not list((tmp_path / "out").rglob("*.lock")) and time.monotonic() < deadline:
        time.sleep(0.005)
    began = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - began < 6
    assert process.returncode in {75, 0}
    if process.returncode:
        assert number.name in stderr.decode()
    assert not list((tmp_path / "out").rglob("*.partial"))
    subprocess.run(command(pipelined, tmp_path / "out"), check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def at_work(folder: Path, target: Path) -> subprocess.Popen[str]:
    """A conversion in a group of its own, as in a terminal; its first worker has just been started."""
    words = command(folder, target, "--process-limit", "2")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: len(children(process.pid)) > 1)  # the first child is multiprocessing's tracker of resources
    return process


@pytest.mark.parametrize("seconds", [0, 0.05, 0.1])
def test_an_interrupt_at_a_terminal_is_reported_once_and_blames_nobody(
    seconds: float, pipelined: Path, tmp_path: Path
) -> None:
    process = at_work(pipelined, tmp_path / "out")
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    [error] = [line for line in stderr.splitlines() if not line.startswith("{")][:1]
    assert (process.returncode, error) == (75, "ckpt2pt: stopped by SIGINT")
    assert "Traceback" not in stderr
    assert "memory" not in stderr


def test_workers_whose_parent_was_killed_end_in_silence(pipelined: Path, tmp_path: Path) -> None:
    process = at_work(pipelined, tmp_path / "out")
    process.kill()
    _, stderr = process.communicate(timeout=20)
    assert "BrokenPipeError" not in stderr
    assert "pool.py" not in stderr


def test_a_worker_that_is_killed_is_not_taken_for_done(pipelined: Path, tmp_path: Path) -> None:
    request = replace(request_for(pipelined, tmp_path), in_process=False, workers=2)

    over = threading.Event()

    class Killer(Quiet):
        def begin(self, totals: object, iteration: int) -> None:
            threading.Thread(target=self.kill, daemon=True).start()

        def kill(self) -> None:
            while not over.wait(0.001):
                for child in multiprocessing.active_children():
                    child.kill()

        def close(self) -> None:
            over.set()

    with pytest.raises(TryAgainError, match=r"exit code -9|died as it was started"):
        run(request, range(2), Killer())
    assert not (tmp_path / TRACKER).exists()


def test_a_worker_that_is_killed_as_it_is_started_is_said_to_have_died(
    pipelined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(process: SpawnProcess) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # of the pipe through which it gets its work

    monkeypatch.setattr(SpawnProcess, "start", start)
    with pytest.raises(TryAgainError, match="died as it was started"):
        run(request_for(pipelined, tmp_path, in_process=False, workers=2), range(2), Quiet())


def test_a_worker_does_one_rank_after_another(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, started = golden / "megatron06" / "b_tp2pp2", list[int]()
    real = SpawnProcess.start

    def start(process: SpawnProcess) -> None:
        real(process)
        started.append(process.pid or 0)

    monkeypatch.setattr(SpawnProcess, "start", start)
    request = request_for(folder, tmp_path / "many", in_process=False, workers=2)
    assert len(run(request, range(2), Quiet()).converted) == 4
    assert len(started) == 2
    run(request_for(folder, tmp_path / "one"), range(2), Quiet())
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


class Cycle:
    """What only a collector of cycles frees."""

    def __init__(self) -> None:
        self.itself = self


def test_a_rank_leaves_nothing_in_memory_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers of two ranks would be more than a worker is said to need."""
    left = list[weakref.ref[Cycle]]()

    def run(*_: object) -> None:
        assert [one() for one in left] == [None] * len(left)
        left.append(weakref.ref(Cycle()))

    monkeypatch.setattr(Talking, "run", run)
    with stopped_by_signals() as stop:
        work_through(Talking(pace=Pace(in_process=True)), [(0, 0), (1, 0), (2, 0)], None, Quiet(), stop)
    assert len(left) == 3


def test_a_rank_that_fails_ends_the_workers_of_all(pipelined: Path, tmp_path: Path) -> None:
    """Its error is reported although the worker has done another rank before."""
    source = shutil.copytree(pipelined, tmp_path / pipelined.name)
    request = request_for(source, tmp_path / "out", in_process=False, workers=1)

    class Spoiler(Quiet):
        def end(self, rank: tuple[int, int]) -> None:
            [file] = (source / "ms" / "rank_2").glob("*.ckpt")
            os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(Ckpt2ptError, match=r".") as raised:
        run(request, range(2), Spoiler())
    assert "rank_2" in str(raised.value)
    assert multiprocessing.active_children() == []
    assert not (tmp_path / "out" / TRACKER).exists()


def test_what_workers_log_goes_through_the_parent(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])  # without those of tests before this one
    with caplog.at_level(logging.WARNING), stopped_by_signals() as stop:
        work_through(Talking(), [(0, 0), (1, 0)], None, Quiet(), stop)
    assert caplog.messages == ["a\x1b[31m: mode 0400 cannot be set"] * 2
    assert capfd.readouterr().err.count("cannot be set") == 0


def test_a_bug_in_a_worker_keeps_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="a bug of ours") as caught, stopped_by_signals() as stop:
        work_through(Talking(broken=True), [(0, 0), (1, 0)], None, Quiet(), stop)
    assert "in run" in "".join(caught.value.__notes__)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EMFILE, TooManyFilesError, "this process may have [0-9]+ files open"),
        (errno.EAGAIN, TryAgainError, "no more processes are allowed"),
        (errno.ENOMEM, TryAgainError, "Cannot allocate memory"),
    ],
)
def test_a_worker_that_cannot_be_started_is_an_error_that_says_why(
    number: int, kind: type[Ckpt2ptError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", refuse)
    with pytest.raises(kind, match=words) as caught, stopped_by_signals() as stop:
        work_through(Talking(), [(0, 0), (1, 0)], None, Quiet(), stop)
    assert caught.value.where == "worker of tp 0 pp 0"
