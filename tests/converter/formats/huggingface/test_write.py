"""The files: sizes of shards, the header's alignment, the index, zeros for a bias that the class has."""

from __future__ import annotations

import json

from ckpt2pt.formats.huggingface.write import ShardFile, Weight, index_of, shards_of


def weight(name: str, rows: int, dtype: str = "bfloat16") -> Weight:
    return Weight(name, dtype, (rows, 8), None)


def test_shards_are_as_large_as_allowed_and_no_tensor_is_cut() -> None:
    shards = shards_of(iter([weight("a", 4), weight("b", 4), weight("c", 100), weight("d", 1)]), 128)
    assert [[one.name for one in shard.weights] for shard in shards] == [["a", "b"], ["c"], ["d"]]
    assert [shard.name for shard in shards] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [shard.name for shard in shards_of(iter([weight("a", 4)]))] == ["model.safetensors"]


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


def test_the_widest_types_come_first() -> None:
    [shard] = shards_of(iter([weight("a", 1), weight("b", 1, "float32")]))
    assert [one.name for one in shard.weights] == ["b", "a"]
    assert shard.slots().padded == {0, 1}


def test_the_index_names_the_file_of_every_tensor() -> None:
    shards = shards_of(iter([weight("a", 4), weight("b", 100)]), 128)
    document = json.loads(index_of(shards))
    assert document["metadata"] == {"total_size": 64 + 1600}
    assert document["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
