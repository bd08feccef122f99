"""Moves: every source byte once, every target element once, padding never."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.core.buckets import Bucket, Buffer, Placement
from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE, cut, model_storages, moves, optim_storages
from ckpt2pt.core.stage import ChunkPlan, RankPlan, Weight
from ckpt2pt.core.training_step import TrainingStep


def ref(name: str, numel: int, offset: int, dtype: str = "float32") -> TensorRef:
    return TensorRef(name, dtype, (numel,), (Extent("f", offset, numel * DTYPE_BYTES[dtype]),))


def rank(*sizes: list[list[int]], full: bool = True, dtype: str = "float32", divisor: int = 4) -> RankPlan:
    """A plan from the sizes of parameters, by chunk and bucket.  The source has the moments last."""
    chunks = []
    offset = 0
    for vpp, buckets in enumerate(sizes):
        weights: list[Weight] = []
        made = []
        start = 0
        for index, bucket in enumerate(buckets):
            placements = []
            position = start
            for number, numel in enumerate(bucket):
                name = f"c{vpp}.b{index}.p{number}"
                home = Placement(name=name, shape=(numel,), start=position, stop=position + numel)
                refs = []
                for _ in range(3):
                    refs.append(ref(name, numel, offset, dtype))
                    offset += numel * DTYPE_BYTES[dtype]
                weights.append(
                    Weight(
                        name=name, layer=None, shape=(numel,), dtype="bfloat16", source=refs[0],
                        moments=(refs[1], refs[2]) if full else None, placement=home,
                    )
                )  # fmt: skip
                placements.append(home)
                position += numel
            end = -(-position // divisor) * divisor
            made.append(Bucket(index=index, start=start, placements=tuple(placements), numel=end - start))
            start = end
        buffer = Buffer(dtype="bfloat16", buckets=tuple(made)) if full and made else None
        chunks.append(ChunkPlan(vpp=vpp, key=f"model{vpp}", weights=tuple(reversed(weights)), buffer=buffer))
    return RankPlan(
        tp=0, pp=0, directory="d", source="f", training_step=TrainingStep(iteration=1, samples=1, iteration_source="-"), chunks=tuple(chunks),
        ignored=(), tied_copies=(),
    )  # fmt: skip


def covered(plan: RankPlan) -> dict[tuple[str, int], list[tuple[int, int]]]:
    """Where elements arrive: (file, storage) -> sorted runs."""
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for move in moves(plan):
        numel = move.nbytes // DTYPE_BYTES[move.dtype]
        for sink in move.sinks:
            found.setdefault((sink.file, sink.storage), []).append((sink.start, sink.start + numel))
    return {key: sorted(runs) for key, runs in found.items()}


layouts = st.lists(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), max_size=3), min_size=1, max_size=3
).filter(any)


@given(layouts, st.integers(1, 7))
def test_every_element_of_a_storage_arrives_once_and_padding_never(sizes: list[list[list[int]]], divisor: int) -> None:
    plan = rank(*sizes, divisor=divisor)
    found = covered(plan)
    for number, storage in enumerate(model_storages(plan)):
        assert found.pop((MODEL_FILE, number)) == [(0, storage.numel)]
    buckets = [b for c in plan.chunks if c.buffer for _ in range(3) for b in c.buffer.buckets]
    assert [s.numel for s in optim_storages(plan)] == [bucket.numel for bucket in buckets]
    for number, bucket in enumerate(buckets):
        runs = found.pop((OPTIM_FILE, number))
        assert runs == [(p.start - bucket.start, p.stop - bucket.start) for p in bucket.placements]
    assert not found


@given(layouts)
def test_the_source_is_read_once_from_front_to_back(sizes: list[list[list[int]]]) -> None:
    position = 0
    for move in moves(rank(*sizes)):
        assert move.extents[0].offset == position
        position += move.nbytes


def test_a_parameter_has_two_sinks_and_a_moment_one() -> None:
    made = moves(rank([[5]]))
    assert [(m.role, [(s.file, s.storage, s.dtype) for s in m.sinks]) for m in made] == [
        ("param", [(MODEL_FILE, 0, "bfloat16"), (OPTIM_FILE, 0, "float32")]),
        ("exp_avg", [(OPTIM_FILE, 1, "float32")]),
        ("exp_avg_sq", [(OPTIM_FILE, 2, "float32")]),
    ]


def test_a_chunk_without_parameters_moves_no_storage_number() -> None:
    made = moves(rank([[5]], [], [[3]]))
    last = [s for m in made if m.name.startswith("c2") for s in m.sinks]
    assert [(s.file, s.storage) for s in last] == [(MODEL_FILE, 1), *((OPTIM_FILE, n) for n in (3, 4, 5))]


def test_params_only_moves_parameters_into_one_file() -> None:
    plan = rank([[5], [6]], full=False)
    assert optim_storages(plan) == ()
    assert [(m.role, len(m.sinks)) for m in moves(plan)] == [("param", 1), ("param", 1)]


def test_a_tensor_without_elements_has_a_storage_and_no_move() -> None:
    plan = rank([[2]])
    (chunk,) = plan.chunks
    empty = replace(
        chunk.weights[0], source=TensorRef("e", "float32", (0,), ()), moments=None, placement=None, name="e"
    )
    plan = replace(plan, chunks=(replace(chunk, weights=(*chunk.weights, empty)),))
    assert [s.numel for s in model_storages(plan)] == [2, 0]
    assert all(m.name != "e" for m in moves(plan))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 50), st.integers(0, 50))
def test_cutting_joined_extents_is_slicing_their_bytes(sizes: list[int], start: int, nbytes: int) -> None:
    data, extents = b"", []
    for number, size in enumerate(sizes):
        extents.append(Extent(str(number), 100, size))
        data += bytes([number]) * size
    found = cut(tuple(extents), start, nbytes)
    assert b"".join(bytes([int(e.path)]) * e.nbytes for e in found) == data[start : start + nbytes]
    assert all(e.nbytes and e.offset >= 100 and e.offset + e.nbytes <= 100 + sizes[int(e.path)] for e in found)
