"""A file to be written: its header, its alignment, what fills a tensor that is made of several parts."""

from __future__ import annotations

import json

from ckpt2pt.core.extents import Extent, Stored, View
from ckpt2pt.core.tensor import Key, Tensor
from ckpt2pt.formats.safetensors import ShardFile, Weight, divided


def weight(name: str, rows: int, dtype: str = "bfloat16", *parts: Tensor) -> Weight:
    return Weight(name, dtype, (rows, 8), parts)


def test_the_header_says_where_every_tensor_lies() -> None:
    shard = ShardFile(name="a", weights=(weight("b", 1, "float32"), weight("a", 3)))
    layout = shard.lay_out()
    size = int.from_bytes(layout.header[:8], "little")
    header = json.loads(layout.header[8:])
    assert len(layout.header) == 8 + size
    assert size % 8 == 0
    assert header["__metadata__"] == {"format": "pt"}
    assert header["b"] == {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}
    assert header["a"] == {"dtype": "BF16", "shape": [3, 8], "data_offsets": [32, 80]}
    assert layout.nbytes == len(layout.header) + 80
    assert (layout.storages, layout.storage_offset(1), layout.storage_nbytes(1)) == (2, len(layout.header) + 32, 48)


def test_a_file_says_which_program_reads_it() -> None:
    assert b'{"format":"ms"}' in ShardFile(name="a", weights=(), program="ms").lay_out().header


def part(name: str, rows: int) -> Tensor:
    view: Stored = View((0, 0), (rows, 8), (8, 1), 0, (Extent("source", 0, rows * 16),))
    return Tensor(Key("param", name), "bfloat16", (rows, 8), (rows, 8), (view,))


def test_parts_follow_each_other_in_a_tensor() -> None:
    shard = ShardFile(
        name="a", weights=(weight("zeros", 1), weight("joined", 5, "bfloat16", part("q", 3), part("k", 2)))
    )
    slots = shard.slots()
    assert [(slot.key.name, slot.storage, slot.start) for slot in slots.slots] == [("q", 1, 0), ("k", 1, 24)]
    assert slots.padded == {0}
    assert [key.name for key in shard.index()] == ["q", "k"]


def test_no_tensor_is_cut() -> None:
    found = divided([weight("a", 4), weight("b", 4), weight("c", 100), weight("d", 1)], 128)
    assert [[one.name for one in held] for held in found] == [["a", "b"], ["c"], ["d"]]
