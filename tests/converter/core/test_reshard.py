"""Entries of one rank of another layout: which tensors it holds, under which names, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.core.index import Collector, Index, Local
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.plan import copies
from ckpt2pt.core.reshard import RankTensors, Wanted, reshard, vocabulary_rows
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import CoverageError, TopologyError
from cutting import Arrays, core_name, cut, model

MOMENT = "exp_avg."


def index_of(arrays: Arrays, tp: int, *, gated: bool = True) -> tuple[Index, dict[str, Any]]:
    """The tensors of a model that ``tp`` ranks hold, and the storage of each part."""
    collector = Collector(tp, "source")
    storages: dict[str, Any] = {}
    for rank in range(tp):
        for name, whole in arrays.items():
            if name.startswith("exp_avg_sq."):
                continue
            role, bare = ("exp_avg", name.removeprefix(MOMENT)) if name.startswith(MOMENT) else ("param", name)
            part = np.ascontiguousarray(cut(bare, whole, rank, tp, gated=gated))
            path = f"{rank}:{name}"
            storages[path] = part.ravel()
            extent = Extent(path, 0, part.nbytes)
            collector.add(role, core_name(bare), rank, Local("float32", part.shape, 0, (extent,)))  # type: ignore[arg-type]
    return collector.index(), storages


def wanted(topology: Topology, tp: int, **more: Any) -> Wanted:
    sizes = {"padded_vocab_size": 16, "num_attention_heads": 8, **more.pop("sizes", {})}
    return Wanted(topology=topology, source_tensor=tp, sizes=sizes, tied=more.pop("tied", False), where="source")


def elements(ref: TensorRef, storages: dict[str, Any]) -> Any:
    if not ref.gather:  # all of a view
        return np.concatenate([storages[one.path] for one in ref.extents]).reshape(ref.shape)
    out = np.zeros(math.prod(ref.shape), "<f4")
    for copy in copies(ref.gather):
        source = storages[copy.storage[0].path]
        for run in range(copy.runs):
            read, put = copy.source_start + run * copy.source_stride, copy.target_start + run * copy.target_stride
            out[put : put + copy.run] = source[read : read + copy.run]
    return out.reshape(ref.shape)


@settings(max_examples=25, deadline=None)
@given(
    before=st.sampled_from([1, 2, 4, 8]),
    after=st.sampled_from([1, 2, 4, 8]),
    cuts=st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)]),
    gated=st.booleans(),
    bias=st.booleans(),
)
def test_every_rank_of_any_layout_holds_what_numpy_cuts(
    before: int, after: int, cuts: tuple[int, int], gated: bool, bias: bool
) -> None:
    arrays = model(layers=4, gated=gated, bias=bias)
    index, storages = index_of(arrays, before, gated=gated)
    topology = Topology(num_layers=4, tensor=after, pipeline=cuts[0], virtual=cuts[1])
    held: dict[int, set[str]] = {tp: set() for tp in range(after)}
    for tp, pp in topology.ranks():
        made = reshard(index, (tp, pp), wanted(topology, before), NameTable())
        assert not held[tp] & {*refs(made)}, "on two stages"
        held[tp] |= {*refs(made)}
        for name, ref in refs(made).items():
            bare = name.removeprefix(MOMENT)
            expected = cut(bare, arrays[name], tp, after, gated=gated)
            assert ref.shape == expected.shape
            assert (elements(ref, storages) == expected).all(), (tp, pp, name)
        assert len(made.copies) == (0 if tp else sum(len(index_replicas(index, name)) for name in refs(made)))
    everything = {name for name in arrays if not name.startswith("exp_avg_sq.")}
    assert all(names == everything for names in held.values())


def refs(made: RankTensors) -> dict[str, TensorRef]:
    return {name: made.ref(key) for name, key in made.named("here").items()}


def index_replicas(index: Index, entry: str) -> tuple[Any, ...]:
    role = "exp_avg" if entry.startswith(MOMENT) else "param"
    return next(t.replicas for k, t in index.items() if k == (role, core_name(entry.removeprefix(MOMENT))))


def test_a_rank_refers_to_the_parts_that_it_takes_something_of_alone() -> None:
    """The plans of many ranks would not fit into memory otherwise."""
    index, _ = index_of(model(), 8)
    made = reshard(index, (1, 0), wanted(Topology(num_layers=4, tensor=4), 8), NameTable())
    assert {len(ref.paths) for ref in refs(made).values()} == {1, 2}


def test_a_tied_head_without_a_copy_is_the_embedding() -> None:
    arrays = {name: values for name, values in model().items() if "output_layer" not in name}
    index, storages = index_of(arrays, 2)
    made = reshard(index, (0, 1), wanted(Topology(num_layers=4, pipeline=2), 2, tied=True), NameTable())
    name = next(name for name in refs(made) if "layers" not in name and "norm" not in name and MOMENT not in name)
    embedding = arrays["language_model.embedding.word_embeddings.weight"]
    assert (elements(refs(made)[name], storages) == embedding).all()


@pytest.mark.parametrize(
    ("topology", "what"),
    [
        (Topology(num_layers=3), "layer 3 of the source has no place in the target"),
        (Topology(num_layers=5), "layer 4 of the target is not in the source"),
        (Topology(num_layers=4, noop=frozenset({2})), "layer 2 of the source has no place in the target"),
    ],
)
def test_layers_have_to_be_the_same(topology: Topology, what: str) -> None:
    index, _ = index_of(model(), 1)
    with pytest.raises(CoverageError, match=what):
        reshard(index, (0, 0), wanted(topology, 1), NameTable())


def test_what_ranks_do_not_divide_is_refused_by_name() -> None:
    index, _ = index_of(model(ffn=8), 1)
    sizes = {"num_attention_heads": 16}
    with pytest.raises(TopologyError, match=r"word_embeddings\.weight has 16 rows, which 3 ranks do not divide"):
        reshard(
            index,
            (0, 0),
            wanted(Topology(num_layers=4, tensor=3), 1, sizes=sizes | {"num_attention_heads": 3}),
            NameTable(),
        )
    with pytest.raises(TopologyError, match=r"linear_qkv\.weight has 24 rows, which 16 ranks do not divide"):
        reshard(index, (0, 0), wanted(Topology(num_layers=4, tensor=16), 1, sizes=sizes), NameTable())


@pytest.mark.parametrize(
    ("sizes", "rows", "remark"),
    [
        ({"vocab_size": 15}, 24, "padded from 16 to 24 rows: rows 16 to 23 are zero"),
        ({"vocab_size": 12}, 12, "has 16 rows and the target 12: rows 12 to 15 are padding and left out"),
        ({"make_vocab_size_divisible_by": 12}, 24, "padded from 16 to 24"),
        ({"make_vocab_size_divisible_by": 16}, 12, "has 16 rows and the target 12"),
    ],
)
def test_the_vocabulary_follows_the_target(sizes: dict[str, int], rows: int, remark: str) -> None:
    arrays = model()
    index, storages = index_of(arrays, 1)
    made = reshard(
        index, (0, 0), wanted(Topology(num_layers=4), 1, sizes=sizes | {"padded_vocab_size": rows}), NameTable()
    )
    assert len(made.remarks) == 1
    assert remark in made.remarks[0]
    for name in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        expected = np.zeros((rows, 6), "<f4")
        expected[: min(rows, 16)] = arrays[name][:rows]
        assert (elements(refs(made)[name], storages) == expected).all()


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ({"vocab_size": 17}, 24),
        ({"vocab_size": 13}, 12),
        ({"make_vocab_size_divisible_by": 4}, 24),
        ({"make_vocab_size_divisible_by": 4}, 8),
        ({}, 24),
        ({}, 12),
    ],
)
def test_rows_that_may_be_tokens_are_refused(sizes: dict[str, int], rows: int) -> None:
    index, _ = index_of(model(), 1)
    goal = wanted(Topology(num_layers=4), 1, sizes=sizes | {"padded_vocab_size": rows})
    with pytest.raises(TopologyError, match=f"has 16 rows in the source, {rows} in the target"):
        reshard(index, (0, 0), goal, NameTable())


def test_stages_without_a_vocabulary_say_nothing_of_it() -> None:
    index, _ = index_of(model(), 1)
    goal = wanted(Topology(num_layers=4, pipeline=4), 1, sizes={"vocab_size": 15, "padded_vocab_size": 24})
    reported = [len(reshard(index, (0, pp), goal, NameTable()).remarks) for pp in range(4)]
    assert reported == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("args", "held", "tensor", "rows"),
    [
        pytest.param({}, 128, 2, 128, id="nothing-says-how-it-is-padded"),
        pytest.param({"padded_vocab_size": 136}, 128, 2, 136, id="stated"),
        pytest.param({"padded_vocab_size": 136, "tensor_model_parallel_size": 1}, 128, 2, 128, id="stated-of-others"),
        pytest.param({"make_vocab_size_divisible_by": 8, "vocab_size": 100}, 128, 2, 112, id="tokens"),
        pytest.param({"make_vocab_size_divisible_by": 128}, 640, 2, 768, id="more-ranks-more-padding"),
        pytest.param({"make_vocab_size_divisible_by": 128, "vocab_size": 600}, 768, 1, 640, id="fewer-ranks"),
        pytest.param({"make_vocab_size_divisible_by": 8, "vocab_size": 500}, 128, 2, 128, id="more-tokens-than-rows"),
    ],
)
def test_rows_of_the_vocabulary_follow_the_target(args: dict[str, Any], held: int, tensor: int, rows: int) -> None:
    assert vocabulary_rows(args, held, tensor) == rows
