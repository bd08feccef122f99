"""A Spec becomes a Request: what it leaves open, the metadata and the source state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from ckpt2pt.errors import TopologyError, UsageError
from ckpt2pt.kube.conversion.schema import Degrees, Model, Parallelism, Place, Source, Spec, Target, from_json, to_json
from ckpt2pt.kube.resolve import resolve


@pytest.fixture
def spec(golden: Path, tmp_path: Path) -> Spec:
    """A golden set of tp 2, pp 2, with nothing but its folders."""
    folder = golden / "megatron06" / "b_tp2pp2"
    return Spec(
        source=Source(path=str(folder / "ms")),
        metadata=Place(path=str(folder / "pt_meta")),
        target=Target(path=str(tmp_path / "out")),
    )


def test_sizes_that_are_left_open_are_those_of_the_metadata(spec: Spec) -> None:
    request = resolve(spec)
    topology = request.topology
    assert (topology.tensor, topology.pipeline, request.source_topology) == (2, 2, None)
    given = structs.replace(
        spec, model=Model(num_layers=topology.num_layers), parallelism=Parallelism(tensor=2, pipeline=2)
    )
    assert resolve(given) == request


def test_the_json_of_a_worker_asks_for_the_same(spec: Spec) -> None:
    assert resolve(from_json(to_json(spec), "test")) == resolve(spec)
    assert resolve(spec, in_process=True) == replace(resolve(spec), in_process=True)


def test_another_layout_is_read_from_that_of_the_source(spec: Spec) -> None:
    own = Parallelism(tensor=2, pipeline=2, virtual_pipeline=1)
    relaid = structs.replace(spec, parallelism=own, target=structs.replace(spec.target, parallelism=Degrees(tensor=2)))
    assert resolve(relaid).source_topology is None, "the same size, given twice"
    other = structs.replace(relaid, target=structs.replace(spec.target, parallelism=Degrees(tensor=4)))
    with pytest.raises(TopologyError, match="tp 2, pp 2"):
        resolve(other)


def test_what_contradicts_the_metadata_is_refused(spec: Spec) -> None:
    with pytest.raises((TopologyError, UsageError), match="tp 2, pp 2"):
        resolve(structs.replace(spec, parallelism=Parallelism(tensor=4)))
