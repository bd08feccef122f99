"""Flags as every program of ours reads them."""

from __future__ import annotations

import argparse

import pytest

from ckpt2pt.errors import UsageError
from ckpt2pt.flags import Parser, check_numbers, counts, joined


@pytest.mark.parametrize("text", ["3,5", "3 5", " 3, 5 ", "3,5,"])
def test_a_list_of_numbers(text: str) -> None:
    assert counts(text) == (3, 5)


@pytest.mark.parametrize("text", ["3,x", "3.5", "3;5"])
def test_what_is_no_list_of_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a list of numbers such as 3,5"):
        counts(text)


def test_several_words_are_one_list() -> None:
    assert joined([(2,), (3, 4)]) == (2, 3, 4)
    assert joined(None) is None
    assert joined([()]) == (), "an empty list is given, and is for others to refuse"


@pytest.mark.parametrize("number", [0, -1, float("nan"), float("inf"), 1e30])
def test_a_number_beyond_reason_is_refused(number: float) -> None:
    check_numbers({"--one": 1, "--none": None, "--half": 0.5})
    with pytest.raises(UsageError, match="--b is") as caught:
        check_numbers({"--a": 1, "--b": number})
    assert "give --b a number above 0" in caught.value.mend


def test_wrong_usage_names_the_program() -> None:
    with pytest.raises(UsageError) as caught:
        Parser(prog="demo").parse_args(["--nothing"])
    assert (caught.value.exit_code, caught.value.where) == (64, "the command line of demo")
    assert "demo --help" in caught.value.mend
