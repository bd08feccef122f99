"""A checkpoint that has been found and read as far as its headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt2pt.core.index import Index


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """``path`` is the folder of the chosen iteration, or of the ranks where one folder holds several iterations.

    ``iteration`` is None where nothing in the checkpoint states it.
    """

    path: Path
    format: str
    iteration: int | None
    tensor: int
    pipeline: int
    index: Index
