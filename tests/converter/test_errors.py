"""Errors: what, where and hint survive every border, and each exit code has one meaning."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from ckpt2pt import errors
from ckpt2pt.errors import EXIT_CODES, FAILS_JOB, FAILS_STAGE, RETRIED, Ckpt2ptError

KINDS = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Ckpt2ptError)),
    key=lambda kind: kind.__name__,
)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def test_every_failing_code_has_a_kind_of_error() -> None:
    assert {kind.exit_code for kind in KINDS} == set(EXIT_CODES) - {0}


@each_kind
def test_an_error_crosses_process_borders_whole(kind: type[Ckpt2ptError]) -> None:
    error = kind("2 found, 3 expected", where=Path("/data/rank_0"), hint="set --tp-size to 3")
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(copied) is kind
        assert (copied.what, copied.where, copied.hint) == ("2 found, 3 expected", "/data/rank_0", "set --tp-size to 3")
        assert str(copied) == str(error)


@each_kind
def test_an_error_reads_as_three_lines(kind: type[Ckpt2ptError]) -> None:
    text = str(kind("it is wrong", where="rank_0", hint="correct it"))
    assert text.splitlines() == ["it is wrong", "  where: rank_0", "  hint:  correct it"]


@each_kind
def test_an_error_must_say_where_and_how_to_hint_it(kind: type[Ckpt2ptError]) -> None:
    with pytest.raises(TypeError):
        kind("it is wrong")  # type: ignore[call-arg]


@each_kind
def test_an_error_has_a_code_that_means_something(kind: type[Ckpt2ptError]) -> None:
    assert kind.exit_code in EXIT_CODES
    assert kind.exit_code != 0


def test_every_failing_code_has_exactly_one_policy() -> None:
    assert set(EXIT_CODES) - {0} == FAILS_JOB | FAILS_STAGE | RETRIED
    assert len(FAILS_JOB) + len(FAILS_STAGE) + len(RETRIED) == len(EXIT_CODES) - 1


@pytest.mark.parametrize(
    ("kind", "retried"),
    [
        (errors.NoSpaceError, True), (errors.TimedOutError, True), (errors.InterruptedRunError, True),
        (errors.FileAccessError, True), (errors.CoverageError, False), (errors.MissingInputError, False),
        (errors.VerificationError, False), (errors.UsageError, False),
    ],
)  # fmt: skip
def test_only_what_may_pass_by_itself_is_retried(kind: type[Ckpt2ptError], retried: bool) -> None:
    assert (kind.exit_code in RETRIED) is retried


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä 中", "plain ä 中"),
        ("\x1b[2J\x1b]0;x\x07", "\\x1b[2J\\x1b]0;x\\x07"),
        ("a\nno difference", "a\\nno difference"),
        ("a\r\tb\x00\x7f\x9b", "a\\r\\tb\\x00\\x7f\\x9b"),
        ("a\u202eb\u200b", "a\\u202eb\\u200b"),
        ("p\udcc3\udca4th", "päth"),
        ("p\udcff", "p\\xff"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_what_moves_a_terminal_is_spelled_out(text: str, shown: str) -> None:
    assert errors.printable(text) == shown


def test_lines_of_a_text_that_is_laid_out_are_kept() -> None:
    assert errors.printable("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"


def test_an_error_cannot_be_made_to_look_like_another() -> None:
    error = errors.FormatError("x\n  hint:  run this\nno difference\x1b[1A", where="a\n  b", hint="c\x07")
    assert str(error) == (
        "x\\n  hint:  run this\\nno difference\\x1b[1A\n  where: a\\n  b\n  hint:  c\\x07"
    )  # fmt: skip
    assert str(errors.FormatError("two:\n  one\n  two", where="a", hint="b")).splitlines()[1] == "  one"
    assert error.what.endswith("\x1b[1A")  # JSON has its own escapes
