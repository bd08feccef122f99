"""What is found of a source, and by what it is read."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import discover, stored, training
from ckpt2pt.discover.checkpoint import kind_of, only_growing
from handmade import Handmade


def test_each_kind_of_source_is_read_by_its_own_module(tmp_path: Path) -> None:
    request = Handmade(topology=Topology(num_layers=2)).request(tmp_path)
    assert kind_of(request) is training
    assert kind_of(replace(request, source_format="ckpt")) is training
    assert kind_of(replace(request, source_format="megatron")) is stored


@pytest.mark.parametrize("before", [True, False])
def test_cycles_are_looked_for_again_after_a_plan_whatever_became_of_it(before: bool) -> None:
    was = gc.isenabled()
    (gc.enable if before else gc.disable)()
    try:
        with only_growing(), only_growing():
            assert not gc.isenabled()
        assert gc.isenabled() == before
        with pytest.raises(ZeroDivisionError), only_growing():
            raise ZeroDivisionError
        assert gc.isenabled() == before
    finally:
        (gc.enable if was else gc.disable)()


def test_a_worker_holds_nothing_of_other_stages(tmp_path: Path) -> None:
    request = replace(Handmade(topology=Topology(num_layers=4, tensor=2, pipeline=4)).write(tmp_path), verify="none")
    every = discover(request)
    own = every.only([(1, 2)], request)
    assert set(own.files) == {(0, 0), (1, 0), (1, 2)}, "and of the first stage, which has the tied embedding"
    assert set(own.inputs) == {(1, 2)}
    assert (own.identity, own.ranks) == (every.identity, every.ranks)
