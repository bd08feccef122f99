"""Numbers as people read them.  Documents for programs keep bytes and plain numbers."""

from __future__ import annotations

import re


def size(nbytes: float) -> str:
    """``1536`` -> ``1.5 KiB``."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def counted(number: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``, ``12,345 ranks``."""
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def grouped(sentence: str) -> str:
    """A sentence with its counts of five digits or more as ``12,345``."""
    return re.sub(r"(?<![\w.])\d{5,}(?![\w.])", lambda found: f"{int(found[0]):,}", sentence)
