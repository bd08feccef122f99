"""The oldest goes first, and what is renewed is not counted twice."""

from __future__ import annotations

from ckpt2pt_operator.recent import remember


def test_not_more_than_so_many() -> None:
    found: dict[str, int] = {}
    for number, key in enumerate("abcab"):
        remember(found, key, number, 2)
        assert len(found) <= 2
    assert found == {"a": 3, "b": 4}
    remember(found, "a", 5, 2)
    assert found == {"a": 5, "b": 4}
