"""Elements that differ are counted by value or by bits, and rounding is torch's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.verification.elements import Differing, rounded

# ------------------------------------------------------------------------------------------------------------ rounding


def as_torch(data: np.ndarray[Any, Any], target: str) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = torch.from_numpy(data).to(getattr(torch, target)).view(torch.int16).numpy()
    return found.view("<u2")


@pytest.mark.parametrize("target", ["bfloat16", "float16"])
def test_rounding_is_torchs_for_every_upper_half_and_the_lower_ones_that_matter(target: str) -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        data = (upper | lower).view("<f4")
        ours = rounded(data.view(np.uint8), "float32", target).view("<u2")
        theirs = as_torch(data, target)
        nan = np.isnan(data)
        assert np.array_equal(ours[~nan], theirs[~nan])
        assert np.isnan(torch.from_numpy(ours.view("<i2")).view(getattr(torch, target)).float().numpy()[nan]).all()


@given(st.lists(st.floats(width=32), min_size=1, max_size=64), st.sampled_from(["bfloat16", "float16"]))
def test_rounding_is_torchs(numbers: list[float], target: str) -> None:
    data = np.array([number for number in numbers if not math.isnan(number)], "<f4")
    ours = rounded(data.view(np.uint8), "float32", target).view("<u2")
    assert np.array_equal(ours, as_torch(data, target))


def test_widening_is_exact() -> None:
    halves = np.arange(1 << 16, dtype="<u2")
    for source in ("bfloat16", "float16"):
        wide = rounded(halves.view(np.uint8), source, "float32").view("<f4")
        theirs = torch.from_numpy(halves.view("<i2")).view(getattr(torch, source)).float().numpy()
        assert np.array_equal(wide, theirs, equal_nan=True)


def test_integers_do_not_round() -> None:
    with pytest.raises(TypeError, match="int32"):
        rounded(np.zeros(8, np.uint8), "int32", "bfloat16")


def test_a_nan_equals_a_nan_and_zeros_differ_in_their_bits_unless_all_bits_count() -> None:
    left = np.array([0.0, math.nan, 1.0, 2.0], "<f4").view(np.uint8)
    right = np.array([-0.0, math.nan, 1.5, 2.0], "<f4")
    right.view("<u4")[1] |= 1
    for strict, counts in ((False, (1, 1)), (True, (3, 0))):
        found = Differing("float32", "float32", strict)
        found.see(100, left, right.view(np.uint8))
        assert (found.differing, found.bits_only, found.seen, found.index) == (*counts, 4, 100)
        assert found.count == sum(counts)
        assert found.shown == ("0 (0x00000000)", "-0 (0x80000000)")
