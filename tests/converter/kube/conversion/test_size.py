"""How large a conversion may be, and what is said of one that is larger."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.size import MAX_DEPTH, MAX_FREE, MAX_SPEC, too_large
from ckpt2pt.kube.conversion.spec import parse
from documents import changed


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = {"a": found}
    return found


def of(size: int) -> str:
    """A value that has so many bytes as JSON."""
    return "x" * (size - 2)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("spec.workers.podOverrides", {"spec": {"x": of(MAX_FREE - 15)}}, None),
        ("spec.workers.podOverrides", {"spec": {"x": of(MAX_FREE)}}, "spec.workers.podOverrides: has 65,551 bytes"),
        ("spec.workers.podOverrides", {"spec": {"x": [{}] * 440_000}}, "has 1,320,016 bytes"),
        ("spec.workers.podOverrides", nested(MAX_DEPTH - 3), None),
        ("spec.workers.podOverrides", nested(MAX_DEPTH), "spec.workers.podOverrides: nests more than 32 levels"),
        ("spec.workers.affinity", {"nodeAffinity": nested(MAX_DEPTH)}, "spec.workers.affinity: nests more than"),
        ("spec.workers.affinity", {"nodeAffinity": of(MAX_FREE)}, "spec.workers.affinity: has"),
        ("spec.model.rules", {"modules": {of(MAX_SPEC): "x"}}, "spec: has"),
        ("spec.anything", nested(100), "spec: nests more than 32"),
    ],
)  # fmt: skip
def test_what_is_too_large_is_refused_and_named(field: str, value: object, what: str | None) -> None:
    document = changed((field, value))
    finding = too_large(document["spec"])
    if what is None:
        assert finding is None
        return
    assert finding
    assert what in f"{finding.field}: {finding.what}"
    with pytest.raises(UsageError, match=r"keep it to|nest no more than"):
        parse(document)


@pytest.mark.parametrize("spec", [None, 3, "x", [], {}, {"workers": 3}])
def test_a_spec_of_any_form_is_measured(spec: object) -> None:
    assert too_large(spec) is None
