"""Stages of a conversion on this machine: retries, limits, and what is reported each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from ckpt2pt.core.progress import SILENCE
from ckpt2pt.errors import Ckpt2ptError, InputError, TargetConflictError, TryAgainError, VerificationError
from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt.kube.local import stages
from ckpt2pt.kube.local.stages import Stages
from ckpt2pt.run.pool import stopped_by_signals
from documents import changed

Run = Callable[[Sequence[int], Any], None]


class World:
    """A run of which each call is scripted."""

    def __init__(self, *changes: tuple[str, object], pipeline: int = 3) -> None:
        self.calls: list[list[int]] = []
        self.script: list[Run] = []
        self.failed: list[tuple[int, int]] = []
        self.written: list[tuple[int, int]] | None = None
        conversion = parse(
            changed(("spec.model.numLayers", 12), ("spec.parallelism", {"pipeline": pipeline}), *changes)
        )
        request: Any = SimpleNamespace()
        self.stages = Stages(
            conversion, lambda: request, lambda stage, error: self.failed.append((stage, error.exit_code))
        )

    def run(self, _: object, todo: Sequence[int], reporter: Any) -> Any:
        self.calls.append([*todo])
        if len(self.calls) <= len(self.script):
            self.script[len(self.calls) - 1](todo, reporter)
        reporter.begin({(0, pp): 10 for pp in todo}, 5)
        for pp in todo:
            reporter.advance((0, pp), 10)
            reporter.end((0, pp))
        target = SimpleNamespace(iteration=5)
        written = [(0, pp) for pp in todo] if self.written is None else self.written
        return SimpleNamespace(stages=todo, converted=written, target=target, verified="digest")

    @property
    def reported(self) -> list[tuple[str, int, str]]:
        return [(record.state, record.attempts, record.reason) for record in self.stages.records]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    monkeypatch.setattr(stages, "RETRY_SECONDS", 0.01)

    def make(*changes: tuple[str, object], script: Sequence[Run] = (), pipeline: int = 3) -> World:
        found = World(*changes, pipeline=pipeline)
        found.script = [*script]
        monkeypatch.setattr(stages, "run", found.run)
        return found

    return make


def failing(kind: type[Ckpt2ptError], stage: int | None) -> Run:
    def fail(_: Sequence[int], __: Any) -> None:
        error = kind("broken", where="there", hint="correct it")
        error.rank = None if stage is None else (0, stage)
        raise error

    return fail


def test_every_stage_is_done_in_one_run(world: Callable[..., World]) -> None:
    found = world()
    assert found.stages.carry_out(SILENCE) is None
    assert found.calls == [[0, 1, 2]]
    assert found.reported == [("Succeeded", 1, "")] * 3
    [record, *_] = found.stages.records
    assert (record.done, record.total, record.iteration, record.verified) == (10, 10, 5, "Digest")
    assert record.throughput > 0


def test_what_may_pass_is_tried_again_with_all_that_is_left(
    world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    found = world(script=[failing(TryAgainError, 1), failing(TryAgainError, 1)])
    assert found.stages.carry_out(SILENCE) is None
    assert found.calls == [[0, 1, 2]] * 3
    assert found.reported == [("Succeeded", 1, ""), ("Succeeded", 3, ""), ("Succeeded", 1, "")]
    assert "stage 1: broken; tried again in 0.02 s, 2 of 3 retries left" in caplog.text


def test_retries_run_out(world: Callable[..., World]) -> None:
    found = world(("spec.retries", {"perStage": 1}), script=[failing(TryAgainError, 2)] * 2)
    assert found.stages.carry_out(SILENCE) is None
    assert found.calls == [[0, 1, 2], [0, 1, 2], [0, 1]]
    assert found.reported == [("Succeeded", 1, ""), ("Succeeded", 1, ""), ("Failed", 2, "TryAgain")]
    assert found.failed == [(2, 75)]


@pytest.mark.parametrize("kind", [InputError, VerificationError])
def test_what_retrying_cannot_change_fails_its_stage_and_the_others_finish(
    world: Callable[..., World], kind: type[Ckpt2ptError]
) -> None:
    found = world(script=[failing(kind, 1)])
    assert found.stages.carry_out(SILENCE) is None
    assert found.calls == [[0, 1, 2], [0, 2]]
    assert [state for state, *_ in found.reported] == ["Succeeded", "Failed", "Succeeded"]
    assert found.failed == [(1, kind.exit_code)]


@pytest.mark.parametrize("stage", [0, None])
def test_what_is_true_for_every_stage_ends_the_run(world: Callable[..., World], stage: int | None) -> None:
    found = world(script=[failing(TargetConflictError, stage)])
    ended = found.stages.carry_out(SILENCE)
    assert ended is not None
    assert (ended.reason, ended.message) == ("FailJob", "stage 0: broken; there; correct it")
    assert found.reported == [("Failed", 1, "TargetConflict"), ("Pending", 0, ""), ("Pending", 0, "")]


def test_more_failed_stages_than_allowed_end_the_run(world: Callable[..., World]) -> None:
    found = world(("spec.retries", {"maxFailedStages": 1}), script=[failing(InputError, 0), failing(InputError, 2)])
    ended = found.stages.carry_out(SILENCE)
    assert ended is not None
    assert ended.reason == "MaxFailedStages"
    assert [state for state, *_ in found.reported] == ["Failed", "Pending", "Failed"]


def test_a_stage_whose_files_were_there_says_so(world: Callable[..., World]) -> None:
    found = world()
    found.written = [(0, 1)]
    found.stages.carry_out(SILENCE)
    assert [reason for *_, reason in found.reported] == ["AlreadyThere", "", "AlreadyThere"]


def waiting(todo: Sequence[int], reporter: Any) -> None:
    reporter.begin({(0, pp): 10 for pp in todo}, 5)
    with stopped_by_signals() as stop:
        for _ in range(1000):
            stop.check()
            time.sleep(0.01)


def test_the_deadline_ends_what_is_still_running(world: Callable[..., World]) -> None:
    found = world(("spec.activeDeadlineSeconds", 1), script=[waiting])
    ended = found.stages.carry_out(SILENCE)
    assert ended is not None
    assert (ended.reason, "activeDeadlineSeconds (1)" in ended.message) == ("DeadlineExceeded", True)
    assert {state for state, *_ in found.reported} == {"Pending"}


def test_a_signal_ends_the_run_and_says_so(world: Callable[..., World]) -> None:
    def main_handler(number: int, _: object) -> None:
        raise AssertionError(f"{number} outside of a run")

    before = signal.signal(signal.SIGTERM, main_handler)
    try:
        found = world(script=[stopping])
        ended = found.stages.carry_out(SILENCE)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended is not None
    assert (ended.reason, ended.message) == (
        "Interrupted",
        "stopped by SIGTERM; run it again, what is finished is kept",
    )


def stopping(todo: Sequence[int], reporter: Any) -> None:
    """A signal in the midst of the work."""
    with stopped_by_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            stop.check()
            time.sleep(0.01)
