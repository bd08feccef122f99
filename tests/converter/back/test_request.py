"""What decides the result of an import is in its meaning, and nothing else."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.back.request import BackRequest
from ckpt2pt.mapping.topology import Topology
from ckpt2pt.request import Pace

CUT = Topology(num_layers=2)


def test_places_and_pace_do_not_change_the_meaning() -> None:
    one = BackRequest(source=Path("a"), target=Path("b"))
    other = BackRequest(source=Path("c"), target=Path("d"), pace=Pace(workers=9), overwrite=True, verify="full")
    assert one.meaning(CUT) == other.meaning(CUT)


def test_every_option_of_the_result_does() -> None:
    one = BackRequest(source=Path("a"), target=Path("b")).meaning(CUT)
    changes: list[dict[str, object]] = [
        {"full": False}, {"format": "safetensors"}, {"prefix": "p"}, {"contents": ("param",)}, {"copies": True},
    ]  # fmt: skip
    for change in changes:
        assert BackRequest(source=Path("a"), target=Path("b"), **change).meaning(CUT) != one  # type: ignore[arg-type]
    assert BackRequest(source=Path("a"), target=Path("b")).meaning(Topology(num_layers=3)) != one
