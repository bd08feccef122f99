"""Flags as every program of ours reads them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from ckpt2pt.errors import UsageError
from ckpt2pt.io.flags import Parser, check_numbers, counts, joined, path, port, seconds


@pytest.mark.parametrize("text", ["3,5", "3 5", " 3, 5 ", "3,5,"])
def test_a_list_of_numbers(text: str) -> None:
    assert counts(text) == (3, 5)


@pytest.mark.parametrize("text", ["3,x", "3.5", "3;5"])
def test_what_is_no_list_of_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a list of numbers such as 3,5"):
        counts(text)


def test_a_path_a_time_and_a_port() -> None:
    assert (path("."), seconds("0"), seconds("1.5"), port("0"), port("65535")) == (Path(), 0, 1.5, 0, 65535)


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"the path is empty; write \. for the current folder"):
        path("")


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_what_is_no_path(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="holds a character that no path can have"):
        path(text)


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "-0.1", "1e300", "", "soon"])
def test_what_is_no_time_to_wait(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number of seconds from 0"):
        seconds(text)


@pytest.mark.parametrize("text", ["-1", "65536", "http", "", "1.5"])
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a port from 0 to 65535"):
        port(text)


def test_several_words_are_one_list() -> None:
    assert joined([(2,), (3, 4)]) == (2, 3, 4)
    assert joined(None) is None
    assert joined([()]) == (), "an empty list is given, and is for others to refuse"


@pytest.mark.parametrize("number", [0, -1, float("nan"), float("inf"), 1e30])
def test_a_number_beyond_reason_is_refused(number: float) -> None:
    check_numbers({"--one": 1, "--none": None, "--half": 0.5})
    with pytest.raises(UsageError, match="--b is") as caught:
        check_numbers({"--a": 1, "--b": number})
    assert "give --b a number above 0" in caught.value.hint


def test_wrong_usage_names_the_program() -> None:
    with pytest.raises(UsageError) as caught:
        Parser(prog="demo").parse_args(["--nothing"])
    assert (caught.value.exit_code, caught.value.where) == (64, "the command line of demo")
    assert "demo --help" in caught.value.hint
