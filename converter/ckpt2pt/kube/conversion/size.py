"""How large a conversion may be.  Pure.

An operator holds those of many users.  The schema bounds most fields; these here are as in a pod, of which it knows
nothing, and an API server takes objects of 1.5 MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from ckpt2pt.kube.conversion.fields import Finding

MAX_SPEC = 256 << 10
MAX_FREE = 64 << 10
MAX_DEPTH = 32
FREE = ("podOverrides", "affinity")
"""Fields of spec.workers of any form."""


def too_large(spec: object) -> Finding | None:
    """What is too large, or nested too deeply, in the value of ``spec``; sizes are those of JSON without spaces."""
    workers = _field(spec, "workers")
    parts = [(f"spec.workers.{name}", _field(workers, name), MAX_FREE) for name in FREE]
    for field, value, most in (*parts, ("spec", spec, MAX_SPEC)):
        if _is_deep(value):
            hint = f"nest no more than {MAX_DEPTH} levels"
            return Finding(field=field, what=f"nests more than {MAX_DEPTH} levels", hint=hint)
        size = len(json.dumps(value, separators=(",", ":")))
        if size > most:
            hint = f"keep it to {most:,} bytes; put files into a ConfigMap or into the image"
            return Finding(field=field, what=f"has {size:,} bytes as JSON", hint=hint)
    return None


def _field(value: object, name: str) -> object:
    return cast("Mapping[str, object]", value).get(name) if isinstance(value, Mapping) else None


def _is_deep(value: object) -> bool:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in _inside(item)]
        if not level:
            return False
    return True


def _inside(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(cast("Mapping[str, object]", value).values())
    return cast("list[object]", value) if isinstance(value, list) else []
