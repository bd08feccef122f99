"""The metadata of a conversion: a folder, or the source itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import discover
from ckpt2pt.discover.metadata import inputs_of_metadata, meta_of
from ckpt2pt.errors import PermissionDeniedError
from ckpt2pt.kube.conversion.schema import Place, Source, Spec, Target
from ckpt2pt.kube.resolve import resolve
from goldens import golden_sets
from handmade import Handmade
from other_user import become_another_user

B = next(folder for folder in golden_sets() if folder.name == "b_tp2pp2")


@pytest.mark.parametrize(
    ("closed", "mode"),
    [
        ("pt_meta", 0o700),
        ("pt_meta/args_tp00_pp000.pt", 0o600),
        ("pt_meta/param_map_buffer0_dp0tp0pp0vpp0.json", 0o600),
    ],
)
def test_metadata_of_another_user_names_who_may_read_it(closed: str, mode: int, unexpected: Path) -> None:
    request = Handmade(topology=Topology(num_layers=2)).write(unexpected)
    (unexpected / closed).chmod(mode if os.getuid() == 0 else 0)
    become_another_user()
    with pytest.raises(PermissionDeniedError, match=f"{Path(closed).name} belongs to uid {os.getuid()},"):
        discover(request)


def test_a_megatron_checkpoint_says_of_itself_what_its_metadata_says(tmp_path: Path) -> None:
    """The reference has captured ``pt_meta`` of the same run."""
    spec = Spec(source=Source(path=str(B / "A")), target=Target(path=str(tmp_path)))
    own, folder = (
        resolve(each)
        for each in (spec, Spec(source=spec.source, metadata=Place(path=str(B / "pt_meta")), target=spec.target))
    )
    for rank in own.topology.ranks():
        mine, theirs = meta_of(own, rank), meta_of(folder, rank)
        assert mine.chunks == theirs.chunks
        assert (mine.sizes, mine.params_dtype, mine.tied) == (theirs.sizes, theirs.params_dtype, theirs.tied)
        assert inputs_of_metadata(own, rank) == []
        assert len(inputs_of_metadata(folder, rank)) == 2
