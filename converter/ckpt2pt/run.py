"""Carry out a conversion, in either direction: preflight, claim, ranks in parallel, publish.

measure every rank asked for            nothing has been written; everything that can be wrong is found here
-> claim, lock of the stage
-> one process a rank                   a rank's files appear together, by rename
-> stage manifest                       when every rank of the stage is there and verified
-> report, tracker                      when every stage is there; by whoever sees it first
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Protocol

from ckpt2pt import __version__
from ckpt2pt.engine import Meter, Stop, write_files
from ckpt2pt.errors import Ckpt2ptError, InterruptedRunError, TimedOutError, TryAgainError
from ckpt2pt.meta import assumed
from ckpt2pt.plan.moves import moves
from ckpt2pt.publish import Json, Target, access_error, check_space
from ckpt2pt.request import Pace, Request, Verify
from ckpt2pt.survey import Prepared, Rank, Survey, prepare, survey


class Reporter(Protocol):
    """Who is told how it goes."""

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        """Bytes to read for each rank of the chosen iteration."""

    def advance(self, rank: Rank, nbytes: int) -> None:
        """Bytes read since the last call."""

    def end(self, rank: Rank) -> None:
        """A rank's files are published."""

    def close(self) -> None:
        """Nothing more will come, for whatever reason."""


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

    def carry(self, stop: Stop, advance: Callable[[int], None]) -> None:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is converted, in either direction; worker processes get a copy of it.

    ``meaning`` are the options that decide what is written, ``facts`` what else the manifest of a stage tells,
    ``doubts`` what contradicts the chosen iteration.
    """

    target: Target
    pace: Pace
    verify: Verify
    overwrite: bool
    meaning: Json
    facts: Json
    doubts: tuple[str, ...]
    plan: Callable[[Rank], Share]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did."""

    target: Target
    stages: tuple[int, ...]
    converted: tuple[Rank, ...]
    kept: tuple[Rank, ...]
    bytes_written: int
    files: int
    seconds: float
    published: bool
    doubts: tuple[str, ...]
    asked_to_stop: InterruptedRunError | None = None
    """A signal that came too late to stop this run; whoever would go on must heed it."""

    def document(self) -> Json:
        """For ``--output json`` and the termination message."""
        return {
            "iteration": self.target.iteration,
            "folder": str(self.target.folder),
            "stages": list(self.stages),
            "ranksConverted": len(self.converted),
            "ranksKept": len(self.kept),
            "bytesWritten": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "published": self.published,
            "doubts": list(self.doubts),
        }

    def sentence(self) -> str:
        """For a person."""
        stages = f"{len(self.stages)} of {self.target.stages} stages"
        did = f"wrote {len(self.converted)} ranks ({self.bytes_written} bytes) in {self.seconds:.1f} s"
        if not self.converted:
            did = "everything was there already"
        elif self.kept:
            did += f", kept {len(self.kept)} that were there"
        end = (
            f"published; {self.target.reader} can load it"
            if self.published
            else "the tracker waits for the other stages"
        )
        return f"iteration {self.target.iteration}, {stages}: {did}\n{self.target.folder}\n{end}"


def target_of(request: Request, chosen: Survey) -> Target:
    """The folder that the chosen checkpoint goes into."""
    return Target(
        root=request.target,
        iteration=chosen.clock.iteration,
        identity=chosen.identity,
        stages=request.topology.pipeline,
        tensor=request.topology.tensor,
    )


@dataclass(frozen=True, slots=True)
class _Forward:
    """One rank on its way to Megatron."""

    request: Request
    chosen: Survey
    prepared: Prepared

    @property
    def source_bytes(self) -> int:
        return self.prepared.plan.source_bytes

    @property
    def nbytes(self) -> int:
        return sum(self.prepared.sizes.values())

    def carry(self, stop: Stop, advance: Callable[[int], None]) -> None:
        convert_rank(self.request, self.chosen, self.prepared, stop, advance)


def _plan(request: Request, chosen: Survey, rank: Rank) -> _Forward:
    return _Forward(request, chosen, prepare(request, chosen, rank))


def run(request: Request, stages: Sequence[int], reporter: Reporter) -> Outcome:
    """Convert the given pipeline stages; what an earlier run finished is kept."""
    began = time.monotonic()
    ranks = [(tp, pp) for pp in stages for tp in range(request.topology.tensor)]
    chosen = survey(request, keep=ranks if len(ranks) == 1 else ())
    conversion = Conversion(
        target=target_of(request, chosen),
        pace=request.pace,
        verify=request.verify,
        overwrite=request.overwrite,
        meaning=request.meaning(),
        facts={"inputs": chosen.inputs, "assumed": assumed(request.metadata)},
        doubts=chosen.clock.doubts,
        plan=partial(_plan, request, chosen),
    )
    return carry_out(conversion, stages, reporter, began)


def convert_rank(
    request: Request, chosen: Survey, prepared: Prepared, stop: Stop, advance: Callable[[int], None]
) -> None:
    """Convert one rank and publish it."""
    rank = prepared.plan.tp, prepared.plan.pp
    target = target_of(request, chosen)
    folder = target.folder / prepared.plan.directory
    _check_twins(prepared)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise access_error(error, folder, "making the folder") from error
    target.sweep(*rank, prepared.plan.directory)
    files, digests = write_files(
        folder,
        prepared.files,
        moves(prepared.plan),
        stop=stop,
        advance=advance,
        check=request.verify != "none",
    )
    if request.verify == "full":
        from ckpt2pt.verify.prove import verify_rank  # noqa: PLC0415 - a second reader, loaded only when asked for

        verify_rank(request, chosen, rank, target.folder).raise_differences()
    target.publish_rank(
        rank[0],
        rank[1],
        {
            "tp": rank[0],
            "pp": rank[1],
            "source": prepared.plan.source,
            "verified": request.verify,
            "files": [file.entry(target.folder) for file in files],
            "tensors": {label: f"{crc:08x}" for label, crc in sorted(digests.items())},
            "ignored": dict(prepared.plan.ignored),
        },
    )


def _check_twins(prepared: Prepared) -> None:
    """Compare tied copies of which only one is carried."""
    if not prepared.plan.twins:
        return
    from ckpt2pt.verify.compare import same_bytes  # noqa: PLC0415 - rare

    for kept, copy in prepared.plan.twins:
        same_bytes(kept, copy)


def carry_out(conversion: Conversion, stages: Sequence[int], reporter: Reporter, began: float) -> Outcome:
    """Convert the given pipeline stages; what an earlier run finished is kept."""
    target = conversion.target
    target.check(overwrite=conversion.overwrite)
    ranks = [(tp, pp) for pp in stages for tp in range(target.tensor)]
    kept = tuple(rank for rank in ranks if _is_proved(target.rank_manifest(*rank), conversion.verify))
    todo = tuple(rank for rank in ranks if rank not in kept)
    totals: dict[Rank, int] = {}
    size = 0
    alone: Share | None = None
    for rank in todo:
        # One at a time: the plans of many ranks would not fit into the memory of one.
        share = conversion.plan(rank)
        totals[rank] = share.source_bytes
        size += share.nbytes
        alone = share if len(todo) == 1 else None
    check_space(target, size)
    options = {"version": __version__, "options": conversion.meaning}
    with stopped_by_signals() as stop:
        target.claim({**options, "begun": _now()}, overwrite=conversion.overwrite)
        with ExitStack() as locks:
            for pp in stages:
                locks.enter_context(target.stage_lock(pp))
            reporter.begin(totals, target.iteration)
            try:
                work_through(conversion, todo, alone, reporter, stop)
            finally:
                reporter.close()
            for pp in stages:
                target.publish_stage(pp, {**options, "iteration": target.iteration, **conversion.facts})
        published = target.publish_iteration()
    return Outcome(
        target=target,
        stages=tuple(stages),
        converted=todo,
        kept=kept,
        bytes_written=size,
        files=sum(target.file_count(*rank) for rank in ranks),
        seconds=time.monotonic() - began,
        published=published,
        doubts=conversion.doubts,
        asked_to_stop=stop.error if isinstance(stop.error, InterruptedRunError) else None,
    )


def _is_proved(manifest: Json | None, verify: Verify) -> bool:
    """True for a finished rank that was verified as thoroughly as is asked for now."""
    return manifest is not None and _PROOFS.get(str(manifest.get("verified")), -1) >= _PROOFS[verify]


_PROOFS = {"none": 0, "digest": 1, "full": 2}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def work_through(work: Work, todo: Sequence[Rank], alone: Share | None, reporter: Reporter, stop: Stop) -> None:
    """Here or in processes; ``alone`` is the only rank, as it was planned before."""
    pace = work.pace
    if pace.in_process or len(todo) <= 1:
        for rank in todo:
            with _deadline(pace.timeout, rank, stop):
                meter = Meter(partial(reporter.advance, rank))
                (alone or work.plan(rank)).carry(stop, meter.advance)
                meter.flush()
            reporter.end(rank)
        return
    _Crew(work, reporter, stop).work(todo)


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
        mend="give more time with --process_timeout, and run the same command again: what is finished is kept",
    )


@contextmanager
def stopped_by_signals() -> Generator[Stop]:
    """SIGTERM and SIGINT ask the run to stop; a second one ends the process at once."""
    stop = Stop()

    def ask(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        stop.ask(
            InterruptedRunError(
                f"stopped by {name}", where="this run", mend="run the same command again: what is finished is kept"
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
    """A worker process and what it is doing."""

    rank: Rank
    process: SpawnProcess
    pipe: Connection
    deadline: float | None


class _Crew:
    """Runs ranks in processes of their own, at most ``workers`` at a time; every failure is heard."""

    def __init__(self, work: Work, reporter: Reporter, stop: Stop) -> None:
        self._work, self._reporter, self._stop = work, reporter, stop
        self._hands: list[_Hand] = []

    def work(self, todo: Sequence[Rank]) -> None:
        waiting = list(todo)
        try:
            while waiting or self._hands:
                self._stop.check()
                while waiting and len(self._hands) < max(1, self._work.pace.workers):
                    self._hands.append(self._start(waiting.pop(0)))
                for ready in wait([hand.pipe for hand in self._hands], timeout=0.2):
                    self._hear(next(hand for hand in self._hands if hand.pipe is ready))
                late = next((h for h in self._hands if h.deadline and time.monotonic() > h.deadline), None)
                if late:
                    raise _timed_out(late.rank, self._work.pace.timeout or 0)
        finally:
            self._dismiss()

    def _start(self, rank: Rank) -> _Hand:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work_on_rank, args=(self._work, rank, theirs), name=f"tp{rank[0]}-pp{rank[1]}")
        process.start()
        theirs.close()
        timeout = self._work.pace.timeout
        return _Hand(rank, process, ours, time.monotonic() + timeout if timeout else None)

    def _hear(self, hand: _Hand) -> None:
        try:
            message: object = hand.pipe.recv()
        except EOFError:
            hand.process.join()
            raise TryAgainError(
                f"the worker died with exit code {hand.process.exitcode} (-9 is a kill, often for want of memory)",
                where=f"tp {hand.rank[0]} pp {hand.rank[1]}",
                mend="give it more memory (spec.workers.resources) or fewer workers (--process-limit), and run again",
            ) from None
        if isinstance(message, int):
            self._reporter.advance(hand.rank, message)
        elif isinstance(message, BaseException):
            raise message
        else:
            self._hands.remove(hand)
            hand.pipe.close()
            hand.process.join()
            self._reporter.end(hand.rank)

    def _dismiss(self) -> None:
        """Ask every worker left to stop, and make sure of it."""
        for hand in self._hands:
            hand.process.terminate()
        for hand in self._hands:
            hand.process.join(5)
            if hand.process.is_alive():
                hand.process.kill()
                hand.process.join()
            hand.pipe.close()


def work_on_rank(work: Work, rank: Rank, pipe: Connection) -> None:
    """The body of a worker process: bytes done as integers, then None, or the error."""
    with stopped_by_signals() as stop:

        def report(nbytes: int) -> None:
            try:
                pipe.send(nbytes)
            except OSError:
                stop.ask(
                    InterruptedRunError("the parent process is gone", where=f"pid {os.getppid()}", mend="run it again")
                )

        meter = Meter(report)
        try:
            work.plan(rank).carry(stop, meter.advance)
            meter.flush()
            pipe.send(None)
        except Ckpt2ptError as error:
            pipe.send(error)
        except Exception as bug:
            pipe.send(bug)
            raise
