"""The numbers of one run: written by the thread that converts, read by the endpoint and at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ckpt2pt.core.progress import Reporter
    from ckpt2pt.core.topology import Rank
    from ckpt2pt.errors import Ckpt2ptError
    from ckpt2pt.run.conversion import Outcome

Json = dict[str, object]
Phase = Literal["Planning", "Waiting", "Converting", "Verifying"]

VERSION = 1
"""Of the documents that leave the worker."""


class Account:
    """A reporter that remembers.  Sizes are in bytes, times in seconds; None is what is not known (yet).

    ``message`` says in one line why the run ended without success, ``failure`` in one word where an exit code would
    mislead.  Of a worker that follows a training the iteration is the last that is converted, and ``reason`` and
    ``message`` tell of a checkpoint that could not be.  ``conversion`` is the uid that the Job has given, ``verified`` how
    the files of that iteration were verified.  ``over`` is whether the files of a run that follows nothing are as they will be.
    """

    def __init__(self) -> None:
        self.stages: Sequence[int] | None = None
        self.iteration: int | None = None
        self.plan: Json | None = None
        self.message = self.reason = self.failure = ""
        self.conversion: str | None = None
        self.verified: str | None = None
        self.following = self.over = False
        self._began = time.monotonic()
        self._converting: float | None = None
        self._waiting = ""
        self._done = self._left = 0
        self._total: int | None = None
        self._result: Json = {}

    def wait(self, what: str = "") -> None:
        """The source is incomplete, and this is what is missing; nothing, now that it is."""
        self._waiting = what

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        """The first byte is about to move."""
        if not self.following:
            self.iteration = iteration
        self._done, self._left, self._total = 0, len(totals), sum(totals.values())
        self._converting = time.monotonic()

    def advance(self, rank: Rank, nbytes: int) -> None:
        """Count."""
        self._done += nbytes

    def end(self, rank: Rank) -> None:
        """One rank less to go."""
        self._left -= 1

    def close(self) -> None:
        """No byte moves any more, and what is done is published."""
        self.over = not self.following

    def converted(self, outcome: Outcome) -> None:
        """Note the result, and what the run warns of."""
        from ckpt2pt.kube.worker.termination import MAX_WARNING, MAX_WARNINGS, plain  # noqa: PLC0415 - a worker's alone

        warnings = [plain(text)[:MAX_WARNING] for text in (*outcome.remarks, *outcome.warnings)]
        self.close()
        self.iteration = outcome.target.iteration
        self.message = self.reason = ""
        self.verified = outcome.verified
        self._result = {
            "bytesWritten": outcome.bytes_written,
            "outputPath": str(outcome.target.folder.relative_to(outcome.target.root)),
            "files": outcome.files,
            "warnings": warnings[:MAX_WARNINGS] or None,
        }

    def on_failure(self, error: Ckpt2ptError) -> None:
        """A checkpoint of a training that is followed could not be converted; the next one may be."""
        from ckpt2pt.kube.conversion.status import REASONS  # noqa: PLC0415 - a worker's alone
        from ckpt2pt.kube.worker.termination import message_of  # noqa: PLC0415

        self.reason, self.message, self._left = REASONS[error.exit_code], message_of(error), 0

    def planned(self, document: Mapping[str, object]) -> None:
        """Note what ``ckpt2pt plan`` found (preview.py)."""
        ranks = document["ranks"]
        each: list[Json] = ranks if isinstance(ranks, list) else []  # pyright: ignore[reportUnknownVariableType]
        files = sum(len(rank["files"]) for rank in each if isinstance(rank["files"], list))  # pyright: ignore[reportUnknownArgumentType]
        self.iteration = int(str(document["iteration"]))
        self._total = int(str(document["bytesToRead"]))
        self.plan = _known(
            {
                "files": files,
                "bytes": document["bytesToWrite"],
                "memory": document["memoryBytes"],
                "freeSpace": document["bytesFree"],
                "ranks": len(each),
            }
        )

    @property
    def phase(self) -> Phase:
        """Where the run stands; once every source byte is read, only reading back is left."""
        if self._converting is None or (self.following and not self._left):
            return "Waiting" if self._waiting or self.following else "Planning"
        return "Verifying" if self._done == self._total and self._left > 0 else "Converting"

    @property
    def throughput(self) -> int | None:
        """Source bytes read in a second, on average since the first."""
        if self._converting is None or not self._done:
            return None
        return round(self._done / max(time.monotonic() - self._converting, 1e-6))

    def progress(self) -> Json:
        """For ``GET /progress``."""
        found: Json = {"version": VERSION, "stages": _listed(self.stages), "phase": self.phase, "bytes": self._done}
        found |= {"bytesTotal": self._total, "throughput": self.throughput, "iteration": self.iteration}
        reason, message = self.reason, self.message
        if self._waiting:
            from ckpt2pt.kube.conversion.status import WAITING  # noqa: PLC0415 - a worker's alone
            from ckpt2pt.kube.worker.termination import plain  # noqa: PLC0415

            reason, message = WAITING, plain(self._waiting)
        return _known(found | ({"reason": reason, "message": message} if reason else {}))

    def facts(self) -> Json:
        """For the termination message: what is known at the end."""
        return _known(
            {
                "conversion": self.conversion,
                "stages": _listed(self.stages),
                "verified": self.verified,
                "bytes": self._done if self._converting is not None else None,
                "bytesTotal": self._total,
                "seconds": round(time.monotonic() - self._began, 3),
                "throughput": self.throughput,
                "iteration": self.iteration,
                **self._result,
                "plan": self.plan,
            }
        )


class Both:
    """Two reporters that hear the same."""

    def __init__(self, one: Reporter, other: Reporter) -> None:
        self._each = (one, other)

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        """Tell both."""
        for each in self._each:
            each.begin(totals, iteration)

    def advance(self, rank: Rank, nbytes: int) -> None:
        """Tell both."""
        for each in self._each:
            each.advance(rank, nbytes)

    def end(self, rank: Rank) -> None:
        """Tell both."""
        for each in self._each:
            each.end(rank)

    def close(self) -> None:
        """Tell both."""
        for each in self._each:
            each.close()


def _listed(stages: Sequence[int] | None) -> list[int] | None:
    return None if stages is None else list(stages)


def _known(document: Json) -> Json:
    return {name: value for name, value in document.items() if value is not None}
