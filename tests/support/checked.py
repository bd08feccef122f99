"""Index a MindSpore file and compare it with the checksum that it states of itself, if it does."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.ckpt import index_file, prove_checksum
from ckpt2pt.tensors import TensorRef


def checked(path: Path) -> dict[str, TensorRef]:
    """As ``index_file``; raises when the checksum is wrong."""
    found = index_file(path)
    prove_checksum(path)
    return found
