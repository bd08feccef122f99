"""Ranks at work: here, or in worker processes; deadlines, signals, and no failure that is not reported."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Protocol, cast

from ckpt2pt.core.progress import Reporter
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.request import Pace
from ckpt2pt.engine.write import Meter, Stop
from ckpt2pt.errors import Ckpt2ptError, InterruptedRunError, TimedOutError, TryAgainError, aside, of_rank, ref
from ckpt2pt.io.access import access_error
from ckpt2pt.io.parent import end_with
from ckpt2pt.publish import Lock

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

_MEMORY_HINT = (
    f"give it more memory{aside('workers.resources')} or fewer workers{aside('workers.processes')}, and run again"
)


class Share(Protocol):
    """One rank, planned completely and sized."""

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        ...

    @property
    def paths(self) -> Sequence[str]:
        """Files to write, from the target's folder on."""
        ...

    def run(self, stop: Stop, advance: Callable[[int], None]) -> None:
        """Write its files and publish them."""
        ...


class Work(Protocol):
    """What is done rank by rank; worker processes get a copy of it."""

    @property
    def pace(self) -> Pace:
        """How many ranks at a time, and for how long."""
        ...

    def plan(self, rank: Rank, /) -> Share:
        """One rank, ready to be carried."""
        ...


def work_through(
    work: Work, todo: Sequence[Rank], alone: Share | None, reporter: Reporter, stop: Stop, locks: Sequence[Lock] = ()
) -> None:
    """Here or in processes; ``alone`` is the only rank, as it was planned before.

    Worker processes hold ``locks`` as well: as long as one of them is at work, nobody else takes them for ended.
    """
    pace = work.pace
    if pace.in_process or len(todo) <= 1:
        for rank in todo:
            with of_rank(rank), _deadline(pace.timeout, rank, stop):
                _carry(alone or work.plan(rank), stop, Meter(partial(reporter.advance, rank)))
            reporter.end(rank)
        return
    _Pool(work, reporter, stop, locks).work(todo)


def _carry(share: Share, stop: Stop, meter: Meter) -> None:
    share.run(stop, meter.advance)
    meter.flush()
    gc.collect()  # cycles keep its buffers, and the next rank would need its own beside them


@contextmanager
def _deadline(seconds: float | None, rank: Rank, stop: Stop) -> Generator[None]:
    timer = threading.Timer(seconds, stop.ask, [_timed_out(rank, seconds)]) if seconds else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer:
            timer.cancel()


def _timed_out(rank: Rank, seconds: float) -> TimedOutError:
    return TimedOutError(
        f"the rank was not converted within {seconds:g} seconds",
        where=f"tp {rank[0]} pp {rank[1]}",
        hint=f"give more time{aside('workers.rankTimeoutSeconds')}, and run the same command again: what is finished is kept",
    )


@contextmanager
def stopped_by_signals() -> Generator[Stop]:
    """SIGTERM and SIGINT ask the run to stop; a second one ends the process at once."""
    stop = Stop()

    def ask(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        stop.ask(
            InterruptedRunError(
                f"stopped by {name}", where="this run", hint="run the same command again: what is finished is kept"
            )
        )
        signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class _Hand:
    """A worker process and the rank that it is doing."""

    rank: Rank
    process: SpawnProcess
    pipe: Connection
    deadline: float | None = None


class _Pool:
    """Runs ranks in at most ``workers`` processes; every failure is reported.

    A process does one rank after another: to start Python and numpy costs more than a small rank.
    """

    def __init__(self, work: Work, reporter: Reporter, stop: Stop, locks: Sequence[Lock]) -> None:
        self._work, self._reporter, self._stop, self._locks = work, reporter, stop, locks
        self._hands: list[_Hand] = []
        self._waiting: deque[Rank] = deque()

    def work(self, todo: Sequence[Rank]) -> None:
        from multiprocessing.connection import wait  # noqa: PLC0415 - 2 MiB, which a rank in this process does without

        self._waiting.extend(todo)
        try:
            while self._waiting or self._hands:
                self._stop.check()
                while self._waiting and len(self._hands) < max(1, self._work.pace.workers):
                    self._hands.append(self._start())
                for ready in wait([hand.pipe for hand in self._hands], timeout=0.2):
                    hand = next(hand for hand in self._hands if hand.pipe is ready)
                    with of_rank(hand.rank):
                        self._hear(hand)
                late = next((h for h in self._hands if h.deadline and time.monotonic() > h.deadline), None)
                if late:
                    with of_rank(late.rank):
                        raise _timed_out(late.rank, self._work.pace.timeout or 0)
        finally:
            self._dismiss()

    def _start(self) -> _Hand:
        from multiprocessing import get_context  # noqa: PLC0415 - as above

        context = get_context("spawn")
        try:
            ours, theirs = context.Pipe()
            words = (self._work, theirs, os.getpid(), tuple(self._locks))
            process = context.Process(target=work_on_ranks, args=words)
            with _deaf_to_interrupts():
                process.start()
        except OSError as error:
            raise _not_started(error, "worker of tp {} pp {}".format(*self._waiting[0])) from error
        theirs.close()
        hand = _Hand(self._waiting[0], process, ours)
        self._assign(hand)
        return hand

    def _assign(self, hand: _Hand) -> None:
        """Give it the next rank, and its time."""
        hand.rank = self._waiting.popleft()
        timeout = self._work.pace.timeout
        hand.deadline = time.monotonic() + timeout if timeout else None
        with suppress(OSError):  # it has died: `_hear` tells how
            hand.pipe.send(hand.rank)

    def _hear(self, hand: _Hand) -> None:
        try:
            message: object = hand.pipe.recv()
        except (EOFError, OSError):  # a reset, where it died before it read its next rank
            hand.process.join()
            self._stop.check()  # whoever stopped us may have stopped it as well
            raise TryAgainError(
                f"the worker died with exit code {hand.process.exitcode} (-9 is a kill, often for want of memory)",
                where=f"tp {hand.rank[0]} pp {hand.rank[1]}",
                hint=_MEMORY_HINT,
            ) from None
        if isinstance(message, int):
            self._reporter.advance(hand.rank, message)
        elif isinstance(message, logging.LogRecord):
            logging.getLogger(message.name).handle(message)
        elif isinstance(message, BaseException):
            raise message
        else:
            self._reporter.end(hand.rank)
            if self._waiting:
                self._assign(hand)
                return
            self._hands.remove(hand)
            hand.pipe.close()
            hand.process.join()

    def _dismiss(self) -> None:
        """Ask every worker left to stop, and make sure of it."""
        for hand in self._hands:
            hand.process.terminate()
            hand.pipe.close()
        for hand in self._hands:
            hand.process.join(5)
            if hand.process.is_alive():
                hand.process.kill()
                hand.process.join()


def _not_started(error: OSError, worker: str) -> Ckpt2ptError:
    """A process takes descriptors, memory and a place among the processes that are allowed."""
    if error.errno == errno.EPIPE:
        return TryAgainError(
            "the worker died as it was started",
            where=worker,
            hint=_MEMORY_HINT,
        )
    if error.errno != errno.EAGAIN:
        return access_error(error, worker, "starting a worker process")
    return TryAgainError(
        "a worker process could not be started: no more processes are allowed here",
        where=worker,
        hint=f"raise the limit (ulimit -u, the pids limit of the container), or lower {ref('workers.processes')}; then run again",
    )


@contextmanager
def _deaf_to_interrupts() -> Generator[None]:
    """Processes started here never hear Ctrl-C, which a terminal sends to all of them: we tell them ourselves.

    Ours is only put off until the end of the block.
    """
    from multiprocessing import resource_tracker  # noqa: PLC0415 - as above

    resource_tracker.ensure_running()  # as it starts it would take the block away (python/cpython, resource_tracker.py)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work_on_ranks(work: Work, pipe: Connection, parent: int, _: Sequence[Lock]) -> None:
    """The body of a worker process, which ends with its parent.

    It gets ranks until the pipe is closed; for each it sends bytes done as integers, log records, then None, or the
    error, its last.
    """
    end_with(parent, signal.SIGKILL)
    logging.getLogger().handlers[:] = [_ToParent(pipe)]
    with stopped_by_signals() as stop:

        def report(nbytes: int) -> None:
            try:
                pipe.send(nbytes)
            except OSError:
                stop.ask(
                    InterruptedRunError("the parent process is gone", where=f"pid {os.getppid()}", hint="run it again")
                )

        meter = Meter(report)
        try:
            while (rank := _next(pipe)) is not None:
                _carry(work.plan(rank), stop, meter)
                _say(pipe, None)
        except Ckpt2ptError as error:
            _say(pipe, error)
        except Exception as bug:
            bug.add_note(f"in the worker process:\n{traceback.format_exc()}")
            _say(pipe, bug)
            raise SystemExit(70) from bug  # in silence: the parent raises it


def _next(pipe: Connection) -> Rank | None:
    try:
        return cast("Rank", pipe.recv())
    except (EOFError, OSError):
        return None  # nothing more is to be done


def _say(pipe: Connection, message: Exception | logging.LogRecord | None) -> None:
    with suppress(OSError):  # the parent has gone, and there is nobody to tell
        pipe.send(message)


class _ToParent(logging.Handler):
    """Sends records to the parent, which alone knows in what form they are shown."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), ()  # whatever the arguments are, text can be sent
        record.exc_info = None
        _say(self._pipe, record)
