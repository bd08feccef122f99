"""What every status has to be: as the CRD describes it, with nothing that an API server would take out again."""

from __future__ import annotations

import re
from collections import Counter
from copy import deepcopy
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from documents import root_schema

_RANGES = {"int32": 1 << 31, "int64": 1 << 63}


@cache
def _validator() -> Draft202012Validator:
    schema = deepcopy(root_schema()["properties"]["status"])
    _close(schema)
    return Draft202012Validator(schema)


def _close(schema: dict[str, Any]) -> None:
    """Refuse what would be pruned, and integers that do not fit."""
    if schema.get("type") == "object":
        schema["additionalProperties"] = False
        for inner in schema.get("properties", {}).values():
            _close(inner)
    if schema.get("type") == "array":
        _close(schema["items"])
    if schema.get("format") in _RANGES:
        schema |= {"maximum": _RANGES[schema["format"]] - 1, "minimum": 0}


def check_status(status: object) -> None:
    """Fail with the place that is wrong."""
    wrong = [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in _validator().iter_errors(status)]
    assert not wrong, wrong
    assert isinstance(status, dict)
    conditions = status["conditions"]
    types = Counter(condition["type"] for condition in conditions)
    assert max(types.values()) == 1, types
    reasons = [c["reason"] for c in conditions] + [
        s["reason"] for s in status.get("stageStatuses", []) if "reason" in s
    ]
    odd = [reason for reason in reasons if not re.fullmatch(r"[A-Z][A-Za-z0-9]*", reason)]
    assert not odd, f"not CamelCase: {odd}"
    told = {condition["type"]: condition["status"] for condition in conditions}
    assert (told["Complete"] == "True") == (status["phase"] in {"Succeeded", "Planned"})
    assert (told["Failed"] == "True") == (status["phase"] in {"Failed", "Cancelled"})
    assert told["Ready"] == told["Complete"]


def told(status: dict[str, Any], kind: str) -> tuple[str, str]:
    """Status and reason of a condition."""
    [found] = [c for c in status["conditions"] if c["type"] == kind]
    return found["status"], found["reason"]
