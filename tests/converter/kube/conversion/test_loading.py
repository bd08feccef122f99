"""YAML from anywhere is read within bounds, into what JSON can say."""

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.loading import MAX_DEPTH, load


def test_texts_numbers_lists_and_mappings_come_through() -> None:
    assert load("a: [1, 2.5, 'x', true, null]\nb: {c: d}", "here") == {"a": [1, 2.5, "x", True, None], "b": {"c": "d"}}
    assert load(b'{"a": 1}', "here") == {"a": 1}


@pytest.mark.parametrize(
    "text",
    ["[" * 10_000, "a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "a: !!binary aGk=", "a: !!set {b}", "1: a", "a: 2026-01-02",
     "a: !!python/object/apply:os.system [x]", "a: 1\na: 2", "a: *b", "", "a\n---\nb", "\x00"],
)  # fmt: skip
def test_anything_else_is_an_error_of_the_document(text: str) -> None:
    with pytest.raises(UsageError):
        load(text, "here")


def test_aliases_do_not_unfold_without_bounds() -> None:
    names = "abcdefghij"
    text = "a: &a [0]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise(names))
    with pytest.raises(UsageError, match="more than"):
        load(text, "here")


def merged(depth: int) -> str:
    """A mapping that merges ten of the one below it, and so on: ten times as many fields on each level."""
    if not depth:
        return "&n0 {k: v}"
    return f"&n{depth} {{<<: [{merged(depth - 1)}, {', '.join([f'*n{depth - 1}'] * 9)}]}}"


def test_nor_do_merge_keys() -> None:
    with pytest.raises(UsageError, match="more than"):
        load(f"x: {merged(9)}", "here")
    assert load("a: &a {b: 1}\nc: {<<: *a, d: 2}", "here") == {"a": {"b": 1}, "c": {"b": 1, "d": 2}}


def test_an_alias_of_what_it_is_in_has_no_end() -> None:
    with pytest.raises(UsageError, match="inside each other"):
        load("a: &a [*a]", "here")


@pytest.mark.parametrize("number", ["0x" + "f" * 9000, ":".join(["1"] * 5000), "9223372036854775808", ".inf", ".nan"])
def test_a_number_that_cannot_be_sent_is_none(number: str) -> None:
    """Python writes no decimal number of more than 4,300 digits: who sent such a document failed with a ValueError."""
    with pytest.raises(UsageError, match="64 bits"):
        load(f"a: [{{b: {number}}}]", "here")


def test_the_place_of_an_error_is_in_its_cause() -> None:
    with pytest.raises(UsageError) as caught:
        load("a: 1\nb: [", "here")
    assert isinstance(caught.value.__cause__, yaml.MarkedYAMLError)
    assert caught.value.__cause__.problem_mark is not None
    assert caught.value.__cause__.problem_mark.line == 1
