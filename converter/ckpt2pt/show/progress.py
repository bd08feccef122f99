"""Progress for people and for machines: bars on a terminal, one JSON line at a time elsewhere.  Always on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from ckpt2pt.text import size

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from ckpt2pt.crew import Reporter
    from ckpt2pt.mapping.topology import Rank

_WIDE = 70
INTERVAL_SECONDS = 2.0
INTERVAL_VARIABLE = "CKPT2PT_PROGRESS_SECONDS"
"""Seconds between JSON lines; `ckpt2pt run` sets it for its workers when it draws bars from them."""


def reporter(kind: str) -> Reporter:
    """``bar``, ``json``, ``none``, or ``auto``: bars on a terminal, JSON lines otherwise."""
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() else "json"
    kinds: dict[str, type[Bars | Lines | Silence]] = {"bar": Bars, "json": Lines, "none": Silence}
    return kinds[kind]()


class Silence:
    """Says nothing."""

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        """Nothing to do."""

    def advance(self, rank: Rank, nbytes: int) -> None:
        """Nothing to do."""

    def end(self, rank: Rank) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class Lines:
    """One JSON line every two seconds (or ``$CKPT2PT_PROGRESS_SECONDS``), and one for each finished rank."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        try:
            self._interval = float(os.environ.get(INTERVAL_VARIABLE, ""))
        except ValueError:
            self._interval = INTERVAL_SECONDS
        self._total = self._done = 0
        self._began = self._last = time.monotonic()

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        """Start the clock."""
        self._total = sum(totals.values())
        self._began = self._last = time.monotonic()
        self._say("begin", ranks=len(totals), iteration=iteration)

    def advance(self, rank: Rank, nbytes: int) -> None:
        """Count, and speak when it is time."""
        self._done += nbytes
        if time.monotonic() - self._last >= self._interval:
            self._last = time.monotonic()
            self._say("progress")

    def end(self, rank: Rank) -> None:
        """Name the rank."""
        self._say("rank", tp=rank[0], pp=rank[1])

    def close(self) -> None:
        """Nothing to do."""

    def _say(self, event: str, **more: int) -> None:
        seconds = time.monotonic() - self._began
        speed = self._done / seconds if seconds > 0 else 0
        left = (self._total - self._done) / speed if speed else None
        line = {
            "event": event,
            **more,
            "bytesDone": self._done,
            "bytesTotal": self._total,
            "bytesPerSecond": round(speed),
            "etaSeconds": None if left is None else round(left, 1),
        }
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


def columns(width: int, *more: ProgressColumn) -> tuple[ProgressColumn, ...]:
    """A bar and its percentage; on a terminal of ``width`` characters that has room for them, ``more`` as well."""
    from rich.progress import BarColumn, TextColumn  # noqa: PLC0415 - only on a terminal
    from rich.table import Column  # noqa: PLC0415

    texts = ("{task.description}", "{task.percentage:>3.0f}%")
    what, percentage = (TextColumn(text, table_column=Column(no_wrap=True)) for text in texts)
    return (what, BarColumn(), percentage, *(more if width >= _WIDE else ()))


class Bars:
    """One bar for each stage: bytes, speed, time left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._left = 0

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        """Draw the bars."""
        from rich.console import Console  # noqa: PLC0415 - only on a terminal
        from rich.progress import (  # noqa: PLC0415
            DownloadColumn,
            Progress,
            ProgressColumn,
            Task,
            TimeRemainingColumn,
        )
        from rich.text import Text  # noqa: PLC0415

        class Speed(ProgressColumn):
            """In the units of the bytes beside it; rich's own counts in powers of ten."""

            def render(self, task: Task) -> Text:
                speed = task.finished_speed or task.speed
                return Text(f"{size(speed)}/s" if speed else "?")

        console = Console(stderr=True)
        more = DownloadColumn(binary_units=True), Speed(), TimeRemainingColumn()
        self._progress = Progress(*columns(console.width, *more), console=console)
        self._left = len(totals)
        stages: dict[int, int] = {}
        for (_, pp), nbytes in totals.items():
            stages[pp] = stages.get(pp, 0) + nbytes
        self._tasks = {pp: self._progress.add_task(f"stage {pp}", total=nbytes) for pp, nbytes in stages.items()}
        if stages:
            self._progress.start()

    def advance(self, rank: Rank, nbytes: int) -> None:
        """Move a bar."""
        if self._progress:
            self._progress.advance(self._tasks[rank[1]], nbytes)

    def end(self, rank: Rank) -> None:
        """Leave the screen tidy after the last rank."""
        self._left -= 1
        if not self._left:
            self.close()

    def close(self) -> None:
        """Stop drawing; also after a failure."""
        if self._progress:
            self._progress.stop()
