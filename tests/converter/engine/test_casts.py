"""Conversions of floating-point types, with torch as the judge."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ckpt2pt.engine.casts import find_cast

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAIRS = [(a, b) for a in WIDTH for b in WIDTH if a != b]

Bytes = npt.NDArray[np.uint8]


def convert(data: Bytes, source: str, target: str) -> Bytes:
    cast = find_cast(source, target)
    assert cast is not None
    out = np.full(data.size // WIDTH[source] * WIDTH[target], 0xAB, np.uint8)
    cast(data.data, out.data)
    return out


def by_torch(data: Bytes, source: str, target: str) -> Bytes:
    """torch's conversion, element type by element type."""
    found = torch.from_numpy(data.copy()).view(TORCH[source]).to(TORCH[target])
    result: Bytes = found.view(torch.uint8).numpy()
    return result


def nans(data: Bytes, dtype: str) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = torch.from_numpy(data.copy()).view(TORCH[dtype]).isnan().numpy()
    return found


def assert_as_torch(data: Bytes, source: str, target: str) -> None:
    """Equal bits but for NaN, which torch writes differently from one instruction set to the next."""
    ours, theirs = convert(data, source, target), by_torch(data, source, target)
    nan = nans(data, source)
    assert np.array_equal(nans(ours, target), nan)
    unit = np.dtype(f"<u{WIDTH[target]}")
    assert np.array_equal(ours.view(unit)[~nan], theirs.view(unit)[~nan])


def patterns(dtype: str) -> Bytes:
    """Every pattern of a half-size type; for float32 every upper half with the lower halves where rounding turns."""
    if WIDTH[dtype] == 2:
        return np.arange(1 << 16, dtype="<u2").view(np.uint8)
    upper = np.arange(1 << 16, dtype="<u4") << np.uint32(16)
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF]
    return np.concatenate([(upper | np.uint32(low)).astype("<u4") for low in lower]).view(np.uint8)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_special_pattern_converts_as_torch_does(source: str, target: str) -> None:
    assert_as_torch(patterns(source), source, target)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.parametrize("seed", range(3))
def test_random_bits_convert_as_torch_does(source: str, target: str, seed: int) -> None:
    assert_as_torch(np.random.default_rng(seed).integers(0, 256, 1 << 20, np.uint8), source, target)


@pytest.mark.parametrize("target", ["bfloat16", "float16"])
def test_weights_of_ordinary_size_convert_as_torch_does(target: str) -> None:
    values = np.random.default_rng(5).normal(0, 0.02, 1 << 18).astype("<f4")
    assert_as_torch(values.view(np.uint8), "float32", target)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        pytest.param(0x3F800000, 0x3F80, id="one"),
        pytest.param(0x3F808000, 0x3F80, id="tie-to-even-down"),
        pytest.param(0x3F818000, 0x3F82, id="tie-to-even-up"),
        pytest.param(0x3F808001, 0x3F81, id="above-the-tie"),
        pytest.param(0x3F807FFF, 0x3F80, id="below-the-tie"),
        pytest.param(0x7F7FFFFF, 0x7F80, id="largest-becomes-infinity"),
        pytest.param(0xFF7FFFFF, 0xFF80, id="most-negative-becomes-infinity"),
        pytest.param(0x7F800000, 0x7F80, id="infinity"),
        pytest.param(0xFF800000, 0xFF80, id="negative-infinity"),
        pytest.param(0x80000000, 0x8000, id="negative-zero"),
        pytest.param(0x00000001, 0x0000, id="smallest-denormal"),
        pytest.param(0x00008001, 0x0001, id="denormal-rounds-up"),
        pytest.param(0x007FFFFF, 0x0080, id="denormal-becomes-normal"),
        pytest.param(0x7FC00000, 0x7FC0, id="nan"),
        pytest.param(0x7F800001, 0x7FC0, id="nan-whose-payload-is-cut-off"),
        pytest.param(0x7FFFFFFF, 0x7FC0, id="nan-that-would-overflow-to-zero"),
        pytest.param(0xFF800001, 0xFFC0, id="negative-nan"),
        pytest.param(0xFFFFFFFF, 0xFFC0, id="negative-nan-that-would-overflow"),
    ],
)
@pytest.mark.parametrize("company", [0, 7], ids=["alone", "among-others"])
def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(bits: int, expected: int, company: int) -> None:
    data = np.array([*[0x3F800000] * company, bits], "<u4").view(np.uint8)
    assert convert(data, "float32", "bfloat16").view("<u2")[-1] == expected


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_up_and_down_again_is_the_identity(half: str) -> None:
    data = patterns(half)
    there = convert(data, half, "float32")
    back = convert(there, "float32", half)
    known = ~nans(data, half)
    assert np.array_equal(back.view("<u2")[known], data.view("<u2")[known])


@pytest.mark.parametrize("dtype", [*WIDTH, "int8"])
def test_a_type_needs_no_conversion_into_itself(dtype: str) -> None:
    assert find_cast(dtype, dtype) is None


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_nothing_converts_to_nothing(source: str, target: str) -> None:
    assert convert(np.empty(0, np.uint8), source, target).size == 0


def test_the_source_is_left_as_it_was() -> None:
    data = patterns("float32")
    before = data.copy()
    convert(data, "float32", "bfloat16")
    assert np.array_equal(before, data)
