"""The nouns."""

from __future__ import annotations

import pytest

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckptfiles import WIDTHS


@pytest.mark.parametrize(("shape", "numel"), [((), 1), ((1,), 1), ((0,), 0), ((2, 3), 6), ((4, 0, 5), 0)])
def test_the_number_of_elements_is_the_product_of_the_shape(shape: tuple[int, ...], numel: int) -> None:
    assert TensorRef("w", "float32", shape, ()).numel == numel


def test_the_payload_is_all_extents_together() -> None:
    ref = TensorRef("w", "float32", (3,), (Extent("a", 7, 5), Extent("b", 0, 7)))
    assert ref.nbytes == 12
    assert TensorRef("w", "float32", (0,), ()).nbytes == 0


def test_a_reference_reads_as_name_type_and_shape() -> None:
    assert str(TensorRef("layers.0.weight", "bfloat16", (2, 3), ())) == "layers.0.weight bfloat16[2, 3]"


def test_references_are_values() -> None:
    ref = TensorRef("w", "float32", (1,), (Extent("a", 0, 4),))
    assert ref == TensorRef("w", "float32", (1,), (Extent("a", 0, 4),))
    assert len({ref, ref._replace()}) == 1
    with pytest.raises(AttributeError):
        ref.name = "v"  # type: ignore[misc]


@pytest.mark.parametrize("dtype", WIDTHS)
def test_an_element_weighs_what_the_formats_say(dtype: str) -> None:
    assert DTYPE_BYTES[dtype] == WIDTHS[dtype]


def test_mindspore_keeps_four_bits_in_a_byte() -> None:
    assert DTYPE_BYTES["int4"] == 1
