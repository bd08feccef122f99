"""Parts of the trees of Megatron's files."""

from __future__ import annotations

import pytest

from ckpt2pt.errors import FormatError
from ckpt2pt.formats.megatron.payload import nested, tree_payload
from ckpt2pt.formats.torchfile.pickles import read_pickle
from ckpt2pt.formats.torchfile.trees import Call, as_tensor, tensor


def test_storages_are_numbered_anew_in_the_order_of_the_tree() -> None:
    pickle, keys = tree_payload(
        {"a": tensor("float32", "7", 2, 0, (2,)), "b": tensor("float32", "3", 1, 0, (1,))}, {"3", "7"}, "p"
    )
    found = read_pickle(pickle, where="p")
    assert isinstance(found, dict)
    assert keys == ["7", "3"]
    assert [one and one.key for one in map(as_tensor, found.values())] == ["0", "1"]


def test_a_storage_that_is_not_there_is_refused() -> None:
    with pytest.raises(FormatError, match="does not hold"):
        tree_payload({"a": tensor("float32", "7", 2, 0, (2,))}, {"3"}, "p")


def test_a_legacy_model_has_its_modules_in_the_order_of_megatron() -> None:
    found = nested(
        [
            (("language_model", "output_layer", "weight"), 1),
            (("language_model", "embedding", "word_embeddings", "weight"), 2),
        ]
    )
    assert isinstance(found, dict)
    inner = found["language_model"]
    assert isinstance(inner, dict)
    assert [*inner] == ["embedding", "encoder", "output_layer"]
    assert isinstance(inner["encoder"], Call), "an empty OrderedDict"
