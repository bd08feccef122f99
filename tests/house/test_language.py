"""The language of the field: words of a dialect that are gone do not come back."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STANDARD = {
    "tol" + "d": "reported, stated, known by",
    "hear" + "d": "received",
    "hear" + "s": "receives, is called with",
    "sur" + "plus": "extra, unexpected",
    "men" + "d": "hint, correct",
    "lam" + "ent": "on_failure",
    "bur" + "y": "reap",
    "twi" + "ns?": "tied copies",
    "cre" + "w": "worker pool",
}
"""A word -> what to write instead; spelled apart, so that this file holds none of them."""
_PLACES = (
    "converter",
    "operator",
    "docs",
    "charts",
    "crds",
    "deploy",
    "examples",
    "tests",
    "README.md",
    "CONTRIBUTING.md",
)


def lines_with(word: str) -> list[str]:
    """Lines with a word, also as a part of an identifier: ``_word_of``, ``is_word``."""
    words = ["git", "grep", "-IinE", f"(^|[^a-z]){word}([^a-z]|$)", "--", *_PLACES]
    found = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode in {0, 1}, found.stderr
    return found.stdout.splitlines()


@pytest.mark.parametrize("word", STANDARD)
def test_words_of_a_dialect_do_not_come_back(word: str) -> None:
    assert lines_with(word) == [], f"write {STANDARD[word]}"


def test_a_word_is_found_wherever_it_stands() -> None:
    assert any(re.search("reported", line) for line in lines_with("reported"))
    assert any("_REPORTED" in line or "_reported" in line for line in lines_with("reported"))


def test_conflicts_go_by_their_older_name_for_one_release() -> None:
    found = [line for line in lines_with("doub" + "ts") if line.startswith(("converter", "operator", "docs"))]
    assert all("doub" + "ts" in line and line.startswith("converter") for line in found)
