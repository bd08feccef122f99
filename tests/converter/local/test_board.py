"""What is seen of a local run: bars on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest

from ckpt2pt.conversion.status import StageRecord
from ckpt2pt.local.board import Bars, Lines, board, spoken

ERROR = {"level": "error", "what": "num_layers is 2", "where": "ms/rank_0", "hint": "set it to 4", "exitCode": 65}


def test_lines_carry_their_stage_and_tell_each_state_once() -> None:
    out = io.StringIO()
    lines = Lines(out, progress=True, log_format="text")
    for done in (0, 1, 2):
        lines.changed(StageRecord(stage=3, state="Running", done=done, total=2))
    lines.progress(3, {"event": "progress", "bytesDone": 1})
    lines.changed(StageRecord(stage=3, state="Succeeded", done=2, total=2))
    found = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in found] == ["stage", "progress", "stage"]
    assert {line["stage"] for line in found} == {3}
    assert found[-1]["state"] == "Succeeded"


def test_without_progress_only_errors_and_logs_are_told() -> None:
    out = io.StringIO()
    lines = Lines(out, progress=False, log_format="text")
    lines.changed(StageRecord(stage=0, state="Running"))
    lines.progress(0, {"event": "begin"})
    lines.say(0, ERROR)
    assert out.getvalue() == "ckpt2pt: stage 0: num_layers is 2\n  where: ms/rank_0\n  hint:  set it to 4\n"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        pytest.param({"level": "WARNING", "message": "careful"}, "ckpt2pt: stage 1: careful", id="log"),
        pytest.param("Traceback", "ckpt2pt: stage 1: Traceback", id="anything-else"),
    ],
)
def test_lines_for_people_and_for_machines(line: dict[str, object] | str, text: str) -> None:
    assert spoken(1, line, "text") == text
    assert json.loads(spoken(1, line, "json"))["stage"] == 1


def test_an_error_stays_whole_for_machines() -> None:
    assert json.loads(spoken(1, ERROR, "json")) == {"stage": 1, **ERROR}


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bars]:
    monkeypatch.setenv("COLUMNS", "120")
    found = Bars(3, "text")
    yield found
    found.close()


def test_a_bar_for_each_stage(bars: Bars, capfd: pytest.CaptureFixture[str]) -> None:
    bars.changed(StageRecord(stage=0, state="Running", attempts=1, done=1 << 20, total=2 << 20, throughput=3 << 20))
    bars.progress(0, {"event": "progress", "etaSeconds": 7.4})
    bars.changed(StageRecord(stage=0, state="Running", attempts=1, done=1 << 20, total=2 << 20, throughput=3 << 20))
    bars.changed(StageRecord(stage=1, state="Failed", attempts=4, reason="InputWrong"))
    bars.say(1, ERROR)
    bars.tick()
    bars.close()
    seen = capfd.readouterr().err
    rows = {line[:7]: line for line in seen.splitlines() if line.startswith("stage")}
    assert "1.0/2.0 MiB" in rows["stage 0"]
    assert "3.0 MiB/s" in rows["stage 0"]
    assert "7 s" in rows["stage 0"]
    assert "failed: InputWrong, try 4" in rows["stage 1"]
    assert "waits" in rows["stage 2"]
    assert "hint:  set it to 4" in seen


def test_a_stage_that_was_there_already_has_a_full_bar(bars: Bars, capfd: pytest.CaptureFixture[str]) -> None:
    bars.changed(StageRecord(stage=2, state="Succeeded", attempts=1))
    bars.close()
    assert "done" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "expected"),
    [pytest.param("auto", Lines, id="no-terminal"), pytest.param("bar", Bars, id="asked"), pytest.param("none", Lines, id="none")],
)  # fmt: skip
def test_choice(kind: str, expected: type) -> None:
    with board(kind, "text", 1) as found:
        assert isinstance(found, expected)
