"""Names of options that no edge has spelled, in what the programs under test print and write."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ckpt2pt.errors import FIELDS, FLAG_ONLY

_BEGIN, _END = (rf"(?:\x0{digit}|\\x0{digit}|\\u000{digit})" for digit in "23")
_MARKER = re.compile(rf"{_BEGIN}\(?(?:{'|'.join(map(re.escape, FIELDS | FLAG_ONLY))}){_END}")
_PAYLOAD = frozenset({".ckpt", ".safetensors", ".pt", ".bin", ".npy"})
_MOST = 1 << 20


def marked(text: str) -> list[str]:
    """Markers in ``text``, as they are or as Python or JSON escapes them."""
    return _MARKER.findall(text)


def marked_files(folder: Path) -> Iterator[str]:
    """Files below with such a marker; not payload, and nothing above 1 MiB."""
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            if path.suffix not in _PAYLOAD and path.is_file() and path.stat().st_size <= _MOST:
                yield from (f"{path}: {found}" for found in marked(path.read_bytes().decode("latin-1")))
