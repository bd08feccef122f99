"""A report is bounded and clean whatever a worker leaves, and proves a stage only if every part of it fits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.kube.conversion.report import Preview, clean, number, report_of, text, unproved, word
from ckpt2pt.kube.conversion.spec import Conversion, parse
from documents import changed

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        ("3", 3),
        (2.9, 2),
        (-1, 7),
        (True, 7),
        (None, 7),
        (1 << 63, 7),
        ("1" * 40, 7),
        (float("nan"), 7),
        ([], 7),
    ],
)
def test_number(value: object, expected: int) -> None:
    assert number({"n": value}, "n", 7) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [("StageFailed", "StageFailed"), ("not a word", ""), ("lower", ""), ("A\n", "A"), (3, "")]
)
def test_word(value: object, expected: str) -> None:
    assert word({"reason": value}, "reason") == expected


def test_texts_are_cut_and_have_no_control_characters() -> None:
    assert clean("a\x1b[31m\r\nb\ud800") == "a [31m  b"
    assert len(text({"m": "x" * 10_000}, "m")) == 1024
    assert text({"m": 5}, "m") == ""


@given(ANYTHING)
def test_any_message_is_a_report_or_none(value: object) -> None:
    numbers = {"bytes": value, "files": value, "memory": value, "freeSpace": value}
    for message in (
        value,
        {"version": 1, "plan": value},
        {"version": 1, **numbers, "message": value, "reason": value, "exitCode": value, "plan": numbers},
    ):
        report = report_of(json.dumps(message))
        assert report is None or (0 <= report.done <= 1 << 50 and len(report.message) <= 1024)
        assert not report or not report.preview or 0 <= report.preview.written <= 1 << 50


def test_a_report() -> None:
    reported = {"version": 1, "exitCode": 65, "reason": "InputWrong", "message": "m", "bytes": 3, "bytesTotal": 4}
    report = report_of(json.dumps(reported | {"iteration": 500, "throughput": 2}))
    assert report
    assert (report.exit_code, report.reason, report.done, report.total) == (65, "InputWrong", 3, 4)
    assert (report.iteration, report.throughput) == (500, 2)
    assert report.preview is None
    planned = report_of(
        json.dumps(reported | {"plan": {"files": 4, "bytes": 3, "memory": 2, "freeSpace": 1, "ranks": 2}})
    )
    assert planned
    assert planned.preview == Preview(files=4, written=3, memory=2, free=1)
    assert report_of(json.dumps(reported | {"version": 2})) is None
    assert report_of("x" * (13 << 10)) is None
    assert report_of("[" * 5000) is None


def conversion(*changes: tuple[str, object], uid: str = "uid-1") -> Conversion:
    document = changed(("spec.parallelism.pipeline", 4), *changes)
    document["metadata"]["uid"] = uid
    return parse(document)


GOOD = {
    "version": 1, "exitCode": 0, "reason": "Converted", "message": "", "conversion": "uid-1", "stages": [2],
    "iteration": 500, "verified": "digest", "bytes": 7, "bytesTotal": 7,
}  # fmt: skip
PLAN = {**GOOD, "reason": "Planned", "stages": [0, 1, 2, 3], "plan": {"files": 3}}
DRY: tuple[str, object] = ("spec.dryRun", True)
FOLLOWS: tuple[str, object] = ("spec.follow", {})


def lacking(message: str, *changes: tuple[str, object]) -> str:
    """What keeps a message from proving stage 2."""
    return unproved(report_of(message), conversion(*changes), 2)


@pytest.mark.parametrize(
    ("reported", "changes"),
    [
        pytest.param({}, (), id="of-its-stage"),
        pytest.param({"conversion": None, "verified": None}, (), id="of-an-older-worker"),
        pytest.param({}, (("spec.source.iteration", 500),), id="of-the-iteration-asked-for"),
        pytest.param(PLAN, (DRY,), id="of-a-plan"),
        pytest.param({"stages": [0, 1, 2, 3]}, (FOLLOWS,), id="of-one-that-follows"),
        pytest.param({"stages": None}, (FOLLOWS,), id="of-so-many-stages-that-they-do-not-fit"),
        pytest.param({"stages": [0, 1, 2, 3], "iteration": None}, (FOLLOWS,), id="of-a-training-that-saved-nothing"),
    ],
)
def test_a_report_that_proves_its_stage(reported: dict[str, object], changes: tuple[tuple[str, object], ...]) -> None:
    message = json.dumps({name: value for name, value in (GOOD | reported).items() if value is not None})
    assert lacking(message, *changes) == ""


@pytest.mark.parametrize(
    ("reported", "changes", "says"),
    [
        ({"version": 2}, (), "left no report"),
        ({"exitCode": 75}, (), "its report says exit code 75"),
        ({"exitCode": None}, (), "its report says exit code None"),
        ({"exitCode": "zero"}, (), "its report says exit code -1"),
        ({"reason": "Planned"}, (), "exit code 0, Planned, not exit code 0, Converted"),
        ({"reason": None}, (), "without a reason"),
        ({"conversion": "uid-2"}, (), "of another conversion, of uid uid-2, not uid-1"),
        ({"stages": [3]}, (), "of stages 3, not 2"),
        ({"stages": [2, 3]}, (), "of stages 2, 3, not 2"),
        ({"stages": [0, 1, 2, 3]}, (), "of stages 0, 1, 2, 3, not 2"),
        ({"stages": None}, (), "of stages unknown, not 2"),
        ({"stages": []}, (), "of stages unknown, not 2"),
        ({"stages": [True, "2"]}, (), "of stages unknown, not 2"),
        ({"stages": 2}, (), "of stages unknown, not 2"),
        ({"stages": list(range(900))}, (), "0, 1, 2, 3"),
        ({"iteration": None}, (), "names no iteration"),
        ({"iteration": -4}, (), "names no iteration"),
        ({"iteration": 10**30}, (), "names no iteration"),
        ({"iteration": 510}, (("spec.source.iteration", 500),), "of iteration 510, not 500"),
        (GOOD, (DRY,), "not exit code 0, Planned"),
        ({**PLAN, "plan": None}, (DRY,), "holds no plan"),
        (GOOD, (FOLLOWS,), "of stages 2, not 0, 1, 2, 3"),
        (PLAN, (), "its report says exit code 0, Planned"),
    ],
)
def test_a_report_that_does_not(
    reported: dict[str, object], changes: tuple[tuple[str, object], ...], says: str
) -> None:
    message = json.dumps({name: value for name, value in (GOOD | reported).items() if value is not None})
    found = lacking(message, *changes)
    assert says in found
    assert len(found) < 300


@pytest.mark.parametrize(
    "message",
    ["", "ok", "[]", "null", json.dumps(GOOD)[:-1], json.dumps(GOOD) + json.dumps(GOOD), "{" * 4000, "x" * (13 << 10)],
    ids=["empty", "a-log", "a-list", "null", "truncated", "two", "deep", "oversized"],
)
def test_what_is_no_report_proves_nothing(message: str) -> None:
    assert "left no report of ckpt2pt" in lacking(message)


@pytest.mark.parametrize(
    ("reported", "verified"),
    [("none", "None"), ("digest", "Digest"), ("full", "Full"), ("Full", ""), ("everything", ""), (True, ""), ([], "")],
)
def test_how_it_was_verified_is_one_of_the_words_of_the_spec(reported: object, verified: str) -> None:
    found = report_of(json.dumps(GOOD | {"verified": reported}))
    assert found
    assert found.verified == verified


@pytest.mark.parametrize(
    ("reported", "warnings"),
    [(None, ()), ("x", ()), (["a\x1b[2J", 5, "", {}], ("a [2J",)), (["x" * 9000] * 9000, ("x" * 300,) * 4)],
)
def test_few_warnings_of_bounded_length_are_taken(reported: object, warnings: tuple[str, ...]) -> None:
    found = report_of(json.dumps({"version": 1, "warnings": reported}))
    assert found is None if len(json.dumps(reported)) > 12 << 10 else found and found.warnings == warnings


def test_no_more_is_done_than_there_is() -> None:
    found = report_of(json.dumps(GOOD | {"bytes": 1 << 62, "bytesTotal": 100}))
    assert found
    assert (found.done, found.total) == (100, 100)
