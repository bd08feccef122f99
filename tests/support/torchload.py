"""Read Megatron's files with real torch, and flatten them for comparison."""

from __future__ import annotations

import argparse
import enum
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch


@contextmanager
def megatron_names() -> Iterator[None]:
    """Stand-ins for the Megatron classes that golden files name."""

    class ModelType(enum.Enum):
        encoder_or_decoder = 1
        encoder_and_decoder = 2

    ModelType.__module__ = "megatron.core.enums"
    ModelType.__qualname__ = "ModelType"
    modules = {name: types.ModuleType(name) for name in ("megatron", "megatron.core", "megatron.core.enums")}
    vars(modules["megatron.core.enums"])["ModelType"] = ModelType
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def leaves(path: Path, *, unpadded: bool = True) -> dict[str, Any]:
    """Every leaf of a file by its path, in order.

    ``unpadded`` cuts optimizer buckets at their true size: what follows in Megatron's own files is uninitialised memory.
    """
    with megatron_names():
        tree = torch.load(path, map_location="cpu", weights_only=False)
    if unpadded and "per_bucket_numel_unpadded" in tree:
        for number, sizes in enumerate(tree["per_bucket_numel_unpadded"]):
            for key, buckets in tree[number].items():
                for kind in buckets:
                    buckets[kind] = [t[:n] for t, n in zip(buckets[kind], sizes[key], strict=True)]
    return dict(_flatten(tree, ""))


def _flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{path}/{key}")
    elif isinstance(value, list | tuple) and value:
        for number, item in enumerate(value):
            yield from _flatten(item, f"{path}/{number}")
    else:
        yield path, value


def same(left: Any, right: Any) -> bool:
    """Equal in type and in every bit."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and left.contiguous().numpy(force=True).tobytes() == right.contiguous().numpy(force=True).tobytes()
            if left.dtype != torch.bfloat16
            else same(left.view(torch.int16), right.view(torch.int16))
        )
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and np.array_equal(left, right)
    if isinstance(left, enum.Enum):  # each load has a stand-in class of its own
        return type(left).__name__ == type(right).__name__ and left.value == right.value
    return type(left) is type(right) and left == right


def differences(left: Path, right: Path) -> list[str]:
    """Paths of leaves that are on one side only or differ; ``order`` when the keys come in another order."""
    one, other = leaves(left), leaves(right)
    found = [
        path
        for path in dict.fromkeys([*one, *other])
        if path not in one or path not in other or not same(one[path], other[path])
    ]
    return found if found or list(one) == list(other) else ["order"]
