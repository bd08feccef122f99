"""What is sealed comes back as it was, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ckpt2pt.io.records import Json, load, seal, seal_joined, unseal

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


RANK: Json = {"identity": "me", "tp": 0, "pp": 1, "files": RECORD["files"], "tensors": {"a": "00"}}


@pytest.mark.parametrize(
    "document",
    [
        RANK,
        {"identity": "me", "purpose": "x", "host": "h", "options": {"tensor": 1}},
        {"identity": "me", "stage": 1, "iteration": 3, "ranks": [RANK], "inputs": [1]},
        {"identity": "me", "iteration": 3, "stages": [{"stage": 1, "ranks": [RANK]}]},
    ],
)
def test_records_of_every_kind_come_back(document: dict[str, object]) -> None:
    assert unseal(seal(document)) == document


FILE: Json = {"path": "a.pt", "nbytes": 1, "crc32": "00ff00ff"}
ODD: list[Any] = [
    {"identity": 1},
    {"identity": None},
    *({"tp": value} for value in (None, -1, 1.0, True, "0", 1 << 40, list[object]())),
    *({"pp": value} for value in (None, -1, 1 << 40, 10**5000 // 10**4000)),
    *(
        {"files": value}
        for value in (None, dict[str, object](), "x", [1], [None], [list[object]()], [dict[str, object]()])
    ),
    *(
        dict[str, object](files=[FILE | {"path": path}])
        for path in (1, "", "/etc/x", "../x", "a/../../x", "a\0b", "\ud800", None)
    ),
    *(dict[str, object](files=[FILE | {"nbytes": nbytes}]) for nbytes in (-1, 1.5, "1", None, 1 << 64)),
    *(dict[str, object](files=[FILE | {"crc32": crc32}]) for crc32 in (0, "zz", "", None, "00FF00FF", "0x00ff00")),
    {"tensors": []},
    {"tensors": {"a": []}},
    {"sourceChecksums": {"verified": "1"}},
    {"sourceChecksums": []},
    {"verified": ["none"]},
    {"warnings": [1]},
    *(
        {"swap": {"from": "a", "records": [], "coming": [], "files": []} | odd}
        for odd in ({"from": "../a"}, {"from": "/a"}, {"records": ["../claim.json"]}, {"coming": None}, {"files": [1]})
    ),
    {"iteration": 10**18},
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: ascii(odd)[:60])
def test_a_sealed_document_of_another_form_is_no_record(odd: dict[str, object]) -> None:
    """A seal is a sum that anybody can make."""
    rank = RANK | odd
    assert unseal(seal(rank)) is None
    assert unseal(seal({"identity": "me", "ranks": [rank]})) is None
    assert unseal(seal({"identity": "me", "stages": [{"ranks": [rank]}]})) is None


@pytest.mark.parametrize("name", ["identity", "tp", "pp", "files"])
def test_a_rank_without_what_is_read_of_it_is_no_record(name: str) -> None:
    assert unseal(seal({key: value for key, value in RANK.items() if key != name})) is None
    assert unseal(seal({"ranks": [{key: value for key, value in RANK.items() if key != name}]})) is None


@pytest.mark.parametrize("lists", [{"ranks": {}}, {"ranks": [1]}, {"stages": None}, {"stages": [[]]}])
def test_lists_of_another_form_are_no_record(lists: dict[str, object]) -> None:
    assert unseal(seal({"identity": "me"} | lists)) is None


@pytest.mark.parametrize("data", [b'{"a": NaN}', b'{"a": 1, "a": 1}', b"[" + b"[]," * 3_000_000 + b"0]"])
def test_a_document_that_is_none_of_ours_costs_nothing(data: bytes) -> None:
    assert load(data) is None
