"""Progress for people and for machines: bars on a terminal, one JSON line at a time elsewhere.  Always on stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from ckpt2pt.core.progress import Silence
from ckpt2pt.errors import size

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

    from ckpt2pt.core.progress import Reporter
    from ckpt2pt.core.topology import Rank

_WIDE = 70
_PATIENCE_SECONDS = 1.0
INTERVAL_SECONDS = 2.0
"""Between two JSON lines."""


def reporter(kind: str, label: str = "stage {}") -> Reporter:
    """``bar``, ``json``, ``none``, or ``auto``: bars on a terminal that can draw them, JSON lines otherwise.

    ``auto`` says nothing of what is done within a second.  ``label`` names a bar by its stage.
    """
    after = _PATIENCE_SECONDS if kind == "auto" else 0.0
    if kind == "auto":
        kind = "bar" if sys.stderr.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"} else "json"
    if kind == "none":
        return Silence()
    return Bars(label, after=after) if kind == "bar" else Lines(after=after)


class Lines:
    """One JSON line every two seconds, and one for each finished rank.

    Nothing is said before ``after`` seconds, and then the beginning first.
    """

    def __init__(self, stream: TextIO | None = None, *, after: float = 0.0) -> None:
        self._stream, self._after = stream or sys.stderr, after
        self._unsaid: dict[str, int] = {}
        self._total = self._done = 0
        self._began = self._last = time.monotonic()

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        """Start the clock."""
        self._total = sum(totals.values())
        self._began = self._last = time.monotonic()
        self._unsaid = {"ranks": len(totals), "iteration": iteration}
        if not self._after:
            self._begin()

    def advance(self, rank: Rank, nbytes: int) -> None:
        """Count, and speak when it is time."""
        self._done += nbytes
        if time.monotonic() - self._last >= INTERVAL_SECONDS:
            self._last = time.monotonic()
            self._say("progress")

    def end(self, rank: Rank) -> None:
        """Name the rank."""
        self._say("rank", tp=rank[0], pp=rank[1])

    def close(self) -> None:
        """Nothing to do."""

    def _begin(self) -> None:
        first, self._unsaid = self._unsaid, {}
        self._say("begin", **first)

    def _say(self, event: str, **more: int) -> None:
        seconds = time.monotonic() - self._began
        if seconds < self._after:
            return
        if self._unsaid:
            self._begin()
            if event == "progress":
                return
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
    """One bar for each stage: bytes, speed, time left.  They are drawn once the work has taken ``after`` seconds."""

    def __init__(self, label: str = "stage {}", *, after: float = 0.0) -> None:
        self._label, self._after = label, after
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._left = 0
        self._timer: threading.Timer | None = None
        self._drawn = False

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
        self._tasks = {
            pp: self._progress.add_task(self._label.format(pp), total=nbytes) for pp, nbytes in stages.items()
        }
        if stages and self._after:
            self._timer = threading.Timer(self._after, self._draw)
            self._timer.daemon = True
            self._timer.start()
        elif stages:
            self._draw()

    def _draw(self) -> None:
        if self._progress:
            self._drawn = True
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
        if self._timer:
            self._timer.cancel()
            self._timer.join()
            self._timer = None
        if self._progress and self._drawn:
            self._progress.stop()
