"""Import into another parallel layout, judged by tensors that numpy cut from whole arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.back.request import BackRequest
from ckpt2pt.back.run import run_back
from ckpt2pt.request import Pace
from conversions import Quiet
from layouts import topology
from relaid import Relaid, check_mindspore

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tp2-tp1": ({"tensor": 2}, {}, {}),
    "tp2-tp4": ({"tensor": 2}, {"tensor": 4}, {"bias": True}),
    "tp2-tp8-not-gated": ({"tensor": 2}, {"tensor": 8}, {"gated": False, "bias": True}),
    "tp1-tp4-grouped": ({}, {"tensor": 4}, {"groups": 4, "heads": 16}),
    "pp4-pp1-tied": ({"pipeline": 4}, {}, {"tied": True}),
    "pp1-pp4-tied": ({}, {"pipeline": 4}, {"tied": True}),
    "pp2vpp2-tp2pp1": ({"pipeline": 2, "virtual": 2}, {"tensor": 2}, {"bucket_numel": 60, "data": 3}),
    "noop": ({"pipeline": 4, "noop": frozenset({3})}, {"pipeline": 2, "noop": frozenset({3})}, {}),
    "uneven": ({"pipeline": 2, "layers_per_stage": (3, 1)}, {"pipeline": 4}, {}),
}


def imported(one: Relaid, other: Relaid, folder: Path, **more: Any) -> None:
    one.convert(folder)
    target = other.topology
    options: dict[str, Any] = {
        "source": folder / "out",
        "target": folder / "back",
        "maps": folder / "pt_meta",
        "layers_per_stage": one.topology.layers_per_stage,
        "noop": one.topology.noop if one.topology.layers_per_stage else None,
        "target_tensor": target.tensor,
        "target_pipeline": target.pipeline,
        "target_virtual": target.virtual,
        "pace": Pace(in_process=True),
    }
    assert run_back(BackRequest(**(options | more)), Quiet()).published


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_what_numpy_cuts(case: str, tmp_path: Path) -> None:
    source, target, kind = CASES[case]
    one, other = (Relaid(topology=topology(**cut), **kind) for cut in (source, target))
    imported(one, other, tmp_path)
    check_mindspore(other, tmp_path / "back")
