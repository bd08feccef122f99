"""Data-parallel shards of every kind are the tensors that they were cut from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt2pt
from ckpt2pt.core.tensor import Role
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import Ckpt2ptError, MissingInputError
from cutting import core_name
from handmade import ROLES, Handmade
from sharding import Sharding

SHARDINGS = {
    "buckets": Sharding(),
    "buffers": Sharding(buffers=2, per_bucket=2),
    "dense": Sharding(aligned=False, per_bucket=100),
    "safetensors": Sharding(suffix="safetensors"),
    "iteration-folders": Sharding(v2=True),
}
CUTS = {
    "dp2": Topology(num_layers=4, data=2),
    "tp2-pp2-dp3": Topology(num_layers=4, tensor=2, pipeline=2, data=3),
    "pp4-dp2-cp2": Topology(num_layers=4, pipeline=4, data=2, context=2),
}
# Without alignment a bucket has to divide by its ranks, which these sizes do for two.
CASES = [(cut, kind) for cut in CUTS for kind in SHARDINGS if kind != "dense" or cut == "dp2"]


@pytest.mark.parametrize(("cut", "kind"), CASES)
def test_shards_are_joined(tmp_path: Path, cut: str, kind: str) -> None:
    layout = CUTS[cut]
    made = Handmade(topology=layout, hidden=6, kv=4, ffn=8, vocab=12)
    SHARDINGS[kind].write(made, tmp_path)
    with ckpt2pt.open(tmp_path) as checkpoint:
        assert (checkpoint.tp, checkpoint.pp, checkpoint.iteration) == (layout.tensor, layout.pipeline, 12)
        for role in ROLES:
            assert_role(checkpoint, made, role)  # type: ignore[arg-type]


def assert_role(checkpoint: ckpt2pt.Checkpoint, made: Handmade, role: Role) -> None:
    for pp in range(made.topology.pipeline):
        for each in made.parameters(pp, 0):
            parts = [made.truth[tp, pp, role, f"0:{each.megatron}"] for tp in range(made.topology.tensor)]
            found = checkpoint.get(core_name(each.mindspore), role)
            assert np.array_equal(found, joined(each.mindspore, parts)), each.mindspore


def joined(name: str, parts: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    if "norm" in name:
        return parts[0]
    if name.endswith(("out_proj.weight", "projection.weight")):
        return np.concatenate(parts, 1)
    if "mapping" in name:
        halves = [np.split(part, 2) for part in parts]
        return np.concatenate([half[at] for at in (0, 1) for half in halves])
    return np.concatenate(parts)


@pytest.mark.parametrize("missing", range(4))
def test_a_missing_rank_of_shards_is_never_read_over(tmp_path: Path, missing: int) -> None:
    Sharding().write(Handmade(topology=Topology(num_layers=4, pipeline=2, data=2)), tmp_path)
    shutil.rmtree(tmp_path / f"rank_{missing}")
    with pytest.raises(Ckpt2ptError, match="rank"):
        ckpt2pt.open(tmp_path)
    with pytest.raises(MissingInputError, match=f"rank_{missing}"):
        ckpt2pt.open(tmp_path, tp=1, pp=2)


def test_shards_without_their_description_are_refused(tmp_path: Path) -> None:
    Sharding().write(Handmade(topology=Topology(num_layers=4, pipeline=2, data=2)), tmp_path)
    shutil.rmtree(tmp_path / "opt_shard_info")
    with pytest.raises(MissingInputError, match="the ranks hold data-parallel shards, and nothing describes them"):
        ckpt2pt.open(tmp_path, tp=1, pp=2)
