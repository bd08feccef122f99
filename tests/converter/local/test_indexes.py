"""An Indexed Job is carried out by local processes as Kubernetes would: retries, failure policy, deadlines, signals.

The workers are stand-ins that follow a script; that real workers do is tested in test_local.py.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.conversion.job import build_job
from ckpt2pt.conversion.spec import Json, parse
from ckpt2pt.conversion.status import StageRecord
from ckpt2pt.local import indexes
from ckpt2pt.local.indexes import LocalJob, action_for
from ckpt2pt.local.runner import exit_code
from documents import changed
from workers import stand_in, wait_for


class Notes:
    """A board that remembers."""

    interval_seconds = 1.0

    def __init__(self) -> None:
        self.states: list[tuple[int, str]] = []
        self.lines: list[tuple[int, Json]] = []
        self.said: list[tuple[int, Json | str]] = []

    def changed(self, record: StageRecord) -> None:
        self.states.append((record.stage, record.state))

    def progress(self, stage: int, line: Json) -> None:
        self.lines.append((stage, line))

    def say(self, stage: int, line: Json | str) -> None:
        self.said.append((stage, line))

    def tick(self) -> None: ...


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Notes) -> Any:
    """A Job of two stages, or of as many as said, whose workers follow a script."""
    monkeypatch.setattr(indexes, "RETRY_SECONDS", 0.01)

    def make(*script: str, limit: int = 2, pipeline: int = 2, **spec: object) -> LocalJob:
        monkeypatch.setenv("PYTHONPATH", str(stand_in(tmp_path / "stand-in", *script)))
        changes = [(f"spec.{name}", value) for name, value in spec.items()]
        conversion = parse(
            changed(("spec.model.numLayers", 12), ("spec.parallelism", {"pipeline": pipeline}), *changes)
        )
        return LocalJob(conversion, build_job(conversion, image="i"), ["convert", "--x"], board=notes, limit=limit)

    return make


def tries(tmp_path: Path, index: int) -> list[Any]:
    path = tmp_path / "stand-in" / f"tries-{index}"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def states(job: LocalJob) -> list[str]:
    return [index.state for index in job.indexes]


def test_every_index_runs_once_with_the_arguments_of_the_container(start: Any, tmp_path: Path) -> None:
    job = start('* * out {"iteration": 5}')
    assert job.run() is None
    assert states(job) == ["Succeeded", "Succeeded"]
    for index in (0, 1):
        [once] = tries(tmp_path, index)
        assert once["parent"] == str(os.getpid())
        *given, flag, _, port_flag, port = once["args"]
        assert given == ["convert", "--x"]
        assert (flag, port_flag, port) == ("--termination-log", "--progress-port", "0"), (
            "no port, where all are one host"
        )
        assert job.indexes[index].result == {"iteration": 5}


def test_progress_lines_move_the_record_and_reach_the_board(start: Any, notes: Notes) -> None:
    line = {"event": "rank", "bytesDone": 7, "bytesTotal": 9, "bytesPerSecond": 3}
    job = start(f"0 * err {json.dumps(line)}", pipeline=1)
    job.run()
    assert notes.lines == [(0, line)]
    record = job.indexes[0].record
    assert (record.done, record.total, record.throughput, record.fraction) == (9, 9, 3, 1.0)
    assert notes.states == [(0, "Running"), (0, "Running"), (0, "Succeeded")]


def test_each_try_has_a_termination_message_of_its_own_and_its_facts_count(start: Any, tmp_path: Path) -> None:
    word = {"version": 1, "exitCode": 75, "bytes": 5, "bytesTotal": 9, "throughput": 2}
    job = start(f"* 1 word {json.dumps(word)}", "* 1 exit 75", "* * exit 65")
    job.run()
    paths = [each["args"][-3] for index in (0, 1) for each in tries(tmp_path, index)]
    assert len(set(paths)) == 4
    assert not any(Path(path).parent.exists() for path in paths), "nothing is left behind"
    record = job.indexes[0].record
    assert (record.done, record.total, record.throughput) == (0, None, 0), "the second try left no word"


def test_the_last_word_of_a_failed_try_is_in_its_record(start: Any) -> None:
    job = start('0 * word {"version": 1, "bytes": 5, "bytesTotal": 9, "throughput": 2}', "0 * exit 65", pipeline=1)
    job.run()
    record = job.indexes[0].record
    assert (record.state, record.done, record.total, record.throughput) == ("Failed", 5, 9, 2)


@pytest.mark.parametrize(
    ("left", "says"),
    [
        (["* * mute"], "left no report of ckpt2pt"),
        (["* * word all fine"], "left no report of ckpt2pt"),
        (
            ['* * word {"version": 1, "exitCode": 0, "reason": "Converted", "stages": [1], "iteration": 5}'],
            "of stages 1, not 0",
        ),
        (['* * word {"version": 1, "exitCode": 75, "reason": "TryAgain"}'], "its report says exit code 75"),
    ],
    ids=["nothing", "noise", "of-another-stage", "of-a-failure"],
)
def test_exit_code_0_without_a_report_of_its_own_is_a_failed_stage(start: Any, left: list[str], says: str) -> None:
    job = start(*left, pipeline=1)
    assert job.run() is None
    record = job.indexes[0].record
    assert (record.state, record.reason, record.verified, job.indexes[0].code) == ("Failed", "NoReport", "", 70)
    assert says in record.message
    assert exit_code(job.indexes, None) == 70


def test_a_stage_that_is_done_tells_its_iteration_and_how_it_was_verified(start: Any) -> None:
    job = start()
    job.run()
    assert [(r.iteration, r.verified) for r in (index.record for index in job.indexes)] == [(5, "Digest")] * 2


def test_a_stage_whose_files_were_there_says_so(start: Any) -> None:
    job = start('0 * out {"ranksConverted": 0}', pipeline=1)
    job.run()
    assert job.indexes[0].reason == "AlreadyThere"


@pytest.mark.parametrize("code", [65, 66, 76])
def test_what_cannot_be_retried_fails_its_stage_and_the_others_finish(start: Any, tmp_path: Path, code: int) -> None:
    job = start(f"0 * exit {code}", "1 * sleep 0.3")
    assert job.run() is None
    assert states(job) == ["Failed", "Succeeded"]
    assert len(tries(tmp_path, 0)) == 1
    assert job.indexes[0].code == code


def test_wrong_usage_fails_the_job_at_once(start: Any, tmp_path: Path) -> None:
    job = start("0 * exit 64", "1 * sleep 20")
    began = time.monotonic()
    ended = job.run()
    assert time.monotonic() - began < 10
    assert ended is not None
    assert ended.reason == "FailJob"
    assert states(job) == ["Failed", "Pending"]
    assert len(tries(tmp_path, 1)) <= 1


@pytest.mark.parametrize("end", ["exit 70", "exit 74", "exit 75", "exit 1", "kill SIGKILL", "kill SIGSEGV"])
def test_what_may_pass_is_tried_again(start: Any, tmp_path: Path, notes: Notes, end: str) -> None:
    job = start(f"0 1 {end}", f"0 2 {end}")
    assert job.run() is None
    assert states(job) == ["Succeeded", "Succeeded"]
    assert job.indexes[0].attempts == len(tries(tmp_path, 0)) == 3
    assert (job.indexes[1].attempts, job.indexes[0].reason) == (1, "")
    assert [stage for stage, line in notes.said if isinstance(line, dict) and "tried again" in str(line)] == [0, 0]


def test_retries_run_out(start: Any, tmp_path: Path) -> None:
    job = start("0 * exit 75", retries={"perStage": 2})
    assert job.run() is None
    assert states(job) == ["Failed", "Succeeded"]
    assert len(tries(tmp_path, 0)) == 3


def test_a_retry_waits_a_little_and_longer_each_time(start: Any, monkeypatch: pytest.MonkeyPatch, notes: Notes) -> None:
    monkeypatch.setattr(indexes, "RETRY_SECONDS", 0.2)
    job = start("0 * exit 75", pipeline=1, retries={"perStage": 2})
    began = time.monotonic()
    job.run()
    assert time.monotonic() - began > 0.6
    assert [str(line)[:120].partition("again in ")[2][:3] for _, line in notes.said] == ["0.2", "0.4"]


def test_more_failed_stages_than_allowed_end_the_job(start: Any) -> None:
    job = start("0 * exit 65", "1 * sleep 20", retries={"maxFailedStages": 0})
    ended = job.run()
    assert ended is not None
    assert ended.reason == "MaxFailedStages"


@pytest.mark.parametrize(
    ("limit", "workers"),
    [pytest.param(8, {"maxParallelStages": 2}, id="of-the-job"), pytest.param(2, {}, id="of-the-machine")],
)
def test_no_more_workers_than_allowed_at_a_time(
    start: Any, tmp_path: Path, limit: int, workers: dict[str, object]
) -> None:
    job = start("* * sleep 0.3", limit=limit, pipeline=4, workers=workers)
    job.run()
    seen = [int(path.read_text()) for path in (tmp_path / "stand-in").glob("seen-*")]
    assert len(seen) == 4
    assert max(seen) <= 2


def test_the_deadline_ends_what_is_still_running(start: Any) -> None:
    job = start("1 * sleep 60", activeDeadlineSeconds=2)
    ended = job.run()
    assert ended is not None
    assert ended.reason == "DeadlineExceeded"
    assert states(job) == ["Succeeded", "Pending"]


def test_a_signal_stops_the_workers_and_says_so(start: Any, tmp_path: Path) -> None:
    job = start("* * sleep 60")

    def ask() -> None:
        wait_for(lambda: tries(tmp_path, 0) and tries(tmp_path, 1))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=ask)
    thread.start()
    ended = job.run()
    thread.join()
    assert ended is not None
    assert (ended.reason, states(job)) == ("Interrupted", ["Pending", "Pending"])
    assert "SIGTERM" in ended.message
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_wait_for_a_deaf_worker(start: Any, tmp_path: Path) -> None:
    job = start("0 * deaf", "0 * out {}", "0 * sleep 60", pipeline=1)

    def ask() -> None:
        wait_for(lambda: tries(tmp_path, 0))
        time.sleep(0.5)  # until it is deaf
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=ask)
    thread.start()
    began = time.monotonic()
    ended = job.run()
    thread.join()
    assert time.monotonic() - began < 20
    assert ended is not None
    assert ended.reason == "Interrupted"
    assert job.indexes[0].message == "killed by SIGKILL"


def test_the_message_of_a_failure_is_the_workers_own_error_or_its_last_words(start: Any, notes: Notes) -> None:
    error = {"level": "error", "what": "too few layers", "where": "ms", "hint": "check", "exitCode": 65}
    job = start(f"0 * err {json.dumps(error)}", "0 * exit 65", "1 * err Traceback: oh", "1 * exit 65")
    job.run()
    assert job.indexes[0].message == "too few layers (where: ms; hint: check)"
    assert job.indexes[1].message == "Traceback: oh"
    assert sorted(stage for stage, _ in notes.said) == [0, 1]


def test_a_flood_of_output_does_not_block_a_worker(start: Any) -> None:
    job = start(*(f"0 * err {'x' * 1000}" for _ in range(500)), "0 * exit 65", pipeline=1)
    job.run()
    assert job.indexes[0].state == "Failed"
    assert len(job.indexes[0].message) < 50_000


@pytest.mark.parametrize(
    ("rule", "code", "action"),
    [
        pytest.param({"operator": "In", "values": [1, 2]}, 2, "FailIndex", id="in"),
        pytest.param({"operator": "In", "values": [1, 2]}, 3, "Count", id="not-in"),
        pytest.param({"operator": "NotIn", "values": [1, 2]}, 3, "FailIndex", id="notin"),
        pytest.param({"operator": "NotIn", "values": [1, 2]}, 2, "Count", id="notin-but-in"),
    ],
)
def test_rules_on_exit_codes(rule: Json, code: int, action: str) -> None:
    rules: list[Json] = [
        {"action": "Ignore", "onPodConditions": []},
        {"action": "FailIndex", "onExitCodes": rule},
    ]
    assert action_for(rules, code) == action
