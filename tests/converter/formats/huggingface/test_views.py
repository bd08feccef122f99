"""Parts of fused tensors as views: what their elements are is proved in test_places; here, what is refused."""

from __future__ import annotations

import pytest

from ckpt2pt.core.extents import Extent, View
from ckpt2pt.core.tensor import Key, Tensor, dense_strides
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.huggingface.names import Form
from ckpt2pt.formats.huggingface.views import Heads, view_of

_STORAGE: tuple[Extent, ...] = (Extent("a", 0, 4096),)
HEADS = Heads(groups=2, queries=2, channels=4)


def tensor(*shape: int) -> Tensor:
    view = View((0,) * len(shape), shape, dense_strides(shape), 0, _STORAGE)
    return Tensor(Key("param", "a.weight"), "float32", shape, shape, (view,), ())


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("query", (15, 3), "15 rows"),
        ("attention", (32, 3), "several queries to a key"),
        ("gate", (6, 3), "is not gated"),
        ("vocabulary", (6, 3), "has 6 rows, and the vocabulary 7 tokens"),
    ],
)
def test_a_tensor_of_another_shape_is_refused(form: Form, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        view_of(tensor(*shape), "own", form, heads=HEADS, vocabulary=7)


def test_rows_behind_the_vocabulary_are_left_out() -> None:
    found = view_of(tensor(6, 3), "own", "vocabulary", heads=HEADS, vocabulary=4)
    assert found.shape == found.fused == (4, 3)
    assert [view.shape for view in found.views] == [(4, 3)]
