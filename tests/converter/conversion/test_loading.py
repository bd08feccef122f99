"""YAML from anywhere is read within bounds, into what JSON can say."""

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml

from ckpt2pt.conversion.loading import MAX_DEPTH, load
from ckpt2pt.errors import UsageError


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


def test_the_place_of_an_error_is_in_its_cause() -> None:
    with pytest.raises(UsageError) as caught:
        load("a: 1\nb: [", "here")
    assert isinstance(caught.value.__cause__, yaml.MarkedYAMLError)
    assert caught.value.__cause__.problem_mark is not None
    assert caught.value.__cause__.problem_mark.line == 1
