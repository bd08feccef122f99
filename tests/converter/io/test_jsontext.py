"""JSON of others: what is taken, and that nothing costs more than its size can explain."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from ckpt2pt.io.jsontext import parse_json


def test_documents_are_taken_as_json_has_them() -> None:
    assert parse_json(b' {"a": [1, 2.5, null, true, "\\u00e4"]} ') == {"a": [1, 2.5, None, True, "ä"]}


def test_a_tail_is_left_alone_when_the_first_document_is_asked_for() -> None:
    """The training rewrites its files without truncating them."""
    assert parse_json(b'{"a": 1}2}\xff', first=True) == {"a": 1}
    with pytest.raises(ValueError, match="Extra data"):
        parse_json(b'{"a": 1}2}')


@pytest.mark.parametrize(
    ("data", "what"),
    [
        pytest.param(b'{"a": 1, "a": 2}', "'a' appears twice", id="name-twice"),
        pytest.param(b'{"a": {"b": 1, "b": 1}}', "'b' appears twice", id="name-twice-inside"),
        pytest.param(b"[NaN]", "NaN is no number", id="nan"),
        pytest.param(b"[-Infinity]", "-Infinity is no number", id="infinity"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="deep"),
        pytest.param(b'{"a":' * 100_000, "nested too deeply", id="deep-objects"),
        pytest.param(b"9" * 10_000, "digits", id="an-integer-without-end"),
        pytest.param(b"\xff\xfe", "utf-8", id="not-utf-8"),
        pytest.param(b"", "Expecting value", id="nothing"),
        pytest.param(b'"\x00"', "control character", id="nul"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, what: str) -> None:
    for first in (False, True):
        if not (first and what == "utf-8"):
            with pytest.raises(ValueError, match=what):
                parse_json(data, first=first)


@pytest.mark.parametrize(
    "piece",
    [b"[],", b"{},", b'{"":[]},', b'"",', b"[[[]]],", b"1,"],
    ids=["lists", "objects", "members", "texts", "nested", "numbers"],
)
@pytest.mark.parametrize("nbytes", [3 << 20, 60 << 20])
def test_a_document_costs_what_its_size_can_explain(piece: bytes, nbytes: int) -> None:
    data = b"[" + piece * (nbytes // len(piece)) + b"0]"
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="members are more than"):
            parse_json(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 2


def test_as_many_members_as_are_taken_stay_within_bounds() -> None:
    data = b"[" + b'{"":[]},' * 115_000 + b"0]"
    tracemalloc.start()
    try:
        parse_json(data)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data) + (64 << 20)
    finally:
        tracemalloc.stop()
