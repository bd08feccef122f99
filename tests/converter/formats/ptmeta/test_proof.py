"""Slices and weights compared: rounding, NaN, sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.core.layout import Parameter, lay_out
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.megatron.distributed import StoredBucket
from ckpt2pt.formats.ptmeta.proof import check_sizes, check_slices, check_views

MAIN = np.array([1.0, -2.5, 1 / 3, np.nan, np.inf, 7.0], "<f4")
ROUNDED = [0x3F80, 0xC020, 0x3EAB, 0xFFFF, 0x7F80, 0x40E0]  # a NaN as some CPUs round it


@pytest.fixture
def buffer() -> Buffer:
    weights = [Parameter(name="b", shape=(2,), dtype="bfloat16"), Parameter(name="a", shape=(4,), dtype="bfloat16")]
    return lay_out(weights, divisor=4, bucket_numel=None)[0]


def stored(folder: Path, numel: int = 8, unpadded: int = 6) -> list[StoredBucket]:
    path = folder / "main"
    path.write_bytes(MAIN.tobytes() + bytes(8))
    ref = TensorRef("param", "float32", (8,), (Extent(str(path), 0, 32),))
    return [StoredBucket(numel=numel, numel_unpadded=unpadded, tensors={"param": ref})]


def weights(folder: Path, words: list[int]) -> list[tuple[str, TensorRef]]:
    path = folder / "model"
    path.write_bytes(np.array(words, "<u2").tobytes())
    return [
        ("b", TensorRef("b", "bfloat16", (2,), (Extent(str(path), 8, 4),))),
        ("a", TensorRef("a", "bfloat16", (4,), (Extent(str(path), 0, 8),))),
    ]


def test_every_element_is_compared_after_rounding(buffer: Buffer, tmp_path: Path) -> None:
    assert check_slices(buffer, stored(tmp_path), weights(tmp_path, ROUNDED), where="here") == 6


@pytest.mark.parametrize("index", range(6))
def test_one_wrong_element_is_found(index: int, buffer: Buffer, tmp_path: Path) -> None:
    words = [*ROUNDED]
    words[index] = 0x1234
    if index == 3:
        # Where the optimizer has a NaN the weight may be any NaN; that it is none at all is seen by the next step alone.
        assert check_slices(buffer, stored(tmp_path), weights(tmp_path, words), where="here") == 6
        return
    with pytest.raises(FormatError, match="is not what the optimizer holds"):
        check_slices(buffer, stored(tmp_path), weights(tmp_path, words), where="here")


@pytest.mark.parametrize(("wrong", "seen"), [(0, True), (20, False), (49, True), (51, False), (98, True)])
def test_samples_are_taken_at_the_beginning_in_the_middle_and_at_the_end(
    wrong: int, seen: bool, tmp_path: Path
) -> None:
    """A slice that begins elsewhere, or is another's, differs there; what a later bit flip did is for checksums to find."""
    main, path = np.arange(99, dtype="<f4"), tmp_path / "both"
    words = main.copy()
    words[wrong] = 7.5
    path.write_bytes(main.tobytes() + words.tobytes())
    held, weight = (TensorRef("w", "float32", (99,), (Extent(str(path), at, 396),)) for at in (0, 396))
    buffer = lay_out([Parameter(name="w", shape=(99,), dtype="float32")], divisor=1, bucket_numel=None)[0]
    bucket = StoredBucket(numel=99, numel_unpadded=99, tensors={"param": held})
    if seen:
        with pytest.raises(FormatError, match="is not what the optimizer holds"):
            check_slices(buffer, [bucket], [("w", weight)], where="here", at_most=2)
    else:
        assert check_slices(buffer, [bucket], [("w", weight)], where="here", at_most=2) == 6


def test_sizes_with_and_without_padding_must_agree(buffer: Buffer, tmp_path: Path) -> None:
    check_sizes(buffer, stored(tmp_path), where="here")
    for numel, unpadded in [(6, 6), (8, 5)]:
        with pytest.raises(FormatError, match=r"computed are 6 \(8\)"):
            check_sizes(buffer, stored(tmp_path, numel, unpadded), where="here")


def test_offsets_tell_the_order_when_the_weights_share_a_storage(buffer: Buffer, tmp_path: Path) -> None:
    assert check_views(buffer, weights(tmp_path, ROUNDED), where="here")
    swapped = [(name, TensorRef(name, ref.dtype, ref.shape, (Extent("x", at, ref.nbytes),)))
               for (name, ref), at in zip(weights(tmp_path, ROUNDED), (0, 4), strict=True)]  # fmt: skip
    with pytest.raises(FormatError, match="in another order"):
        check_views(buffer, swapped, where="here")


def test_weights_with_storages_of_their_own_say_nothing(buffer: Buffer, tmp_path: Path) -> None:
    apart = [(name, TensorRef(name, ref.dtype, ref.shape, (Extent("x", at, ref.nbytes),)))
             for (name, ref), at in zip(weights(tmp_path, ROUNDED), (0, 4096), strict=True)]  # fmt: skip
    assert not check_views(buffer, apart, where="here")
