"""Which test modules need torch: they import it, or a module of ``tests/support`` that does."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

_IMPORT = re.compile(r"^ *(?:import|from) +(\w+)", re.MULTILINE)


@cache
def needs_torch(path: Path) -> bool:
    """Whether running this module imports torch, at once or inside a function."""
    names = set(_IMPORT.findall(path.read_text(encoding="utf-8")))
    support = (Path(__file__).with_name(f"{name}.py") for name in names)
    return "torch" in names or any(needs_torch(module) for module in support if module.is_file() and module != path)
