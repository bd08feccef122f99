"""How far a conversion is, for whoever shows or counts it.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ckpt2pt.core.topology import Rank

Advance = Callable[[int], None]
"""Gets the number of bytes read since the last call."""


class Reporter(Protocol):
    """Who is informed how it goes."""

    def begin(self, totals: Mapping[Rank, int], iteration: int) -> None:
        """Bytes to read for each rank of the chosen iteration; 0 where it is of no one iteration."""

    def advance(self, rank: Rank, nbytes: int) -> None:
        """Bytes read since the last call."""

    def end(self, rank: Rank) -> None:
        """A rank is done: its files are published, or have been read."""

    def close(self) -> None:
        """Nothing more will come, for whatever reason."""


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


SILENCE = Silence()


def no_progress(_: int) -> None:
    """An :data:`Advance` of work that nobody watches."""


class Portion:
    """One rank's share of a reading whose size was estimated: it never passes its total, and ends at it."""

    def __init__(self, reporter: Reporter, rank: Rank, total: int) -> None:
        self._reporter, self._rank, self._left = reporter, rank, total

    def advance(self, nbytes: int) -> None:
        """Count bytes that were read."""
        known = min(nbytes, self._left)
        self._left -= known
        self._reporter.advance(self._rank, known)

    def fill(self) -> None:
        """Count what is left of the estimate."""
        self.advance(self._left)

    def end(self) -> None:
        """The same, and the rank is done."""
        self.fill()
        self._reporter.end(self._rank)
