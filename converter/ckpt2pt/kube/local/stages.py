"""The stages of a conversion on this machine: one run after another, until each is done or has failed.

todo --run.run: a pool of workers, what is finished is kept--> done
 ^                    |  error of a rank
 |   may pass         v
 '-- after a pause -- its stage --> Failed: the others go on without it
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ckpt2pt.core.progress import Reporter
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import FAILS_JOB, FAILS_STAGE, Ckpt2ptError, InterruptedRunError
from ckpt2pt.kube.conversion.spec import Conversion
from ckpt2pt.kube.conversion.status import REASONS, Ending, StageRecord, State
from ckpt2pt.kube.worker.account import Both
from ckpt2pt.kube.worker.termination import message_of, plain
from ckpt2pt.run.conversion import Outcome, run
from ckpt2pt.run.targets.request import AnyRequest

log = logging.getLogger("ckpt2pt")

RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 30.0

OnFailure = Callable[[int, Ckpt2ptError], None]
"""Called with a stage that is given up, and why."""


@dataclass(slots=True)
class Stage:
    """What has become of one stage."""

    number: int
    state: State = "Pending"
    failures: int = 0
    code: int = 0
    reason: str = ""
    message: str = ""
    done: int = 0
    total: int = 0
    began: float = 0.0
    seconds: float = 0.0
    iteration: int | None = None
    verified: str = ""

    @property
    def record(self) -> StageRecord:
        """The frozen view of it."""
        return StageRecord(
            stage=self.number,
            state=self.state,
            reason=self.reason,
            message=self.message,
            done=self.done,
            total=self.total or None,
            throughput=round(self.done / self.seconds) if self.seconds else 0,
            attempts=self.failures + (self.state in {"Running", "Succeeded"}),
            iteration=self.iteration,
            verified=self.verified,
        )


class Stages:
    """A reporter that keeps a record of each stage, and the loop that carries them out."""

    def __init__(self, conversion: Conversion, request: Callable[[], AnyRequest], on_failure: OnFailure) -> None:
        spec = conversion.spec
        self._request, self._on_failure, self._retries = request, on_failure, spec.retries.per_stage
        most = spec.retries.max_failed_stages
        self._most_failed = conversion.topology.pipeline if most is None else most
        self._deadline = spec.active_deadline_seconds
        self._left: dict[int, int] = {}
        self.stages = [Stage(number) for number in range(conversion.topology.pipeline)]

    @property
    def records(self) -> list[StageRecord]:
        """Of every stage."""
        return [stage.record for stage in self.stages]

    def carry_out(self, reporter: Reporter) -> Ending | None:
        """Until every stage is done or has failed; returns why it ended before that."""
        with _deadline(self._deadline) as late:
            try:
                return self._run(Both(self, reporter))
            except InterruptedRunError as error:
                self._rest()
                if late():
                    message = f"not done within activeDeadlineSeconds ({self._deadline})"
                    return Ending(reason="DeadlineExceeded", message=message)
                return Ending(
                    reason="Interrupted", message=f"{plain(error.what)}; run it again, what is finished is kept"
                )

    def _run(self, reporter: Reporter) -> Ending | None:
        while todo := [stage for stage in self.stages if stage.state not in {"Succeeded", "Failed"}]:
            for stage in todo:
                stage.state = "Running"
            try:
                self._succeed(run(self._request(), [stage.number for stage in todo], reporter))
            except InterruptedRunError:
                raise
            except Ckpt2ptError as error:
                numbers = {stage.number: stage for stage in todo}
                stage = numbers.get(error.rank[1], todo[0]) if error.rank else todo[0]
                if ending := self._fail(stage, error):
                    self._rest()
                    return ending
        return None

    def _succeed(self, outcome: Outcome) -> None:
        written = {pp for _, pp in outcome.converted}
        for number in outcome.stages:
            stage = self.stages[number]
            stage.state, stage.done = "Succeeded", stage.total
            stage.code, stage.reason, stage.message = 0, "", ""
            stage.iteration, stage.verified = outcome.target.iteration, outcome.verified.capitalize()
            if number not in written:
                stage.reason, stage.message = "AlreadyThere", "everything was there already"

    def _fail(self, stage: Stage, error: Ckpt2ptError) -> Ending | None:
        """Give the stage up, or wait a little."""
        code = error.exit_code
        stage.failures += 1
        stage.code, stage.reason, stage.message = code, error.reason or REASONS[code], message_of(error)
        if code not in FAILS_JOB | FAILS_STAGE and stage.failures <= self._retries:
            pause = min(RETRY_SECONDS * 2 ** (stage.failures - 1), MAX_RETRY_SECONDS)
            left = self._retries - stage.failures + 1
            form = "stage %d: %s; tried again in %g s, %d of %d retries left"
            log.warning(form, stage.number, error.what, pause, left, self._retries)
            self._rest()
            time.sleep(pause)
            return None
        stage.state = "Failed"
        self._on_failure(stage.number, error)
        if code in FAILS_JOB:
            return Ending(reason="FailJob", message=f"stage {stage.number}: {stage.message}")
        if sum(other.state == "Failed" for other in self.stages) > self._most_failed:
            message = f"more than {self._most_failed} stages failed; the last: {stage.message}"
            return Ending(reason="MaxFailedStages", message=message)
        return None

    def _rest(self) -> None:
        """Nothing runs any more, or not for now."""
        for stage in self.stages:
            if stage.state == "Running":
                stage.state = "Pending"

    # ------------------------------------------------------------------------------------------------- as a reporter

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        """Note how much each stage has to read."""
        now = time.monotonic()
        self._left = {}
        for (_, pp), nbytes in totals.items():
            stage = self.stages[pp]
            if pp not in self._left:
                stage.done, stage.total, stage.began, stage.iteration = 0, 0, now, iteration
            stage.total += nbytes
            self._left[pp] = self._left.get(pp, 0) + 1

    def advance(self, rank: Rank, nbytes: int) -> None:
        """Count."""
        self.stages[rank[1]].done += nbytes

    def end(self, rank: Rank) -> None:
        """One rank less to go."""
        stage = self.stages[rank[1]]
        self._left[rank[1]] -= 1
        if not self._left[rank[1]]:
            stage.seconds = time.monotonic() - stage.began

    def close(self) -> None:
        """Nothing to do."""


@contextmanager
def _deadline(seconds: int | None) -> Generator[Callable[[], bool]]:
    """SIGTERM for this process after so many seconds; yields whether they have passed."""
    passed = threading.Event()

    def end() -> None:
        passed.set()
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(seconds, end) if seconds else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield passed.is_set
    finally:
        if timer:
            timer.cancel()


def request_here(request: AnyRequest, stages_at_a_time: int) -> AnyRequest:
    """As many ranks at a time as that many workers of a cluster would do, and no more than this machine has cores."""
    return replace(request, workers=max(1, min(os.cpu_count() or 1, request.workers * stages_at_a_time)))
