"""Rows of the vocabulary follow the tensor parallel size of the result."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt2pt.core.vocabulary import vocabulary_rows


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
def test_rows(args: dict[str, Any], held: int, tensor: int, rows: int) -> None:
    assert vocabulary_rows(args, held, tensor) == rows
