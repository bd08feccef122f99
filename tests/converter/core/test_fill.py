"""Moves that fill slots: each box is read once, and written wherever a file wants it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ckpt2pt.core.extents import DTYPE_BYTES, Box, Extent
from ckpt2pt.core.fill import moves_of, replicas_of
from ckpt2pt.core.index import Collector, Index, Local
from ckpt2pt.core.moves import Move
from ckpt2pt.core.slots import FileSlots, Slot
from ckpt2pt.core.tensor import Key, Role
from ckpt2pt.errors import CoverageError, MissingInputError

GATED, DOWN = "decoder.layers.3.mlp.linear_fc1.weight", "decoder.layers.3.mlp.linear_fc2.weight"
WORDS, NORM = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"
Files = dict[str, Any]


def source(
    tensors: dict[str, Any], tp: int, role: Role = "param", dtype: str = "float32"
) -> tuple[Index, dict[str, Any]]:
    """The index of a model whose tensors lie in rows or columns on ``tp`` ranks, and the elements of each file."""
    collector, files = Collector(tp, "source"), Files()
    for rank in range(tp):
        for name, whole in tensors.items():
            part = whole
            if name == GATED:
                part = np.concatenate([half.reshape(tp, -1, half.shape[1])[rank] for half in np.split(whole, 2)])
            elif name == DOWN:
                part = np.ascontiguousarray(np.split(whole, tp, 1)[rank])
            elif name == WORDS:
                part = np.split(whole, tp)[rank]
            path = f"{rank}:{name}"
            files[path] = part.ravel()
            extent = Extent(path, 0, part.size * DTYPE_BYTES[dtype])
            collector.add(role, name, rank, Local(dtype, part.shape, 0, (extent,)))
    return collector.index(partial=True), files


def carried_out(moves: tuple[Move, ...], files: Files, sizes: dict[tuple[str, int], int]) -> dict[tuple[str, int], Any]:
    """What a plain loop makes of the moves, storage by storage."""
    made = {place: np.zeros(size) for place, size in sizes.items()}
    for move in moves:
        width = DTYPE_BYTES[move.dtype]
        for sink in move.sinks:
            out = made[sink.file, sink.storage][sink.start :]
            at = 0
            for path, offset, nbytes in move.extents:
                out[at : at + nbytes // width] = files[path][offset // width : (offset + nbytes) // width]
                at += nbytes // width
            for copy in move.copies:
                for run in range(copy.runs):
                    read, put = (
                        copy.source_start + run * copy.source_stride,
                        copy.target_start + run * copy.target_stride,
                    )
                    out[put : put + copy.run] = files[copy.storage[0].path][read : read + copy.run]
    return made


def one(key: Key, box: Box, dtype: str = "float32", name: str = "a.pt", start: int = 0) -> FileSlots:
    size = math.prod(box[1])
    slot = Slot(key, dtype, 0, start, box)
    return FileSlots(
        name=name,
        slots=(slot,),
        storages=((size + start) * DTYPE_BYTES[dtype],),
        padded=frozenset({0} if start else ()),
    )


MODEL = {
    GATED: np.arange(16 * 4, dtype="f8").reshape(16, 4),
    DOWN: np.arange(100, 100 + 4 * 8, dtype="f8").reshape(4, 8),
    WORDS: np.arange(200, 200 + 12 * 4, dtype="f8").reshape(12, 4),
    NORM: np.arange(300, 304, dtype="f8"),
}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "box", "expected"),
    [
        pytest.param(GATED, ((0, 4, 0), (2, 2, 4)), MODEL[GATED][[4, 5, 12, 13]], id="gate-and-up-of-a-rank"),
        pytest.param(GATED, ((1, 0, 0), (1, 8, 4)), MODEL[GATED][8:], id="up-alone"),
        pytest.param(DOWN, ((0, 4), (4, 2)), MODEL[DOWN][:, 4:6], id="columns"),
        pytest.param(WORDS, ((8, 0), (8, 4)), np.vstack([MODEL[WORDS][8:], np.zeros((4, 4))]), id="padded-vocabulary"),
        pytest.param(NORM, ((0,), (4,)), MODEL[NORM], id="norm"),
    ],
)
def test_slot_gets_its_box_whatever_the_layout_of_the_source(tp: int, name: str, box: Box, expected: Any) -> None:
    index, files = source(MODEL, tp)
    moves = moves_of(index, [one(Key("param", name), box)], "source")
    made = carried_out(moves, files, {("a.pt", 0): expected.size})
    assert np.array_equal(made["a.pt", 0], expected.ravel())


def test_element_is_read_once_for_all_files_that_want_it() -> None:
    index, files = source(MODEL, 2)
    box: Box = ((0, 4), (4, 2))
    wanted = [
        one(Key("param", DOWN), box, "bfloat16", "model.pt"),
        one(Key("main_param", DOWN), box, "float32", "optim.pt", start=64),
    ]
    [move] = moves_of(index, wanted, "source")
    assert [(sink.file, sink.start, sink.dtype) for sink in move.sinks] == [
        ("model.pt", 0, "bfloat16"),
        ("optim.pt", 64, "float32"),
    ]
    assert move.role == "param"
    assert move.nbytes == 32
    made = carried_out((move,), files, {("model.pt", 0): 8, ("optim.pt", 0): 72})
    assert np.array_equal(made["optim.pt", 0][64:], MODEL[DOWN][:, 4:6].ravel())


def test_weight_and_main_parameter_come_from_their_own_where_the_source_has_both() -> None:
    half, _ = source({NORM: MODEL[NORM]}, 1, "param", "bfloat16")
    full, _ = source({NORM: MODEL[NORM]}, 1, "main_param")
    box: Box = ((0,), (4,))
    wanted = [one(Key("param", NORM), box, "bfloat16", "model.pt"), one(Key("main_param", NORM), box, name="optim.pt")]
    found = moves_of({**half, **full}, wanted, "source")
    assert {(move.role, move.dtype, move.sinks[0].file) for move in found} == {
        ("param", "bfloat16", "model.pt"),
        ("main_param", "float32", "optim.pt"),
    }


def test_boxes_of_a_tensor_count_on_in_its_digest() -> None:
    index, _ = source(MODEL, 1)
    slots = tuple(Slot(Key("param", GATED), "float32", half, 0, ((half, 0, 0), (1, 8, 4))) for half in range(2))
    moves = moves_of(index, [FileSlots(name="a.pt", slots=slots, storages=(128, 128))], "source")
    assert [move.first for move in moves] == [0, 32]


def test_rank_that_holds_padding_alone_reads_nothing() -> None:
    index, _ = source(MODEL, 1)
    assert moves_of(index, [one(Key("param", WORDS), ((12, 0), (4, 4)))], "source") == ()


def test_slot_that_no_tensor_fills_is_refused() -> None:
    index, _ = source(MODEL, 1)
    with pytest.raises(MissingInputError, match="the source has no exp_avg of"):
        moves_of(index, [one(Key("exp_avg", NORM), ((0,), (4,)))], "source")
    with pytest.raises(CoverageError, match="the result asks for"):
        moves_of(index, [one(Key("param", NORM), ((0,), (8,)))], "source")


def test_what_other_ranks_hold_of_the_same_is_compared() -> None:
    index, _ = source(MODEL, 2)
    [(kept, copy)] = replicas_of(index[Key("param", NORM)])
    assert (kept.paths, copy.paths) == ((f"0:{NORM}",), (f"1:{NORM}",))
    assert kept.shape == copy.shape == (4,)
