"""A source by its tensors: what it is identified by, and the type of the weights that are made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import TryAgainError
from ckpt2pt.run.targets.request import TargetRequest
from ckpt2pt.run.targets.source import read_source
from mcoresets import odd_set, script_of


def request(tmp_path: Path, *script: str) -> TargetRequest:
    folder = odd_set()
    return TargetRequest(
        topology=Topology(num_layers=1),
        source=folder / "ms",
        target=tmp_path / "out",
        source_format="mindspore",
        metadata=script_of(folder, tmp_path, *script),
    )


def test_identity_changes_with_what_the_metadata_states(tmp_path: Path) -> None:
    one = read_source(request(tmp_path)).identity({})
    assert read_source(request(tmp_path)).identity({}) == one
    assert read_source(request(tmp_path)).identity({"mode": "Full"}) != one
    assert read_source(request(tmp_path, "--seed", "5")).identity({}) != one


@pytest.mark.parametrize(
    ("metadata", "dtype", "remarks"),
    [
        pytest.param(True, "bfloat16", 0, id="the-script-says-bf16"),
        pytest.param(False, "bfloat16", 1, id="nothing-says-it"),
    ],
)
def test_weights_of_a_mindspore_source_have_the_type_of_the_training(
    metadata: bool, dtype: str, remarks: int, tmp_path: Path
) -> None:
    asked = request(tmp_path)
    found = read_source(asked if metadata else replace(asked, metadata=None))
    assert (found.dtype, len(found.remarks)) == (dtype, remarks)


def test_weights_alone_leave_moments_out(tmp_path: Path) -> None:
    found = read_source(replace(request(tmp_path), full=False))
    assert {key.role for key in found.index} == {"param"}


def test_source_that_changes_is_noticed(tmp_path: Path) -> None:
    found = read_source(request(tmp_path))
    stale = replace(found, stats={path: {**one, "nbytes": 1} for path, one in found.stats.items()})
    found.prove_unchanged(found.stats)
    with pytest.raises(TryAgainError, match="written while it was read"):
        stale.prove_unchanged(found.stats)
