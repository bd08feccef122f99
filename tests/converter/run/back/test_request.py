"""What decides the result of an import is in its meaning, and nothing else."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Pace
from ckpt2pt.run.back.request import BackRequest

CUT = Topology(num_layers=2)


def test_places_and_pace_do_not_change_the_meaning() -> None:
    one = BackRequest(source=Path("a"), target=Path("b"))
    other = BackRequest(source=Path("c"), target=Path("d"), pace=Pace(workers=9), overwrite=True, verify="full")
    assert one.identity_options(CUT) == other.identity_options(CUT)


def test_every_option_of_the_result_does() -> None:
    one = BackRequest(source=Path("a"), target=Path("b")).identity_options(CUT)
    changes: list[dict[str, object]] = [
        {"full": False}, {"format": "safetensors"}, {"prefix": "p"}, {"contents": ("param",)}, {"copies": True},
    ]  # fmt: skip
    for change in changes:
        assert BackRequest(source=Path("a"), target=Path("b"), **change).identity_options(CUT) != one  # type: ignore[arg-type]
    assert BackRequest(source=Path("a"), target=Path("b")).identity_options(Topology(num_layers=3)) != one
