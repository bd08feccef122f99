"""What each worker writes: any division holds every element once."""

from __future__ import annotations

import numpy as np
import pytest

from ckpt2pt.errors import CoverageError, MissingInputError
from ckpt2pt.formats.torch_dist.slots import tensors_of
from ckpt2pt.formats.torch_dist.write import DistcpFile
from distcp import ENDS, LAYER, division, index


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (3, 2), (1, 4), (7, 1)])
def test_any_division_holds_every_element_once(sizes: tuple[int, int]) -> None:
    held = index()
    found = division(held, *sizes)
    files = [found.file(rank)[0] for rank in found.ranks()]
    tensors = tensors_of(files, "here")
    assert len({file.name for file in files}) == sizes[0] * sizes[1]
    assert tensors["decoder.layers.mlp.linear_fc1.weight"].shape == (4, 20, 8)
    assert len(tensors) == 4 * (len(LAYER) + len(ENDS))
    assert {entry.dtype for key, entry in tensors.items() if not key.startswith("optimizer.")} == {"bfloat16"}
    for rank in found.ranks():
        file, slots = found.file(rank)
        assert [slot.numel for slot in slots.slots] == [np.prod(part.shape, dtype=int) for part in file.parts]


def test_gate_and_up_are_halves_of_the_whole() -> None:
    found = division(index(), 2, 1)
    parts = [part for part in found.file((1, 0))[0].parts if part.key == "decoder.layers.mlp.linear_fc1.weight"]
    assert [(part.origin, part.shape) for part in parts[:2]] == [((0, 5, 0), (1, 5, 8)), ((0, 15, 0), (1, 5, 8))]


def test_a_hole_is_refused() -> None:
    found = division(index())
    files = [found.file(rank)[0] for rank in found.ranks()]
    with pytest.raises(CoverageError, match="parts hold"):
        tensors_of(files[1:], "here")
    twice = DistcpFile(name="__9_0.distcp", parts=files[0].parts[:1])
    with pytest.raises(CoverageError):
        tensors_of([*files, twice], "here")


def test_a_source_without_moments_is_refused_before_anything_is_written() -> None:
    held = {key: one for key, one in index().items() if key.role != "exp_avg"}
    with pytest.raises(MissingInputError, match="has no exp_avg of"):
        division(held).file((0, 0))
