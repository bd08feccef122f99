"""Degrees -> ranks, layers, folders."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import UsageError


def test_interleaved_stages_take_turns() -> None:
    cut = Topology(num_layers=8, pipeline=2, virtual=2)
    assert [list(cut.slots(pp, vpp)) for vpp in (0, 1) for pp in (0, 1)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_noop_layer_in_the_middle_keeps_its_slot() -> None:
    cut = Topology(num_layers=8, pipeline=2, noop=frozenset({1, 5}))
    assert cut.real_slots(0, 0) == {0: 0, 2: 2, 3: 3}
    assert cut.real_slots(1, 0) == {0: 4, 2: 6, 3: 7}


def test_a_chunk_of_noop_layers_alone_has_no_parameters() -> None:
    cut = Topology(num_layers=8, pipeline=2, virtual=2, noop=frozenset({4, 5}))
    assert cut.filled_chunks(0) == (0,)
    assert cut.filled_chunks(1) == (0, 1)


def test_uneven_stages() -> None:
    cut = Topology(num_layers=8, pipeline=2, layers_per_stage=(3, 5))
    assert (list(cut.slots(0, 0)), list(cut.slots(1, 0))) == ([0, 1, 2], [3, 4, 5, 6, 7])


def test_uneven_chunks_are_given_chunk_by_chunk() -> None:
    cut = Topology(num_layers=8, pipeline=2, virtual=2, layers_per_stage=(1, 2, 2, 3))
    assert [list(cut.slots(pp, vpp)) for vpp in (0, 1) for pp in (0, 1)] == [[0], [1, 2], [3, 4], [5, 6, 7]]


def test_ranks_count_tensor_parallel_first_and_pipeline_last() -> None:
    cut = Topology(num_layers=4, tensor=2, pipeline=2, data=3, context=2)
    assert [cut.source_rank(tp, pp) for tp, pp in cut.ranks()] == [0, 1, 12, 13]


@pytest.mark.parametrize(("pipeline", "name"), [(1, "mp_rank_03"), (4, "mp_rank_03_002")])
def test_the_folder_has_a_pipeline_suffix_only_when_there_are_stages(pipeline: int, name: str) -> None:
    assert Topology(num_layers=4, tensor=4, pipeline=pipeline).directory(3, 2) == name


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        pytest.param({"num_layers": 7, "pipeline": 2}, "7 layers do not divide", id="layers-not-divisible"),
        pytest.param({"num_layers": 0}, r"model\.numLayers is 0", id="no-layers"),
        pytest.param({"num_layers": 4, "tensor": 0}, r"parallelism\.tensor is 0", id="no-tensor-ranks"),
        pytest.param({"num_layers": 4, "noop": frozenset({-1, 2})}, r"\[-1\] are below 0", id="noop-below-0"),
        pytest.param({"num_layers": 2, "noop": frozenset({0, 1, 62})}, "every layer", id="all-noop"),
        pytest.param({"num_layers": 4, "pipeline": 2, "layers_per_stage": (4,)}, "1 counts, 2 stages", id="short-list"),
        pytest.param({"num_layers": 4, "pipeline": 2, "layers_per_stage": (1, 2)}, "adds up to 3", id="wrong-sum"),
        pytest.param(
            {"num_layers": 4, "pipeline": 2, "layers_per_stage": (-1, 5)}, "holds a count below 0", id="negative"
        ),
        pytest.param({"num_layers": 4 * 10**12}, "more than 65536", id="layers-without-end"),
        pytest.param({"num_layers": 4, "tensor": 10**11}, "more than 65536", id="ranks-without-end"),
        pytest.param(
            {"num_layers": 4, "tensor": 8192, "data": 8192}, "67108864 ranks, more than", id="product-without-end"
        ),
    ],
)
def test_an_impossible_cut_is_refused_with_the_flag_to_hint(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Topology(**degrees)
    assert re.search("\x02[a-zA-Z.]+\x03", caught.value.hint)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.data())
def test_every_layer_is_in_exactly_one_chunk(pipeline: int, virtual: int, each: int, data: st.DataObject) -> None:
    layers = pipeline * virtual * each
    noop = data.draw(st.frozensets(st.integers(0, layers - 1), max_size=layers - 1))
    cut = Topology(num_layers=layers, pipeline=pipeline, virtual=virtual, noop=noop)
    found = [g for pp in range(pipeline) for v in range(virtual) for g in cut.real_slots(pp, v).values()]
    assert sorted(found) == sorted(set(range(layers)) - noop)
