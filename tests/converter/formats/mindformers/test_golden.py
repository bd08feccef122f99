"""What the real writers of MindFormers saved, element for element: weights, main parameters and both moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import ckpt2pt
from goldens import golden_root

SETS = sorted(folder.parent for folder in (golden_root() / "mindformers").glob("*/expected.npz"))
ROLES = {"main_param.": "main_param", "adam_m.": "exp_avg", "adam_v.": "exp_avg_sq"}
FLAGS: dict[str, dict[str, Any]] = {
    "static": {"use_interleaved_weight_layout_mlp": True, "use_contiguous_weight_layout_attention": False},
    "pynative": {},  # proves its order itself
}


def widened(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return (array.astype("u4") << 16).view("f4") if array.dtype == np.uint16 else array


def role_of(name: str) -> tuple[str, str]:
    for prefix, role in ROLES.items():
        if name.startswith(prefix):
            return role, name.removeprefix(prefix)
    return "param", name


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_every_element_is_that_of_the_writer(folder: Path) -> None:
    """Tensors that both sides know by one name; rows of gate and up lie one after the other in Megatron core."""
    latent, legacy = folder.name.startswith("dsv3"), (folder / "legacy").is_dir()
    flags = FLAGS["pynative" if "pynative" in folder.name else "static"]
    if latent:
        flags = {name: value for name, value in flags.items() if "mlp" in name}
    place, compared = folder / ("legacy/checkpoint" if legacy else "checkpoint"), 0
    with ckpt2pt.open(place, **flags) as checkpoint:
        there = set(checkpoint.keys())
        for name, wanted in np.load(folder / "expected.npz").items():
            role, own = role_of(name)
            if own not in there:
                assert latent or "." not in own or ".mlp." in own, own
                continue
            if own.endswith("linear_fc1.weight"):
                wanted = np.concatenate([wanted[0::2], wanted[1::2]])
            assert np.array_equal(checkpoint.get(own, role), widened(wanted)), name  # type: ignore[arg-type]
            compared += 1
    assert compared >= 40
