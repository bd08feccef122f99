"""What is seen of ``ckpt2pt run`` while it runs: a bar for each stage on a terminal, JSON lines elsewhere.  On stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from ckpt2pt.conversion.spec import Json
from ckpt2pt.conversion.status import StageRecord
from ckpt2pt.errors import message, printable, spelled
from ckpt2pt.show.progress import INTERVAL_SECONDS, columns, drawn_or_written
from ckpt2pt.text import size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ckpt2pt.local.indexes import Board


@contextmanager
def board(kind: str, log_format: str, stages: int) -> Generator[Board]:
    """``bar``, ``json``, ``none``, or ``auto``: bars on a terminal, JSON lines otherwise."""
    kind = drawn_or_written(kind)
    if kind != "bar":
        yield Lines(sys.stderr, progress=kind == "json", log_format=log_format)
        return
    bars = Bars(stages, log_format)
    try:
        yield bars
    finally:
        bars.close()


class Lines:
    """One JSON object for each step of progress, with its stage; errors and logs as ``--log-format`` says."""

    interval_seconds = INTERVAL_SECONDS

    def __init__(self, stream: TextIO, *, progress: bool, log_format: str) -> None:
        self._stream, self._progress, self._log_format = stream, progress, log_format
        self._states: dict[int, str] = {}

    def changed(self, record: StageRecord) -> None:
        """Tell a new state; how far a running stage is stands in its lines of progress."""
        if self._progress and self._states.get(record.stage) != record.state:
            self._states[record.stage] = record.state
            self._write(json.dumps({"stage": record.stage, "event": "stage", **record.document()}))

    def progress(self, stage: int, line: Json) -> None:
        """Pass it on."""
        if self._progress:
            self._write(json.dumps({"stage": stage, **line}))

    def say(self, stage: int, line: Json | str) -> None:
        """Pass it on, with the stage in front."""
        self._write(spoken(stage, line, self._log_format))

    def tick(self) -> None:
        """Nothing to do."""

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class Bars:
    """One bar for each stage: bytes, speed, time left.  Drawn by the caller's own ticks, without a thread."""

    interval_seconds = 0.25

    def __init__(self, stages: int, log_format: str) -> None:
        from rich.console import Console  # noqa: PLC0415 - only on a terminal
        from rich.progress import DownloadColumn, Progress, TextColumn  # noqa: PLC0415

        self._log_format = log_format
        console = Console(stderr=True)
        more = (
            DownloadColumn(binary_units=True),
            # Speed and time left are the worker's own: seen from here, bytes come in gusts.
            TextColumn("{task.fields[speed]}", justify="right"),
            TextColumn("{task.fields[left]}", justify="right"),
            TextColumn("{task.fields[state]}"),
        )
        self._progress: Progress = Progress(*columns(console.width, *more), console=console, auto_refresh=False)
        self._tasks: list[TaskID] = [
            self._progress.add_task(f"stage {stage}", total=None, start=False, speed="", left="", state="waits")
            for stage in range(stages)
        ]
        self._attempts = [0] * stages
        self._left = [""] * stages
        self._progress.start()

    def changed(self, record: StageRecord) -> None:
        """Move the bar of a stage."""
        task = self._tasks[record.stage]
        if record.attempts > self._attempts[record.stage]:
            self._attempts[record.stage] = record.attempts
            self._progress.reset(task, start=True)
        again = f", try {record.attempts}" if record.attempts > 1 else ""
        words = {"Pending": "waits", "Running": "", "Succeeded": "done", "Failed": f"failed: {record.reason}"}
        # A stage whose files were all there already has nothing to read: its bar is full all the same.
        full = record.state == "Succeeded" and not record.total
        self._progress.update(
            task,
            completed=1 if full else record.done,
            total=1 if full else record.total,
            speed=f"{size(record.throughput)}/s" if record.throughput else "",
            left=self._left[record.stage] if record.state == "Running" else "",
            state=words[record.state] + again,
        )

    def progress(self, stage: int, line: Json) -> None:
        """Note the time left; the bar itself moves with the record."""
        left = line.get("etaSeconds")
        self._left[stage] = f"{left:.0f} s" if isinstance(left, int | float) and left >= 1 else ""

    def say(self, stage: int, line: Json | str) -> None:
        """Print above the bars."""
        self._progress.console.print(spoken(stage, line, self._log_format), markup=False, highlight=False)

    def tick(self) -> None:
        """Draw."""
        self._progress.refresh()

    def close(self) -> None:
        """Leave the last picture."""
        self._progress.stop()


def spoken(stage: int, line: Json | str, log_format: str) -> str:
    """A worker's line for a person, or for a machine."""
    if log_format == "json":
        return json.dumps({"stage": stage, **(line if isinstance(line, dict) else {"level": "INFO", "message": line})})
    if isinstance(line, str):
        return f"ckpt2pt: stage {stage}: {printable(line)}"
    if "mend" in line:
        return f"ckpt2pt: stage {stage}: {message(line.get('what'), line.get('where'), line.get('mend'))}"
    return f"ckpt2pt: stage {stage}: {spelled(str(line.get('message')))}"
