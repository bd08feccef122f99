"""What is sealed comes back as it was, or not at all."""

from __future__ import annotations

import json

import pytest

from ckpt2pt.records import load, seal, unseal

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
