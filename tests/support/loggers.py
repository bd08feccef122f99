"""Work for worker processes that only says something, or breaks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from ckpt2pt.discover.request import Pace
from ckpt2pt.engine.write import Stop


@dataclass(frozen=True)
class Talking:
    """Each rank warns, or fails with a bug of ours."""

    broken: bool = False
    pace: Pace = field(default_factory=lambda: Pace(workers=2))
    source_bytes: int = 0
    nbytes: int = 0
    paths: tuple[str, ...] = ()

    def plan(self, rank: tuple[int, int], /) -> Talking:
        """The same for every rank."""
        return self

    def run(self, stop: Stop, advance: Callable[[int], None]) -> None:
        """Say it."""
        if self.broken:
            raise ValueError("a bug of ours")
        logging.getLogger("ckpt2pt").warning("%s: mode %04o cannot be set", "a\x1b[31m", 0o400)
