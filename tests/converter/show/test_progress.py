"""Progress: lines a machine can read, bars that add up."""

from __future__ import annotations

import io
import json
import re
import sys
import time
from typing import Any

import pytest

from ckpt2pt.core.progress import Silence
from ckpt2pt.show import progress
from ckpt2pt.show.progress import Bars, Lines, reporter

TOTALS = {(0, 0): 60, (1, 0): 40, (0, 1): 100}


def spoken(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_tell_beginning_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 3600.0)
    stream = io.StringIO()
    lines = Lines(stream)
    lines.begin(TOTALS, 500)
    lines.advance((0, 1), 50)
    lines.advance((0, 1), 50)
    lines.end((0, 1))
    lines.close()
    begin, rank = spoken(stream)
    assert (begin["event"], begin["ranks"], begin["bytesDone"], begin["bytesTotal"]) == ("begin", 3, 0, 200)
    assert (rank["event"], rank["tp"], rank["pp"], rank["bytesDone"]) == ("rank", 0, 1, 100)
    assert rank["etaSeconds"] >= 0
    assert begin["etaSeconds"] is None


def test_lines_speak_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.0)
    stream = io.StringIO()
    lines = Lines(stream)
    lines.begin(TOTALS, 500)
    for _ in range(3):
        lines.advance((0, 0), 20)
    assert [(line["event"], line["bytesDone"]) for line in spoken(stream)[1:]] == [
        ("progress", 20), ("progress", 40), ("progress", 60),
    ]  # fmt: skip


@pytest.mark.parametrize("totals", [TOTALS, {}], ids=["ranks", "nothing-to-do"])
def test_bars_go_to_stderr_and_may_be_closed_at_any_time(
    totals: dict[tuple[int, int], int], capsys: pytest.CaptureFixture[str]
) -> None:
    bars = Bars()
    bars.close()
    bars.begin(totals, 500)
    for rank, nbytes in totals.items():
        bars.advance(rank, nbytes)
        bars.end(rank)
    bars.close()
    seen = capsys.readouterr()
    assert seen.out == ""
    assert ("stage 1" in seen.err) is bool(totals)


@pytest.mark.parametrize("width", [20, 69, 70, 120])
def test_bars_tell_the_percentage_on_any_terminal_and_bytes_and_speed_in_one_unit(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    bars = Bars()
    bars.begin({(0, 11): 100 << 20}, 500)
    for _ in range(3):
        bars.advance((0, 11), 11 << 20)
        time.sleep(0.01)
    bars.close()
    line = next(line for line in capsys.readouterr().err.splitlines() if "stage 11" in line)
    assert " 33%" in line
    if width >= 70:
        assert "33.0/100.0 MiB" in line
        assert re.search("[MG]iB/s", line), line


@pytest.mark.parametrize(
    ("kind", "terminal", "term", "expected"),
    [
        ("auto", True, "xterm", Bars), ("auto", False, "xterm", Lines), ("bar", False, "xterm", Bars),
        ("json", True, "xterm", Lines), ("none", True, "xterm", Silence), ("auto", True, "dumb", Lines),
        ("bar", True, "dumb", Bars),
    ],
)  # fmt: skip
def test_a_terminal_that_draws_gets_bars_and_a_log_gets_lines(
    kind: str, terminal: bool, term: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert isinstance(reporter(kind), expected)


def test_silence_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = reporter("none")
    quiet.begin(TOTALS, 500)
    quiet.advance((0, 0), 5)
    quiet.end((0, 0))
    quiet.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_done_within_a_second_is_not_reported_of_unless_asked_for(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    for kind in ("auto", "bar" if terminal else "json"):
        quick = reporter(kind)
        quick.begin(TOTALS, 500)
        for rank, nbytes in TOTALS.items():
            quick.advance(rank, nbytes)
            quick.end(rank)
        quick.close()
        reported = capsys.readouterr().err
        assert bool(reported) is (kind != "auto")


def test_what_takes_longer_is_reported_from_its_beginning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # so that rich takes what captures for a terminal
    monkeypatch.setenv("TERM", "xterm")
    lines, bars = Lines(io.StringIO(), after=1.0), Bars("compared", after=1.0)
    for each in (lines, bars):
        each.begin(TOTALS, 500)
        each.advance((0, 0), 60)
    assert capsys.readouterr().err == ""
    seen, late = "", time.monotonic() + 30
    while "compared" not in seen and time.monotonic() < late:
        time.sleep(0.1)
        seen += capsys.readouterr().err
    assert "compared" in seen, "drawn although nothing has moved since"
    lines.end((0, 0))
    assert [line["event"] for line in spoken(lines._stream)] == ["begin", "rank"]  # type: ignore[arg-type]
    bars.close()


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_none_is_wanted(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # so that rich takes what captures for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv(variable, value)
    bars = Bars()
    bars.begin(TOTALS, 500)
    bars.close()
    assert not re.search("\x1b\\[[0-9;]*m", capsys.readouterr().err)
