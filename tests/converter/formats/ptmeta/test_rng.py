"""Random states made from a seed: Python, numpy and torch take them and go on as if they had been seeded."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from ckpt2pt.formats.ptmeta.rng import rng_state


@pytest.mark.parametrize(("seed", "pp"), [(1234, 0), (1, 3), (2**31, 0)])
def test_each_library_goes_on_as_if_seeded(seed: int, pp: int) -> None:
    (found,), storages = rng_state(seed, tp=0, pp=pp)
    state: Any = found
    shifted = seed + 100 * pp
    ours = random.Random()
    ours.setstate(state["random_rng_state"])
    assert ours.random() == random.Random(shifted).random()
    kind, words, *rest = state["np_rng_state"]
    numpys = np.random.RandomState()
    numpys.set_state((kind, words, *rest))
    assert numpys.uniform() == np.random.RandomState(shifted).uniform()
    generator, seeded = torch.Generator(), torch.Generator().manual_seed(shifted)
    generator.set_state(torch.frombuffer(bytearray(storages["torch"]), dtype=torch.uint8))
    assert torch.equal(torch.randn(40, generator=generator), torch.randn(40, generator=seeded))


def test_trackers_have_megatrons_seeds() -> None:
    _, storages = rng_state(1234, tp=1, pp=1)
    seeds = {name: int.from_bytes(data[:8], "little") for name, data in storages.items() if name != "torch"}
    assert seeds == {
        "cuda": 1334, "data-parallel-rng": 1334, "model-parallel-rng": 1334 + 2718 + 1, "expert-parallel-rng": 1334 + 1024 + 1,
    }  # fmt: skip
