"""Each tensor of a class is the part of Megatron core's that the other direction says: two pieces of arithmetic, one answer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ckpt2pt.core.extents import Extent, Stored, View
from ckpt2pt.core.tensor import Key, Tensor, dense_strides
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.huggingface.names import Form
from ckpt2pt.formats.huggingface.places import natural_shape, placed
from ckpt2pt.formats.huggingface.views import Heads, view_of

HEADS = Heads(groups=2, queries=2, channels=4)
ONE = Heads(groups=4, queries=1, channels=2)
TURNED = Heads(groups=2, queries=2, channels=4, interleaved=True)
STORAGE: tuple[Extent, ...] = (Extent("a", 0, 1 << 20),)


def strided(array: np.ndarray, view: Stored) -> np.ndarray:
    flat = array.reshape(-1)
    steps = tuple(stride * flat.itemsize for stride in view.strides)
    return np.lib.stride_tricks.as_strided(flat[view.first :], view.shape, steps)


def box(view: Stored) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(view.origin, view.shape, strict=True))


def read(tensor: Tensor, source: np.ndarray) -> np.ndarray:
    out = np.full(tensor.shape, -1)
    for view in tensor.views:
        assert (out[box(view)] == -1).all()
        out[box(view)] = strided(source, view)
    assert (out >= 0).all()
    return out.reshape(tensor.fused)


CASES = [
    *((form, HEADS, (32, 3)) for form in ("query", "key", "value")),
    *((form, TURNED, (32, 3)) for form in ("query", "key", "value")),
    *((form, TURNED, (32,)) for form in ("query", "key", "value")),
    ("attention", ONE, (24, 5)),
    ("attention", ONE, (24,)),
    ("transposed", HEADS, (6, 5)),
    ("whole", HEADS, (6, 5)),
    ("channels", TURNED, (4,)),
    ("channels", HEADS, (4,)),
]


@pytest.mark.parametrize(("form", "heads", "shape"), CASES)
def test_there_and_back_is_the_same(form: Form, heads: Heads, shape: tuple[int, ...]) -> None:
    source = np.arange(math.prod(shape)).reshape(shape)
    whole = View((0,) * len(shape), shape, dense_strides(shape), 0, STORAGE)
    tensor = Tensor(Key("param", "a"), "float32", shape, shape, (whole,), ())
    own = read(view_of(tensor, "own", form, heads=heads, vocabulary=0), source)
    assert natural_shape(form, own.shape, heads) == shape
    back = np.full(shape, -1)
    for view in placed(form, own.shape, heads, STORAGE):
        back[box(view)] = strided(own, view)
    there = back >= 0
    assert (back[there] == source[there]).all()
    assert there.sum() == own.size


def test_halves_of_a_gated_projection() -> None:
    source = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    whole = View((0, 0, 0), (2, 3, 4), (12, 4, 1), 0, STORAGE)
    tensor = Tensor(Key("param", "a"), "float32", (2, 3, 4), (6, 4), (whole,), ())
    assert (read(view_of(tensor, "own", "gate", heads=HEADS, vocabulary=0), source) == source[0]).all()
    assert (read(view_of(tensor, "own", "up", heads=HEADS, vocabulary=0), source) == source[1]).all()
    [view] = placed("up", (3, 4), HEADS, STORAGE)
    assert (view.origin, view.shape) == ((1, 0, 0), (1, 3, 4))


def test_rows_of_other_heads_are_refused() -> None:
    with pytest.raises(FormatError, match="7 rows, and 2 groups of 2 heads of 4 channels have 16"):
        list(placed("query", (7, 3), HEADS, STORAGE))
