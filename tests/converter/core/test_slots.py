"""Slots: what a file to be written holds of global tensors, and what is refused."""

from __future__ import annotations

import math

import pytest

from ckpt2pt.core.extents import Box, Extent
from ckpt2pt.core.index import Collector, Index, Local
from ckpt2pt.core.slots import FileSlots, Slot, check_box, check_filled, check_used, source_of, weights_alone
from ckpt2pt.core.tensor import Key, Role
from ckpt2pt.errors import CoverageError, MissingInputError

MATRIX, WORDS = "decoder.layers.0.mlp.linear_fc2.weight", "embedding.word_embeddings.weight"


def index(*held: tuple[Role, str, tuple[int, ...]], dtype: str = "float32") -> Index:
    collector = Collector(1, "source")
    for role, name, shape in held:
        extent = Extent(f"{role}:{name}", 0, 4 * math.prod(shape))
        collector.add(role, name, 0, Local(dtype, shape, 0, (extent,)))
    return collector.index(partial=True)


def slot(box: Box, *, name: str = MATRIX, role: Role = "param", storage: int = 0, start: int = 0) -> Slot:
    return Slot(Key(role, name), "float32", storage, start, box)


LEFT: Box = ((0, 0), (4, 2))
RIGHT: Box = ((0, 2), (4, 2))
WHOLE: Box = ((0, 0), (4, 4))
SOURCE = index(("param", MATRIX, (4, 4)))


def test_tensor_that_two_ranks_hold_in_halves_is_used() -> None:
    check_used(SOURCE, {MATRIX: [LEFT, RIGHT]}, ["param"], {}, "source")


def test_box_that_several_ranks_hold_counts_once() -> None:
    check_used(SOURCE, {MATRIX: [WHOLE, WHOLE]}, ["param"], {}, "source")


@pytest.mark.parametrize(
    ("boxes", "what"),
    [
        pytest.param([LEFT], "hold 8 of 16 elements", id="half-is-left-out"),
        pytest.param([WHOLE, LEFT], "hold 24 of 16", id="a-part-lies-in-two-boxes"),
        pytest.param([LEFT, ((0, 1), (4, 2))], "some of them twice", id="halves-overlap"),
        pytest.param([], "has no place in the result", id="no-file-has-it"),
    ],
)
def test_tensor_of_the_source_that_is_not_used_once_is_refused(boxes: list[Box], what: str) -> None:
    with pytest.raises(CoverageError, match=what):
        check_used(SOURCE, {MATRIX: boxes} if boxes else {}, ["param"], {}, "source")


def test_moment_of_another_shape_than_its_parameter_is_not_taken_for_covered() -> None:
    source = index(("param", MATRIX, (4, 4)), ("exp_avg", MATRIX, (4, 5)))
    with pytest.raises(CoverageError, match="hold 16 of 20 elements"):
        check_used(source, {MATRIX: [WHOLE]}, ["param", "exp_avg"], {}, "source")


def test_tensor_that_is_ignored_for_a_reason_need_not_be_used() -> None:
    source = index(("param", MATRIX, (4, 4)), ("main_param", MATRIX, (4, 4)), ("exp_avg", MATRIX, (4, 4)))
    ignored = weights_alone(source)
    assert {key.role for key in ignored} == {"main_param", "exp_avg"}
    check_used(source, {MATRIX: [WHOLE]}, ["param"], ignored, "source")


def test_main_parameter_is_the_weight_where_the_source_has_no_other() -> None:
    source = index(("main_param", MATRIX, (4, 4)))
    assert weights_alone(source) == {}
    assert source_of(source, Key("param", MATRIX), "source").key.role == "main_param"
    check_used(source, {MATRIX: [WHOLE]}, ["param", "main_param"], {}, "source")


@pytest.mark.parametrize(
    ("source", "key"),
    [
        pytest.param(SOURCE, Key("exp_avg", MATRIX), id="moments"),
        pytest.param(
            index(("param", MATRIX, (4, 4)), dtype="bfloat16"), Key("main_param", MATRIX), id="main-parameters"
        ),
    ],
)
def test_what_the_source_lacks_is_refused(source: Index, key: Key) -> None:
    with pytest.raises(MissingInputError, match=f"the source has no {key.role}"):
        source_of(source, key, "source")


def test_tensor_whose_place_nobody_has_looked_up_is_never_taken_for_padding() -> None:
    with pytest.raises(ValueError, match="nothing tells where it lies"):
        check_box(slot(WHOLE), SOURCE[Key("param", MATRIX)]._replace(views=()), "source")


def test_rows_of_the_vocabulary_alone_may_be_padding() -> None:
    source = index(("param", WORDS, (6, 4)), ("param", MATRIX, (4, 4)))
    padded: Box = ((4, 0), (4, 4))
    check_box(slot(padded, name=WORDS), source[Key("param", WORDS)], "source")
    for name, box in ((WORDS, ((0, 2), (4, 4))), (MATRIX, padded), (MATRIX, ((0,), (4,)))):
        with pytest.raises(CoverageError, match="the result asks for"):
            check_box(slot(box, name=name), source[Key("param", name)], "source")
    first: Box = ((0, 0), (4, 4))
    check_used(source, {WORDS: [first, padded], MATRIX: [WHOLE]}, ["param"], {}, "source")


@pytest.mark.parametrize(
    ("starts", "room", "padded", "refused"),
    [
        pytest.param((0, 8), 64, False, "", id="one-behind-the-other"),
        pytest.param((0, 8), 68, False, "fill 64 of them", id="zeros-at-the-end"),
        pytest.param((0, 64), 4 * 72, True, "", id="a-gap-of-padding"),
        pytest.param((0, 64), 4 * 72, False, "fill 64 of them", id="a-gap"),
        pytest.param((0, 7), 64, True, "overlaps", id="overlap"),
        pytest.param((0, 64), 4 * 71, True, "has 284 bytes", id="behind-the-end"),
    ],
)
def test_slots_fill_their_storage_once(starts: tuple[int, int], room: int, padded: bool, refused: str) -> None:
    slots = tuple(slot(box, start=start) for box, start in zip((LEFT, RIGHT), starts, strict=True))
    file = FileSlots(name="a.pt", slots=slots, storages=(room,), padded=frozenset([0] if padded else []))
    if not refused:
        check_filled(file, "target")
        return
    with pytest.raises(CoverageError, match=refused):
        check_filled(file, "target")


def test_storage_that_no_slot_fills_is_refused() -> None:
    with pytest.raises(CoverageError, match=r"storage 1 of a\.pt has 4 bytes, and its 0 slots fill 0"):
        check_filled(FileSlots(name="a.pt", slots=(slot(WHOLE),), storages=(64, 4)), "target")
