"""Random states as a Megatron run has them at its start, made from the seed alone.

A MindSpore run has no counterpart of them: training goes on with other random numbers, and nothing here claims otherwise.
Seeds: Megatron-LM cac60ce4, megatron/initialize.py (``_set_random_seed``) and core/tensor_parallel/random.py.
"""

from __future__ import annotations

import random
import struct

from ckpt2pt.formats.torchfile.trees import Value, tensor

STORAGES = ("torch", "cuda", "data-parallel-rng", "model-parallel-rng", "expert-parallel-rng")


def rng_state(seed: int, *, tp: int, pp: int, ep: int = 0) -> tuple[list[Value], dict[str, bytes]]:
    """The entry ``rng_state`` of a model file, and its storages."""
    seed += 100 * pp
    storages = {
        "torch": _torch_state(seed),
        "cuda": _cuda_state(seed),
        "data-parallel-rng": _cuda_state(seed),
        "model-parallel-rng": _cuda_state(seed + 2718 + tp),
        "expert-parallel-rng": _cuda_state(seed + 1024 + 100 * ep + tp),
    }
    nodes: dict[str, Value] = {key: tensor("uint8", key, len(data), 0, (len(data),)) for key, data in storages.items()}
    version, state, gauss = random.Random(seed).getstate()
    state_of_one: dict[Value, Value] = {
        "random_rng_state": (version, tuple(state), gauss),
        # A list where Megatron has an array: numpy.random.set_state takes both, and no name of numpy is pickled.
        "np_rng_state": ("MT19937", [*_knuth(seed)], 624, 0, 0.0),
        "torch_rng_state": nodes["torch"],
        "cuda_rng_state": nodes["cuda"],
        "rng_tracker_states": {key: nodes[key] for key in STORAGES[2:]},
    }
    return [state_of_one], storages


def _knuth(seed: int) -> list[int]:
    """The 624 words of MT19937 after its plain initialisation, which numpy's and torch's seeds have in common."""
    words = [seed & 0xFFFFFFFF]
    for index in range(1, 624):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + index) & 0xFFFFFFFF)
    return words


def _torch_state(seed: int) -> bytes:
    """``torch.get_rng_state()`` after ``torch.manual_seed``: 5056 bytes (pytorch, aten/src/ATen/CPUGeneratorImpl.cpp)."""
    words = struct.pack("<624Q", *_knuth(seed))
    return struct.pack("<QiiQ", seed, 1, 1, 0) + words + bytes(24 + 8 + 8)


def _cuda_state(seed: int) -> bytes:
    """Seed and Philox offset (pytorch, aten/src/ATen/cuda/CUDAGeneratorImpl.cpp)."""
    return struct.pack("<qq", seed, 0)
