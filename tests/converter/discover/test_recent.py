"""What was read is kept as far as there is room, the newest longest."""

from __future__ import annotations

from ckpt2pt.discover.recent import Recent


def test_the_newest_values_are_kept_and_others_are_read_again() -> None:
    read: list[str] = []

    def get(recent: Recent[str], key: str) -> str:
        def value() -> str:
            read.append(key)
            return key * 2

        return recent.get(key, value, len)

    recent = Recent[str](4)
    assert [get(recent, key) for key in ("a", "b", "a", "c", "a", "b")] == ["aa", "bb", "aa", "cc", "aa", "bb"]
    assert read == ["a", "b", "c", "b"], "b was asked for longest ago when c came"
    large = "long" * 9
    assert get(recent, large) == get(recent, large)
    assert read.count(large) == 1, "the newest one is kept whatever its size"
