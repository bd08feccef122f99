"""Documents are read field by field, and every mistake in one is told at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckpt2pt.conversion.fields import Fields, Finding, refusal


def test_null_is_as_good_as_absent() -> None:
    findings: list[Finding] = []
    fields = Fields({"a": None, "b": None, "c": None}, "spec", findings)
    assert (fields.number("a", 7), fields.flag("b"), fields.text("c", "x"), fields.choice("a", "One", "Two")) == (
        7, False, "x", "One",
    )  # fmt: skip
    assert fields.items() == []
    assert findings == []


@pytest.mark.parametrize(
    ("value", "reader"),
    [
        pytest.param("4", "number", id="text-for-a-number"),
        pytest.param(True, "number", id="a-flag-for-a-number"),
        pytest.param(0, "number", id="too-small"),
        pytest.param(4, "text", id="a-number-for-text"),
        pytest.param("yes", "flag", id="text-for-a-flag"),
        pytest.param("Three", "choice", id="no-such-choice"),
        pytest.param([1, "2"], "numbers", id="text-in-a-list-of-numbers"),
        pytest.param(3, "numbers", id="a-number-for-a-list"),
    ],
)
def test_a_wrong_value_is_noted_and_reading_goes_on(value: object, reader: str) -> None:
    findings: list[Finding] = []
    fields = Fields({"f": value}, "spec.x", findings)
    readers: dict[str, Callable[[], object]] = {
        "number": lambda: fields.number("f", 1),
        "text": lambda: fields.text("f", ""),
        "flag": lambda: fields.flag("f"),
        "choice": lambda: fields.choice("f", "One", "Two"),
        "numbers": lambda: fields.numbers("f"),
    }
    harmless = readers[reader]()
    assert harmless in (1, "", False, "One", None)
    [finding] = findings
    assert finding.field == "spec.x.f"
    assert finding.hint


@pytest.mark.parametrize("character", ["\0", "\ud800"])
def test_text_that_no_path_and_no_name_can_be_is_noted_once(character: str) -> None:
    findings: list[Finding] = []
    fields = Fields({"path": f"a{character}b"}, "spec", findings)
    assert [fields.text("path", "") for _ in range(2)] == ["a_b"] * 2
    assert findings == [
        Finding(
            field="spec.path",
            what=f"is {f'a{character}b'!r}",
            hint="leave out the character that no path and no name can have",
        )
    ]


def test_a_child_that_is_no_mapping_is_noted_once() -> None:
    findings: list[Finding] = []
    child = Fields({"model": 4}, "spec", findings).child("model")
    assert child.optional("numLayers") is None
    assert [finding.field for finding in findings] == ["spec.model"]


def test_one_finding_is_an_ordinary_error_and_several_are_a_list() -> None:
    one = Finding(field="spec.a", what="is 1", hint="write 2")
    two = Finding(field="spec.b", what="is 3", hint="write 4")
    alone = refusal([one], "demo.yaml")
    assert (alone.what, alone.where, alone.hint) == ("spec.a is 1", "demo.yaml: spec.a", "write 2")
    both = refusal([one, two], "demo.yaml")
    assert both.exit_code == 64
    assert "2 fields are wrong" in both.what
    assert "- spec.a: is 1; write 2" in both.what
    assert "- spec.b: is 3; write 4" in both.what
