"""Index a MindSpore file and compare it with the checksum that it states of itself, if it does."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.formats.mindspore import index_file, prove_checksum


def checked(path: Path) -> dict[str, TensorRef]:
    """As ``index_file``; raises when the checksum is wrong."""
    found = index_file(path)
    prove_checksum(path)
    return found
