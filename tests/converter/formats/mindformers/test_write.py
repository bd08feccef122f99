"""The tensors of MindFormers that parameters of Megatron core become, and the documents beside them."""

from __future__ import annotations

import json

import pytest

from ckpt2pt.core.extents import Extent, Shape
from ckpt2pt.core.index import Index
from ckpt2pt.core.tensor import Key, local_tensor
from ckpt2pt.errors import CoverageError
from ckpt2pt.formats.mindformers.write import Form, common_of, files_of, metadata_of, stored_weights

PYNATIVE = Form(trainer="pynative", interleaved=True, heads=None, dtype="bfloat16")
GRAPH = Form(trainer="graph", interleaved=True, heads=None, dtype="bfloat16")
LAYER = "decoder.layers.0."


def index_of(**shapes: Shape) -> Index:
    """Parameters by name, with ``__`` for a dot."""
    found = {}
    for spelled, shape in shapes.items():
        key = Key("param", spelled.replace("__", "."))
        found[key] = local_tensor(key, "bfloat16", shape, (Extent("a", 0, 1 << 20),))
    return found


def test_each_trainer_has_its_own_names_shapes_and_types() -> None:
    index = index_of(
        embedding__word_embeddings__weight=(16, 8),
        decoder__layers__0__mlp__router__weight=(2, 8),
        decoder__layers__0__mlp__router__expert_bias=(2,),
        decoder__layers__0__mlp__experts__local_experts__0__linear_fc2__weight=(8, 6),
        decoder__layers__0__mlp__experts__local_experts__1__linear_fc2__weight=(8, 6),
        output_layer__weight=(16, 8),
    )
    own = {one.name: (one.dtype, one.shape) for one in stored_weights(index, PYNATIVE, "x")}
    assert own == {
        "embedding.word_embeddings.weight": ("float32", (16, 8)),
        f"{LAYER}mlp.router.weight": ("float32", (2, 8)),
        f"{LAYER}mlp.expert_bias": ("float32", (2,)),
        f"{LAYER}mlp.experts.weight2": ("bfloat16", (2, 6, 8)),
        "output_layer.weight": ("bfloat16", (16, 8)),
    }
    graph = {one.name: (one.dtype, one.shape) for one in stored_weights(index, GRAPH, "x")}
    assert graph[f"{LAYER}mlp.router.expert_bias"] == ("float32", (2,))
    assert graph[f"{LAYER}mlp.experts.weight2"] == ("float32", (12, 8))
    assert graph["output_layer.weight"] == ("float32", (16, 8))


def test_latent_attention_is_joined_in_its_order() -> None:
    index = index_of(
        decoder__layers__0__self_attention__linear_kv_down_proj__weight=(6, 8),
        decoder__layers__0__self_attention__linear_q_down_proj__weight=(4, 8),
        decoder__layers__0__self_attention__kv_layernorm__weight=(4,),
    )
    joined, norm = stored_weights(index, PYNATIVE, "x")
    assert (joined.name, joined.shape) == (f"{LAYER}self_attention.linear_qkv.weight", (10, 8))
    assert [part.shape for part in joined.parts] == [(4, 8), (6, 8)]
    assert (norm.name, norm.dtype) == (f"{LAYER}self_attention.k_layernorm.weight", "float32")


@pytest.mark.parametrize(
    "name", ["some.thing.weight", f"{LAYER}mlp.shared_experts.gate_weight", f"{LAYER}mlp.experts.local_experts.1.linear_fc2.bias"]
)  # fmt: skip
def test_a_parameter_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(CoverageError, match="has no place in a model of MindFormers"):
        list(stored_weights(index_of(**{name.replace(".", "__"): (4, 8)}), PYNATIVE, "x"))


def test_files_are_limited_and_described() -> None:
    index = index_of(embedding__word_embeddings__weight=(16, 8), output_layer__weight=(16, 8))
    first, second = files_of(stored_weights(index, PYNATIVE, "x"), 600)
    assert (first.name, second.name) == tuple(f"checkpoint-model-000000{k}-0000002.safetensors" for k in range(2))
    layout = first.lay_out()
    assert layout.nbytes == len(layout.header) + 16 * 8 * 4
    assert layout.storage_offset(0) % 8 == 0
    document = json.loads(metadata_of([first, second]))
    assert document["storage_data"] == {
        str((weight.name, (0,))): [{"file_name": file.name, "storage_rank": 0, "rank_group": [0]}]
        for file in (first, second)
        for weight in file.weights
    }
    one = document["state_dict_metadata"]["output_layer.weight"]
    assert (one["properties"]["dtype"], one["global_shape"], one["axis_fragmentations"]) == (
        "BFloat16",
        [16, 8],
        [1, 1],
    )


def test_the_numbers_of_a_training() -> None:
    assert json.loads(common_of(7, {"global_batch_size": 32})) == {
        "epoch_num": 1, "step_num": 7, "global_step": 7, "loss_scale": None, "global_batch_size": 32, "ckpt_status": None,
    }  # fmt: skip
    assert json.loads(common_of(7, {}))["global_batch_size"] is None
