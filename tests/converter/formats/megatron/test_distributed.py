"""The file of a coalesced optimizer, damaged: refused by an error of ours, never read as another tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt2pt
from ckpt2pt.core.tensor import ROLES
from ckpt2pt.errors import Ckpt2ptError, InputError
from coresets import ODD


def damaged(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a set with its buffer changed."""
    copied = folder / "copied"
    shutil.copytree(ODD, copied)
    path = next(copied.rglob("distrib_optim.pt"))
    state = torch.load(path)
    (kinds,) = state[0].values()
    change(kinds)
    torch.save(state, path)
    return copied


def swapped(tensor: torch.Tensor, one: int, other: int, numel: int) -> torch.Tensor:
    made = tensor.clone()
    made[one : one + numel], made[other : other + numel] = tensor[other : other + numel], tensor[one : one + numel]
    return made


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda kinds: kinds.update(numel_unpadded=10336), "exp_avg|param is float32 with 10400 elements"),
        (lambda kinds: kinds.pop("numel_unpadded"), "neither numel_unpadded"),
        (lambda kinds: kinds.update(numel_unpadded=torch.tensor(3.0)), "neither numel_unpadded"),
        (lambda kinds: kinds.pop("exp_avg"), "exp_avg is not a tensor"),
        (lambda kinds: kinds.update(param=kinds["param"].half()), "param is float16"),
        (lambda kinds: kinds.update({kind: kinds[kind][:10336] for kind in ("param", "exp_avg", "exp_avg_sq")}, numel_unpadded=10336), "holds 10336 elements, and the parameters of the model file make 10400"),
        (lambda kinds: kinds.update(param=swapped(kinds["param"], 0, 2048, 512)), "is not what the optimizer holds of it"),
        (lambda kinds: kinds.update(param=kinds["exp_avg"]), "is not what the optimizer holds of it"),
    ],
)  # fmt: skip
def test_a_damaged_optimizer_is_refused(change: Callable[[dict[str, Any]], object], what: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=what):
        ckpt2pt.open(damaged(tmp_path, change))


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"buckets_coalesced": True},
        [],
        [None],
        [{"buckets_coalesced": True}, None],
        "text",
        {0: 1},
        {0: {}},
        {1: {}},
        {0: {(1, 2): {}}},
        [[{}]],
    ],
)
def test_a_file_that_is_no_optimizer_is_refused(tree: Any, tmp_path: Path) -> None:
    copied = damaged(tmp_path, lambda _: None)
    torch.save(tree, next(copied.rglob("distrib_optim.pt")))
    with pytest.raises(InputError):
        ckpt2pt.open(copied)


@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_a_cut_or_changed_file_never_gives_a_wrong_tensor(name: str, tmp_path: Path) -> None:
    """Cut anywhere, or with any bytes of its directory or pickle changed: refused by an error of ours, or read as it was."""
    copied = damaged(tmp_path, lambda _: None)
    shutil.copy(next(ODD.rglob(name)), path := next(copied.rglob(name)))
    content, draw = path.read_bytes(), np.random.default_rng(5)
    pickled = content.index(b"data.pkl")
    for trial in range(60):
        made = bytearray(content)
        if trial % 3 == 0:
            made = made[: int(draw.integers(len(content)))]
        else:
            for place in (
                draw.integers(pickled, pickled + 4096, 3)
                if trial % 3 == 1
                else draw.integers(len(made) - 2048, len(made), 3)
            ):
                made[int(place)] = int(draw.integers(256))
        path.write_bytes(made)
        try:
            with ckpt2pt.open(copied) as checkpoint:
                for role in ROLES:
                    for key in checkpoint.keys(role):
                        checkpoint.get(key, role)
        except Ckpt2ptError:
            continue
