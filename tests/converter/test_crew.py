"""Ranks at work: late, stopped, killed.  Every end is heard."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.casts import Cast, find_cast
from ckpt2pt.engine import write as engine
from ckpt2pt.errors import TimedOutError, TryAgainError
from ckpt2pt.publish import TRACKER
from ckpt2pt.run import run
from conversions import Quiet, flags_for, request_for


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


def test_a_worker_that_is_killed_is_not_taken_for_done(pipelined: Path, tmp_path: Path) -> None:
    request = replace(request_for(pipelined, tmp_path), in_process=False, workers=2)

    class Killer(Quiet):
        def begin(self, totals: object, iteration: int) -> None:
            import threading

            def kill() -> None:
                import multiprocessing

                for _ in range(2000):
                    for child in multiprocessing.active_children():
                        child.kill()
                    time.sleep(0.001)

            threading.Thread(target=kill, daemon=True).start()

    with pytest.raises(TryAgainError, match="exit code -9"):
        run(request, range(2), Killer())
    assert not (tmp_path / TRACKER).exists()
