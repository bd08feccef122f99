"""A worker begins when every rank has saved, and says what is missing when that does not come."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt2pt.cli import commands as cli
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import InputError, MissingInputError, TimedOutError
from ckpt2pt.kube.conversion.schema import Readiness
from ckpt2pt.kube.worker import waiting
from ckpt2pt.kube.worker.account import Account
from ckpt2pt.kube.worker.waiting import wait_until_whole
from handmade import Handmade

RANKS = 4


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(waiting, "MAX_PAUSE_SECONDS", 0.05)


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    return Handmade(topology=Topology(num_layers=4, tensor=2, pipeline=2)).write(tmp_path / "made")


@pytest.fixture
def growing(request_: Request, tmp_path: Path) -> Callable[..., threading.Thread]:
    """Empties the source, and has it come back as a training writes it: rank by rank, slowly, renamed at the end."""
    shelf = tmp_path / "shelf"
    shutil.copytree(request_.source, shelf)
    shutil.rmtree(request_.source)
    request_.source.mkdir()

    def write(ranks: tuple[int, ...] = (2, 0, 3, 1), pause: float = 0.02) -> None:
        for rank in ranks:
            [file] = (shelf / f"rank_{rank}").glob("*.ckpt")
            partial = request_.source / f"rank_{rank}" / f"{file.stem}.tmp"
            partial.parent.mkdir()
            data = file.read_bytes()
            with partial.open("wb", buffering=0) as out:
                for start in range(0, len(data), len(data) // 4 + 1):
                    out.write(data[start : start + len(data) // 4 + 1])
                    time.sleep(pause)
            whole = partial.rename(partial.with_suffix(".ckpt"))
            time.sleep(pause)
            whole.chmod(0o400)

    def begin(*args: object) -> threading.Thread:
        thread = threading.Thread(target=write, args=args)
        thread.start()
        return thread

    return begin


def flags_of(request: Request) -> list[str]:
    paths = ["--ms-path", request.source, "--param-map-path", request.metadata, "--megatron-path", request.target]
    return ["--num-layers", "4", "--tp-size", "2", "--pp-size", "2", *map(str, paths)]


def test_a_directory_that_grows_rank_by_rank(request_: Request, growing: Callable[..., threading.Thread]) -> None:
    account, phases = Account(), list[str]()

    def watch() -> None:
        for _ in range(30):
            phases.append(account.phase)
            time.sleep(0.01)

    training, watcher = growing(), threading.Thread(target=watch)
    watcher.start()
    wait_until_whole(request_, Readiness(timeout_seconds=60), account)
    whole = sorted(path.name for path in request_.source.rglob("*.ckpt"))
    training.join()
    watcher.join()
    assert len(whole) == RANKS
    assert not list(request_.source.rglob("*.tmp"))
    assert "Waiting" in phases
    assert account.phase == "Planning"


def test_convert_waits_and_converts(
    request_: Request, growing: Callable[..., threading.Thread], capsys: pytest.CaptureFixture[str]
) -> None:
    training = growing()
    words = ["convert", *flags_of(request_), "--multiprocess-off", "--progress", "none", "--output", "json"]
    assert cli.main([*words, "--readiness-timeout", "60"]) == 0
    training.join()
    document = json.loads(capsys.readouterr().out)
    assert (document["published"], document["ranksConverted"]) == (True, RANKS)


def test_without_the_flag_nothing_is_waited_for(
    request_: Request, growing: Callable[..., threading.Thread], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["convert", *flags_of(request_)]) == 66
    assert "4 of 4 rank folders are missing" in capsys.readouterr().err


def test_a_rank_that_never_comes(request_: Request, growing: Callable[..., threading.Thread]) -> None:
    growing((2, 0, 3), 0).join()
    with pytest.raises(MissingInputError) as caught:
        wait_until_whole(request_, Readiness(timeout_seconds=0.3), Account())
    assert caught.value.what == "after 0.3 s the checkpoint 0_12 is incomplete: rank_1 is missing"


def test_a_rank_at_another_step(request_: Request) -> None:
    for path in request_.source.rglob("*.ckpt"):
        path.chmod(0o400)
    [file] = (request_.source / "rank_3").glob("*.ckpt")
    file.rename(file.with_name("network_rank_3-0_7.ckpt"))
    with pytest.raises(InputError) as caught:
        wait_until_whole(request_, Readiness(timeout_seconds=0.2), Account())
    assert caught.value.what == "after 0.2 s the checkpoint 0_12 is incomplete: rank_3 is at 0_7"


def test_a_write_that_never_ends(request_: Request) -> None:
    for path in request_.source.rglob("*.ckpt"):
        path.chmod(0o400)
    [file] = (request_.source / "rank_3").glob("*.ckpt")
    file.rename(file.with_suffix(".tmp"))
    with pytest.raises(TimedOutError) as caught:
        wait_until_whole(request_, Readiness(timeout_seconds=0.2), Account())
    assert f"rank_3 is being written ({file.stem}.tmp)" in caught.value.what


def test_a_chosen_iteration_is_waited_for(request_: Request) -> None:
    from dataclasses import replace

    for path in request_.source.rglob("*.ckpt"):
        path.chmod(0o400)
    there, other = (replace(request_, iteration=iteration) for iteration in (12, 99))
    wait_until_whole(there, Readiness(timeout_seconds=0.2), Account())
    [file] = (request_.source / "rank_0").glob("*.ckpt")
    file.with_name("network_rank_0-0_13.ckpt").write_bytes(file.read_bytes())
    with pytest.raises(MissingInputError) as caught:
        wait_until_whole(other, Readiness(timeout_seconds=0.2), Account())
    assert "rank_0 is at 0_12, 0_13, not that one" in caught.value.what


def test_whoever_watches_is_reported_what_is_missing_once(
    request_: Request, growing: Callable[..., threading.Thread], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ckpt2pt")
    with pytest.raises(MissingInputError):
        wait_until_whole(request_, Readiness(timeout_seconds=0.3), Account())
    reported = [record.getMessage() for record in caplog.records]
    assert len(reported) == 1
    assert f"the checkpoint in {request_.source} is incomplete: rank_0 is missing; rank_1 is missing" in reported[0]
