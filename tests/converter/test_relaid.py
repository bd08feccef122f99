"""Conversion into another parallel layout, judged by tensors that numpy cut from whole arrays, and by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.run import run
from conversions import Quiet
from layouts import topology
from relaid import Relaid

CUTS = [(2, 1), (2, 4), (2, 8), (1, 2), (1, 4), (4, 2), (8, 1)]
KINDS: dict[str, dict[str, Any]] = {
    "gated": {},
    "biases": {"bias": True},
    "not-gated": {"gated": False, "bias": True},
    "grouped-queries": {"groups": 8, "heads": 16},
    "tied": {"tied": True},
    "float16": {"params_dtype": "float16"},
    "float32": {"params_dtype": "float32"},
    "several-buckets": {"bucket_numel": 60, "data": 3},
    "gamma": {"bias": True, "gamma": True},
}


def convert(one: Relaid, other: Relaid, folder: Path, **more: Any) -> None:
    request = one.becomes(other, folder, **more)
    outcome = run(request, range(other.topology.pipeline), Quiet())
    assert outcome.published
    other.check(outcome)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"tp{cut[0]}-tp{cut[1]}")
def test_every_rank_holds_what_numpy_cuts(cut: tuple[int, int], kind: str, tmp_path: Path) -> None:
    one, other = (Relaid(topology=topology(tensor=tp), **KINDS[kind]) for tp in cut)
    convert(one, other, tmp_path)


STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pp1-pp4": ({}, {"pipeline": 4}),
    "pp4-pp1": ({"pipeline": 4}, {}),
    "pp2-pp2vpp2": ({"pipeline": 2}, {"pipeline": 2, "virtual": 2}),
    "pp2vpp2-pp4": ({"pipeline": 2, "virtual": 2}, {"pipeline": 4}),
    "vpp2-vpp4": ({"pipeline": 1, "virtual": 2}, {"pipeline": 1, "virtual": 4}),
    "even-uneven": ({"pipeline": 2}, {"pipeline": 3, "layers_per_stage": (1, 2, 1)}),
    "uneven-even": ({"pipeline": 3, "layers_per_stage": (2, 0, 2)}, {"pipeline": 2}),
    "uneven-uneven-chunks": (
        {"pipeline": 2, "layers_per_stage": (3, 1)},
        {"pipeline": 2, "virtual": 2, "layers_per_stage": (1, 1, 2, 0)},
    ),
    "noop-tail": ({"pipeline": 2, "noop": frozenset({3})}, {"pipeline": 4, "noop": frozenset({3})}),
    "noop-middle": ({"pipeline": 4, "noop": frozenset({1})}, {"pipeline": 2, "virtual": 2, "noop": frozenset({1})}),
    "both": ({"tensor": 2, "pipeline": 2, "data": 2}, {"tensor": 4, "pipeline": 1}),
}


@pytest.mark.parametrize("kind", ["gated", "tied", "several-buckets"])
@pytest.mark.parametrize("stages", STAGES)
def test_layers_go_to_the_stages_of_the_target(stages: str, kind: str, tmp_path: Path) -> None:
    one, other = (Relaid(topology=topology(**cut), **KINDS[kind]) for cut in STAGES[stages])
    convert(one, other, tmp_path)
