"""Groups take turns."""

from __future__ import annotations

import pytest

from ckpt2pt_operator.turns import Turns


def test_groups_take_turns_and_within_one_the_first_comes_first() -> None:
    turns: Turns[str] = Turns()
    for group, item in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"), ("c", "c1"), ("b", "b2")):
        turns.add(group, item)
    found = []
    while turns:
        found.append(turns.take())
    assert found == ["a1", "b1", "c1", "a2", "b2", "a3"]
    with pytest.raises(StopIteration):
        turns.take()
