"""JSON one object at a time: whatever is in it, however deep it is, and wherever the bytes are cut."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from ckpt2pt_operator import decoding
from ckpt2pt_operator.decoding import MAX_OBJECT, Page, decode, lines

Raw = dict[str, Any]
PAGE: Raw = {
    "apiVersion": "v1",
    "items": [
        {"metadata": {"name": "a"}, "text": '}\\"]{', "items": [{"x": 1}], "more": {"items": [{}]}},
        {"metadata": {}, "items": [{"metadata": {"name": "forged"}}] * 40},
        {"metadata": {"name": "c"}, "flat": [{}, [], [1, "]"], {"a": "{"}] * 40},
    ],
    "kind": "items",
    "metadata": {"continue": "x", "items": [{"n": 1}], "resourceVersion": "7"},
}


def read(data: bytes, sizes: Iterator[int]) -> tuple[list[Raw], Raw]:
    page, found, at = Page(), list[Raw](), 0
    while at < len(data):
        size = next(sizes)
        found += [item for item, _ in page.feed(data[at : at + size])]
        at += size
    found += [item for item, _ in page.feed(b"", last=True)]
    return found, decode(page.rest())


@pytest.mark.parametrize("most", [1, 2, 7, 100, 100_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_each_item_of_a_page_is_given_once_wherever_its_bytes_are_cut(most: int, indent: int | None) -> None:
    chance = random.Random(most)
    sizes = iter(lambda: chance.randint(1, most), 0)
    items, rest = read(json.dumps(PAGE, indent=indent).encode(), sizes)
    assert items == PAGE["items"]
    assert rest == {**PAGE, "items": []}


@pytest.mark.parametrize("items", [[], None])
def test_a_page_without_items_is_itself(items: object) -> None:
    page = {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items}
    assert read(json.dumps(page).encode(), iter([3] * 100)) == ([], page)


@pytest.mark.parametrize("inside", ["[" * 5000 + "]" * 5000, '{"a":' * 5000 + '"["' + "}" * 5000])
def test_an_object_that_nests_too_deeply_for_json_is_read_without_its_depths(inside: str) -> None:
    data = f'{{"metadata": {{"name": "a"}}, "deep": {inside}, "after": "}}", "z": [{inside}]}}'
    found = decode(data.encode())
    assert (found["metadata"], found["after"]) == ({"name": "a"}, "}")
    assert len(json.dumps(found)) < 3000
    [item], rest = read(f'{{"items": [{data}], "kind": "L"}}'.encode(), iter([1000] * 100))
    assert (item, rest) == (found, {"items": [], "kind": "L"})


def test_a_large_item_is_not_read_again_with_each_piece_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = list[int]()

    class Counting(json.JSONDecoder):
        def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
            tried.append(len(s) - idx)
            return super().raw_decode(s, idx)

    monkeypatch.setattr(decoding, "_DECODER", Counting())
    item = {"a": ["x"] * 200_000}
    assert read(json.dumps({"items": [item, item]}).encode(), iter([4096] * 1000)) == ([item, item], {"items": []})
    assert sum(tried) < 4 * len(json.dumps(item)) * 2


def test_an_object_that_cannot_be_one_is_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        read(b'{"items": [{"a": "' + b"x" * (MAX_OBJECT + (1 << 20)), iter([1 << 20] * 20))
    for text in (b"[]", b"{", b""):
        with pytest.raises(ValueError, match=r"."):
            decode(text)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_lines_of_any_length_are_whole(size: int) -> None:
    wanted = [b"a" * 300_000 if size == 1000 else b"abc", b"x", b"yz"]
    data = b"\n\n".join(wanted) + b"\n"

    async def run() -> list[bytes]:
        loop = asyncio.get_running_loop()
        stream = aiohttp.StreamReader(aiohttp.base_protocol.BaseProtocol(loop), 1 << 20, loop=loop)
        for at in range(0, len(data), size):
            stream.feed_data(data[at : at + size])
        stream.feed_eof()
        return [line async for line in lines(stream)]

    assert asyncio.run(run()) == wanted
