"""Local tensors of ranks become global ones: numpy is the judge, and ranks that do not fit together are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.extents import Extent, Shape
from ckpt2pt.core.index import Collector, Index, Local, find, without_gaps
from ckpt2pt.core.params import EMBEDDING
from ckpt2pt.core.tensor import Key, Role, Tensor
from ckpt2pt.errors import CoverageError, TopologyError

FC1, FC2 = "decoder.layers.0.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc2"
QKV, PROJ = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.self_attention.linear_proj"
NORM = "decoder.layers.0.input_layernorm.weight"


def local(rank: int, shape: Shape, dtype: str = "float32", first: int = 0) -> Local:
    return Local(dtype, shape, first, (Extent(f"rank_{rank}", 0, 1 << 30),))


def collected(tensor: int, parts: dict[str, Shape], roles: tuple[Role, ...] = ("param",)) -> Index:
    collector = Collector(tensor, "folder")
    for tp in range(tensor):
        for name, shape in parts.items():
            for role in roles:
                collector.add(role, name, tp, local(tp, shape))
    return collector.index()


def assembled(index: Index, key: Key, storages: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The tensor by its views alone: each storage is that of the rank in the extent's path."""
    tensor = index[key]
    found = np.full(tensor.shape, -1)
    for view in tensor.views:
        flat = storages[int(view.storage[0].path[5:])]
        strides = tuple(step * flat.itemsize for step in view.strides)
        part = np.lib.stride_tricks.as_strided(flat[view.first :], view.shape, strides)
        found[tuple(slice(at, at + n) for at, n in zip(view.origin, view.shape, strict=True))] = part
    return found.reshape(tensor.fused)


@given(
    tensor=st.sampled_from([1, 2, 3, 4, 8]),
    ffn=st.integers(1, 4),
    hidden=st.integers(1, 5),
    gated=st.booleans(),
    first=st.integers(0, 3),
)
def test_ranks_make_up_what_megatron_cut(tensor: int, ffn: int, hidden: int, gated: bool, first: int) -> None:
    """Cuts as megatron/core/tensor_parallel/layers.py makes them; gate and up are each cut by themselves."""
    ffn, gate = ffn * tensor, 2 if gated else 1
    whole = {
        f"{FC1}.weight": np.arange(gate * ffn * hidden).reshape(gate * ffn, hidden),
        f"{FC1}.bias": np.arange(gate * ffn),
        f"{FC2}.weight": np.arange(hidden * ffn).reshape(hidden, ffn),
        f"{FC2}.bias": np.arange(hidden),
        f"{QKV}.weight": np.arange(3 * tensor * hidden).reshape(3 * tensor, hidden),
        f"{PROJ}.weight": np.arange(hidden * 2 * tensor).reshape(hidden, 2 * tensor),
        NORM: np.arange(hidden),
        EMBEDDING: np.arange(5 * tensor * hidden).reshape(5 * tensor, hidden),
    }

    def cut(name: str, tp: int) -> np.ndarray[Any, Any]:
        array = whole[name]
        if name in {NORM, f"{FC2}.bias"}:
            return array
        if name.endswith(("linear_fc2.weight", "linear_proj.weight")):
            return np.split(array, tensor, 1)[tp]
        halves = np.split(array, gate) if FC1 in name else [array]
        return np.concatenate([np.split(half, tensor)[tp] for half in halves])

    collector = Collector(tensor, "folder")
    for tp in range(tensor):
        for name in whole:
            collector.add("param", name, tp, local(tp, cut(name, tp).shape, first=first))
    index = collector.index()
    assert set(index) == {Key("param", name) for name in whole}
    for name, array in whole.items():
        storages = [np.concatenate([np.full(first, -7), cut(name, tp).reshape(-1)]) for tp in range(tensor)]
        key = Key("param", name)
        assert index[key].fused == array.shape
        assert np.array_equal(assembled(index, key, storages), array)
        replicas = tensor - 1 if name in {NORM, f"{FC2}.bias"} else 0
        assert len(index[key].replicas) == replicas


def test_a_module_of_a_rule_file_has_an_axis_for_the_ranks() -> None:
    (tensor,) = collected(2, {"language_model.adapter.weight": (3, 2)}).values()
    assert (tensor.shape, [view.origin for view in tensor.views]) == ((2, 3, 2), [(0, 0, 0), (1, 0, 0)])


def test_the_tied_embedding_of_the_last_stage_is_a_replica() -> None:
    collector = Collector(2, "folder")
    for stage in range(2):
        for tp in range(2):
            collector.add("param", EMBEDDING, tp, local(2 * stage + tp, (4, 3)))
    (tensor,) = collector.index().values()
    held = [[view.storage[0].path for view in views] for views in (tensor.views, tensor.replicas)]
    assert held == [["rank_0", "rank_1"], ["rank_2", "rank_3"]]
    assert [view.origin for view in tensor.replicas] == [(0, 0), (4, 0)]


def test_any_other_parameter_on_two_stages_is_refused() -> None:
    collector = Collector(1, "folder")
    collector.add("param", NORM, 0, local(0, (4,)))
    with pytest.raises(CoverageError, match=rf"{NORM} is on two pipeline stages"):
        collector.add("param", NORM, 0, local(1, (4,)))


def test_a_rank_that_lacks_a_parameter_is_named() -> None:
    collector = Collector(3, "folder")
    collector.add("exp_avg", NORM, 1, local(1, (4,)))
    with pytest.raises(TopologyError, match=rf"exp_avg of {NORM} is missing on tp 0, 2") as caught:
        collector.index()
    assert caught.value.where == "folder"


@pytest.mark.parametrize("other", [local(1, (5,)), local(1, (4,), "bfloat16")], ids=["shape", "type"])
def test_ranks_of_other_shapes_or_types_are_refused(other: Local) -> None:
    collector = Collector(2, "folder")
    collector.add("param", NORM, 0, local(0, (4,)))
    collector.add("param", NORM, 1, other)
    with pytest.raises(TopologyError, match=r"is .*float.* and float32\[\d\] on different ranks"):
        collector.index()


@pytest.mark.parametrize("role", ["main_param", "exp_avg", "exp_avg_sq"])
def test_an_optimizer_that_some_parameters_lack_is_refused(role: Role) -> None:
    collector = Collector(1, "folder")
    collector.add("param", NORM, 0, local(0, (4,)))
    collector.add("param", EMBEDDING, 0, local(0, (4, 4)))
    collector.add(role, EMBEDDING, 0, local(0, (4, 4)))
    with pytest.raises(CoverageError, match=rf"1 of 2 parameters have no {role}, such as {NORM}"):
        collector.index()


def test_a_float32_weight_is_its_own_main_parameter() -> None:
    index = collected(1, {NORM: (4,)})
    assert find(index, Key("main_param", NORM)) is index[Key("param", NORM)]
    assert find(index, Key("exp_avg", NORM)) is None
    assert find(index, Key("param", "other")) is None


def test_a_weight_of_less_precision_is_no_main_parameter() -> None:
    collector = Collector(1, "folder")
    collector.add("param", NORM, 0, local(0, (4,), "bfloat16"))
    assert find(collector.index(), Key("main_param", NORM)) is None


def test_a_main_parameter_alone_stands_for_its_weight() -> None:
    index = collected(1, {NORM: (4,)}, roles=("main_param",))
    assert find(index, Key("param", NORM)) is index[Key("main_param", NORM)]


def test_layers_behind_a_no_op_layer_move_up() -> None:
    names = ["embedding.word_embeddings.weight", *(f"decoder.layers.{n}.mlp.linear_fc2.weight" for n in (0, 2, 12))]
    index = {key: Tensor(key, "float32", (1,), (1,), ()) for key in (Key("exp_avg", name) for name in names)}
    moved = without_gaps(index)
    assert [key.name for key in moved] == [names[0], *(f"decoder.layers.{n}.mlp.linear_fc2.weight" for n in range(3))]
    assert all(tensor.key == key for key, tensor in moved.items())
    assert without_gaps(moved) is moved
