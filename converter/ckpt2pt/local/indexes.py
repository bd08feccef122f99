"""Interpret an Indexed Job with local processes: the part of Kubernetes' Job controller that a conversion needs.

    index 0, 1, 2, ...  --at most ``parallelism`` at a time-->  python -m ckpt2pt <args>   with JOB_COMPLETION_INDEX
                                    ^                                    |
                 retry, after a pause, up to backoffLimitPerIndex        |  exit code
                                    '---- podFailurePolicy <-------------'--> FailIndex, FailJob, done

What a worker writes to stderr is one JSON object on a line: progress, logs, and its error.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Protocol, cast

from ckpt2pt.conversion.report import MAX_REPORT, NO_REPORT, Report, report_of, unproved
from ckpt2pt.conversion.spec import Conversion, Json
from ckpt2pt.conversion.status import REASONS, Ending, StageRecord, State
from ckpt2pt.show.progress import INTERVAL_VARIABLE

GRACE_SECONDS = 30.0
RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 30.0
TICK_SECONDS = 0.2
MAX_RESULT_BYTES = 64 << 20
_TAIL_LINES = 20


class Board(Protocol):
    """Who is shown what happens."""

    interval_seconds: float
    """How often a worker shall tell its progress."""

    def changed(self, record: StageRecord) -> None:
        """A stage changed its state, or went on."""

    def progress(self, stage: int, line: Json) -> None:
        """A worker's line of progress."""

    def say(self, stage: int, line: Json | str) -> None:
        """A worker's log line, its error, or anything else that it wrote."""

    def tick(self) -> None:
        """Time has passed."""


@dataclass(slots=True)
class Index:
    """One completion index: what became of its tries."""

    number: int
    state: State = "Pending"
    attempts: int = 0
    failures: int = 0
    not_before: float = 0.0
    code: int | None = None
    reason: str = ""
    message: str = ""
    done: int = 0
    total: int | None = None
    throughput: int = 0
    iteration: int | None = None
    verified: str = ""
    result: Json | None = None

    @property
    def record(self) -> StageRecord:
        """The frozen view of it; a local Job does every stage, so index and stage are the same."""
        return StageRecord(
            stage=self.number,
            state=self.state,
            reason=self.reason,
            message=self.message,
            done=self.done,
            total=self.total,
            throughput=self.throughput,
            attempts=self.attempts,
            iteration=self.iteration,
            verified=self.verified,
        )


@dataclass(slots=True)
class _Worker:
    """A running try: the process, and what it has written so far."""

    index: Index
    process: subprocess.Popen[bytes]
    last_word: Path
    result: bytearray = field(default_factory=bytearray)
    line: bytearray = field(default_factory=bytearray)
    error: Json | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))


class LocalJob:
    """Runs the manifest of a conversion's Indexed Job; ``args`` are the container's, with paths of this machine."""

    def __init__(
        self, conversion: Conversion, manifest: Json, args: Sequence[str], *, board: Board, limit: int
    ) -> None:
        self._conversion = conversion
        spec = cast("Json", manifest["spec"])
        self.indexes = [Index(number) for number in range(cast("int", spec["completions"]))]
        self._args = list(args)
        self._board = board
        self._parallelism = max(1, min(cast("int", spec["parallelism"]), limit))
        self._backoff_limit = cast("int", spec["backoffLimitPerIndex"])
        self._max_failed = cast("int", spec.get("maxFailedIndexes", len(self.indexes)))
        self._deadline_seconds = cast("float | None", spec.get("activeDeadlineSeconds"))
        self._rules = cast("list[Json]", cast("Json", spec["podFailurePolicy"])["rules"])
        self._running: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._words = Path()
        self._signals: list[int] = []
        self._ending: Ending | None = None

    def run(self) -> Ending | None:
        """Until every index is done or given up; says why if it ended before that."""
        deadline = time.monotonic() + self._deadline_seconds if self._deadline_seconds else None
        with self._listening_to_signals(), self._selector, TemporaryDirectory(prefix="ckpt2pt-") as folder:
            self._words = Path(folder)
            try:
                while self._ending is None and self._go_on():
                    self._listen()
                    if self._signals:
                        name = signal.Signals(self._signals[0]).name
                        self._end("Interrupted", f"stopped by {name}; run it again, what is finished is kept")
                    elif deadline and time.monotonic() > deadline:
                        self._end(
                            "DeadlineExceeded", f"not done within activeDeadlineSeconds ({self._deadline_seconds})"
                        )
            finally:
                self._dismiss()
        return self._ending

    def _go_on(self) -> bool:
        """Start what may start; false when nothing is left to do."""
        now = time.monotonic()
        waiting = [index for index in self.indexes if index.state == "Pending"]
        for index in waiting:
            if len(self._running) < self._parallelism and index.not_before <= now:
                self._start(index)
        return bool(waiting or self._running)

    def _start(self, index: Index) -> None:
        environment = {
            **os.environ,
            "JOB_COMPLETION_INDEX": str(index.number),
            "CKPT2PT_PARENT": str(os.getpid()),
            INTERVAL_VARIABLE: str(self._board.interval_seconds),
            "PYTHONUNBUFFERED": "1",
        }
        last_word = self._words / f"{index.number}-{index.attempts}.json"
        # The last of a flag counts.  Here nobody asks a port, and each index would want the same.
        own = ("--termination-log", str(last_word), "--progress-port", "0")
        process = subprocess.Popen(
            [sys.executable, "-m", "ckpt2pt", *self._args, *own],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A group of its own: Ctrl-C is ours to pass on, and what a killed worker leaves behind can be ended.
            start_new_session=True,
        )
        worker = _Worker(index, process, last_word)
        self._running.append(worker)
        index.state, index.attempts = "Running", index.attempts + 1
        index.reason = index.message = ""
        index.done, index.total, index.throughput = 0, None, 0
        for pipe in (process.stdout, process.stderr):
            if pipe:
                os.set_blocking(pipe.fileno(), False)
                self._selector.register(pipe, selectors.EVENT_READ, worker)
        self._board.changed(index.record)

    def _listen(self, seconds: float = TICK_SECONDS) -> None:
        for key, _ in self._selector.select(seconds):
            self._drain(cast("_Worker", key.data), key.fd)
        for worker in [worker for worker in self._running if worker.process.poll() is not None]:
            self._running.remove(worker)
            self._bury(worker)
        self._board.tick()

    def _drain(self, worker: _Worker, fd: int) -> None:
        """Take what a pipe holds; a worker's children may keep it open longer than the worker lives."""
        streams = {
            pipe.fileno(): pipe for pipe in (worker.process.stdout, worker.process.stderr) if pipe and not pipe.closed
        }
        try:
            while data := os.read(fd, 1 << 16):
                if streams[fd] is worker.process.stdout:
                    worker.result += data[: MAX_RESULT_BYTES - len(worker.result)]
                else:
                    self._take_lines(worker, data)
        except BlockingIOError:
            return
        self._selector.unregister(streams[fd])
        streams[fd].close()

    def _take_lines(self, worker: _Worker, data: bytes) -> None:
        worker.line += data
        *lines, rest = worker.line.split(b"\n")
        worker.line = rest if len(rest) < MAX_RESULT_BYTES else bytearray()
        for line in lines:
            self._hear(worker, line.decode(errors="replace"))

    def _hear(self, worker: _Worker, text: str) -> None:
        if not text.strip():
            return
        index = worker.index
        try:
            found: object = json.loads(text)
        except ValueError:
            found = None
        line = cast("Json", found) if isinstance(found, dict) else None
        if line is None:
            worker.tail.append(text)
            self._board.say(index.number, text)
        elif "event" in line:
            index.done, index.total = _number(line, "bytesDone"), _number(line, "bytesTotal")
            index.throughput = _number(line, "bytesPerSecond")
            self._board.progress(index.number, line)
            self._board.changed(index.record)
        else:
            worker.error = line if "hint" in line else worker.error
            self._board.say(index.number, line)

    def _bury(self, worker: _Worker) -> None:
        """Judge a try that has ended."""
        for pipe in (worker.process.stdout, worker.process.stderr):
            if pipe and not pipe.closed:
                self._drain(worker, pipe.fileno())
            if pipe and not pipe.closed:
                self._selector.unregister(pipe)
                pipe.close()
        if worker.line:
            self._hear(worker, worker.line.decode(errors="replace"))
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        code = worker.process.returncode
        self._judge(worker, code if code >= 0 else 128 - code)
        self._board.changed(worker.index.record)

    def _judge(self, worker: _Worker, code: int) -> None:
        index, report = worker.index, _report(worker)
        index.code, index.result = code, _result(worker)
        if report is not None and report.total is not None:
            index.done, index.total, index.throughput = report.done, report.total, report.throughput
        if code == 0:
            self._believe(index, report)
            return
        told = report.reason if report and report.exit_code == code else ""
        index.reason = "Killed" if code > 128 else told or REASONS.get(code, "Bug")
        index.message = _message(worker, code)
        if self._ending is not None:
            index.state = "Pending"
            return
        action = action_for(self._rules, code)
        index.failures += action != "Ignore"
        if action in {"FailIndex", "FailJob"} or index.failures > self._backoff_limit:
            index.state = "Failed"
            if action == "FailJob":
                self._end("FailJob", f"stage {index.number}: {index.message}")
            elif sum(other.state == "Failed" for other in self.indexes) > self._max_failed:
                self._end("MaxFailedStages", f"more than {self._max_failed} stages failed; the last: {index.message}")
            return
        pause = min(RETRY_SECONDS * 2 ** max(index.failures - 1, 0), MAX_RETRY_SECONDS)
        index.state, index.not_before = "Pending", time.monotonic() + pause
        self._board.say(
            index.number,
            {
                "level": "WARNING",
                "message": f"{index.reason} (exit code {code}); tried again in {pause:g} s, "
                f"{self._backoff_limit - index.failures + 1} of {self._backoff_limit} retries left",
            },
        )

    def _believe(self, index: Index, report: Report | None) -> None:
        """An exit code of 0 is a success if the worker's own report proves it, as for the operator."""
        lacking = unproved(report, self._conversion, index.number)
        if lacking or report is None:
            index.state, index.reason, index.message, index.code = "Failed", NO_REPORT, lacking, 70
            return
        index.state, index.done = "Succeeded", index.total or 0
        index.iteration, index.verified = report.iteration, report.verified
        if index.result and index.result.get("ranksConverted") == 0:
            index.reason, index.message = "AlreadyThere", "everything was there already"

    def _end(self, reason: str, message: str) -> None:
        self._ending = self._ending or Ending(reason=reason, message=message)

    def _dismiss(self) -> None:
        """Ask every worker to stop, and make sure of it; a second signal does not wait."""
        for worker in self._running:
            worker.process.terminate()
        limit = time.monotonic() + GRACE_SECONDS
        while self._running:
            if time.monotonic() > limit or len(self._signals) > 1:
                for worker in self._running:
                    worker.process.kill()
            self._listen()

    @contextmanager
    def _listening_to_signals(self) -> Generator[None]:
        def note(number: int, _: FrameType | None) -> None:
            self._signals.append(number)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def action_for(rules: Sequence[Json], code: int) -> str:
    """What a podFailurePolicy does about an exit code; ``Count`` is one more try used up."""
    for rule in rules:
        exits = cast("Mapping[str, object]", rule.get("onExitCodes") or {})
        values = cast("list[int]", exits.get("values", []))
        if exits and (code in values) == (exits.get("operator") == "In"):
            return str(rule["action"])
    return "Count"


def _report(worker: _Worker) -> Report | None:
    """Its termination message, which the operator has too; a killed worker leaves none."""
    try:
        with worker.last_word.open("rb") as file:
            return report_of(file.read(MAX_REPORT + 1).decode(errors="replace"))
    except OSError:
        return None


def _result(worker: _Worker) -> Json | None:
    """What a worker printed on stdout; a plan is there even if it ends with an error."""
    try:
        found: object = json.loads(bytes(worker.result))
    except ValueError:
        return None
    return cast("Json", found) if isinstance(found, dict) else None


def _number(line: Json, name: str) -> int:
    value = line.get(name)
    return value if type(value) is int else 0


def _message(worker: _Worker, code: int) -> str:
    error = worker.error
    if error:
        return f"{error.get('what')} (where: {error.get('where')}; hint: {error.get('hint')})"
    if code > 128:
        return (
            f"killed by {signal.Signals(code - 128).name}" if code - 128 in set(signal.Signals) else f"exit code {code}"
        )
    return "\n".join(worker.tail) or f"exit code {code}, and it said nothing"
