"""The files of a model: their names, the index, zeros for a bias that the class has."""

from __future__ import annotations

import json

from ckpt2pt.formats.huggingface.write import index_of, shards_of
from ckpt2pt.formats.safetensors import Weight


def weight(name: str, rows: int, dtype: str = "bfloat16") -> Weight:
    return Weight(name, dtype, (rows, 8), ())


def test_shards_are_as_large_as_allowed_and_no_tensor_is_cut() -> None:
    shards = shards_of(iter([weight("a", 4), weight("b", 4), weight("c", 100), weight("d", 1)]), 128)
    assert [[one.name for one in shard.weights] for shard in shards] == [["a", "b"], ["c"], ["d"]]
    assert [shard.name for shard in shards] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [shard.name for shard in shards_of(iter([weight("a", 4)]))] == ["model.safetensors"]


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
