"""What is sealed comes back as it was, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ckpt2pt.records import Json, load, seal, seal_joined, unseal

RECORD = {"identity": "me", "files": [{"path": "a/ö.pt", "nbytes": 5, "crc32": "00ff00ff"}], "ranks": None}


def test_what_is_sealed_is_json_and_comes_back() -> None:
    data = seal(RECORD)
    assert unseal(data) == RECORD
    assert set(json.loads(data)) == {*RECORD, "seal"}
    assert unseal(json.dumps(json.loads(data)).encode()) == RECORD, "however it is spaced"


@pytest.mark.parametrize(
    "change", [{"identity": "you"}, {"files": []}, {"ranks": 0}, {"more": 1}, {"seal": None}, {"seal": "0" * 64}]
)
def test_what_was_changed_does_not(change: dict[str, object]) -> None:
    assert unseal(json.dumps(json.loads(seal(RECORD)) | change).encode()) is None


def test_no_bit_of_it_can_change() -> None:
    data = seal(RECORD)
    for place in range(len(data) - 1):
        flipped = data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
        assert unseal(flipped) in (None, RECORD), flipped
        assert unseal(data[:place]) is None


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b"[" * 200_000, b'{"a":' * 200_000])
def test_what_is_no_document_is_none(data: bytes) -> None:
    assert load(data) is None
    assert unseal(data) is None


def test_a_list_may_be_sealed_an_item_at_a_time() -> None:
    items: list[Json] = [{"b": [1, {"x": "a\nb é"}], "a": None}, {}, {"seal": "of another"}]
    for name in ("a", "stages", "z"):
        for some in ([], items[:1], items):
            head: Json = {"identity": "me", "m": {"n": [1]}, "stage": 2.5}
            data = b"".join(seal_joined(head, name, iter(some)))
            assert unseal(data) == {**head, name: some} == unseal(seal({**head, name: some}))
            assert unseal(data.replace(b"2.5", b"2.6")) is None


def test_items_are_asked_for_as_they_are_written() -> None:
    asked: list[int] = []

    def items() -> Iterator[Json]:
        for number in range(3):
            asked.append(number)
            yield {"number": number}

    pieces = seal_joined({}, "items", items())
    assert not asked
    while not any(b'"number": 0' in piece for piece in [next(pieces)]):
        pass
    assert asked == [0]
