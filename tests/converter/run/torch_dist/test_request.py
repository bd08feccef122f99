"""What a conversion into torch_dist is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Pace
from ckpt2pt.run.torch_dist.request import DistRequest
from dist import CUT, of_mindspore

REQUEST = DistRequest(
    topology=Topology(num_layers=2, tensor=2, pipeline=2), source=Path("a"), target=Path("b"), workers=3
)


def test_what_decides_the_bytes_is_the_meaning() -> None:
    known = REQUEST.identity_options()
    assert REQUEST.pace == Pace(workers=3)
    assert replace(REQUEST, verify="full", overwrite=True, tensor=2).identity_options() == known
    others = [
        replace(REQUEST, full=False),
        replace(REQUEST, zero_samples=True),
        replace(REQUEST, topology=Topology(num_layers=2, pipeline=2)),
    ]
    assert known not in [one.identity_options() for one in others]


@pytest.mark.parametrize("flag", ["--target-vpp-size", "--target-dp-size"])
def test_a_layout_of_the_result_is_refused(flag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert of_mindspore(CUT, tmp_path / "out", flag, "2") == 64
    assert f"{flag} is given, and the result has no layout of its own" in capfd.readouterr().err
