"""A Spec becomes a Request: what it leaves open, the metadata and the source state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from ckpt2pt.errors import MissingInputError, TopologyError, UsageError
from ckpt2pt.kube.conversion.schema import (
    Degrees,
    Model,
    Parallelism,
    Place,
    Readiness,
    Source,
    Spec,
    Target,
    from_json,
    to_json,
)
from ckpt2pt.kube.resolve import resolve, resolve_any
from ckpt2pt.show.preview import planned


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


def own_layout(spec: Spec, **more: object) -> Spec:
    target = structs.replace(spec.target, format="MindSpore")
    given: dict[str, object] = {"metadata": Place(), "readiness": Readiness(timeout_seconds=0), **more}
    return structs.replace(spec, target=target, **given)


def test_a_layout_that_stays_may_be_given(spec: Spec) -> None:
    request = resolve(own_layout(spec))
    assert request.source_topology is None
    layers = Model(num_layers=4, noop_layers=())
    for more in ({"parallelism": Parallelism(tensor=2, pipeline=2)}, {"model": layers}, {"metadata": spec.metadata}):
        assert resolve(own_layout(spec, **more)) == replace(
            request, metadata=request.metadata if "metadata" not in more else Path(spec.metadata.path)
        )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"parallelism": Parallelism(tensor=4)}, "4"),
        ({"parallelism": Parallelism(tensor=4, pipeline=1)}, "tp ., pp ., and the files are of tp 2, pp 2"),
        ({"parallelism": Parallelism(tensor=1, pipeline=4)}, "tp ., pp ., and the files are of tp 2, pp 2"),
        ({"parallelism": Parallelism(virtual_pipeline=2)}, "parallelism.virtualPipeline is given"),
        ({"model": Model(num_layers=8)}, "is 8, and the source has 4 layers"),
        ({"model": Model(noop_layers=(3,))}, "is 3, and the layers without parameters are none"),
        ({"model": Model(layers_per_stage=(1, 3))}, "model.layersPerStage is given"),
    ],
    ids=str,
)
def test_what_contradicts_a_layout_that_stays_is_refused(spec: Spec, more: dict[str, object], said: str) -> None:
    with pytest.raises((TopologyError, UsageError), match=said):
        resolve(own_layout(spec, **more))


def test_metadata_of_another_layout_is_refused_where_the_layout_stays(spec: Spec, golden: Path) -> None:
    other = Place(path=str(golden / "megatron06" / "a2_tp1pp1_tied_bias" / "pt_meta"))
    with pytest.raises(TopologyError, match=r"pt_meta was written with tp 1, pp 1.* the source has tp 2, pp 2"):
        resolve(own_layout(spec, metadata=other))
    with pytest.raises(TopologyError, match=r"is 8; pt_meta was written with tp 2, pp 2.*4 layers"):
        resolve(own_layout(spec, metadata=spec.metadata, model=Model(num_layers=8)))
    with pytest.raises(MissingInputError):
        resolve(own_layout(spec, metadata=Place(path=f"{spec.metadata.path}-none")))


def test_what_somebody_waits_for_is_not_looked_at_before(spec: Spec, tmp_path: Path) -> None:
    source = Source(path=str(tmp_path / "ms"))
    waiting = own_layout(spec, source=source, parallelism=Parallelism(tensor=2, pipeline=2), readiness=Readiness())
    assert resolve(structs.replace(waiting, source=structs.replace(source, format="Ckpt"))).topology.tensor == 2


@pytest.mark.parametrize("target_format", ["Megatron06", "Megatron", "TorchDist", "MindSpore"])
@pytest.mark.parametrize("metadata", ["", "none"])
def test_what_is_not_there_is_an_input_that_is_missing_whatever_else_is(
    spec: Spec, target_format: str, metadata: str, tmp_path: Path
) -> None:
    """Exit code 66 in whatever order things are looked for; 64 is what the words alone tell."""
    asked = structs.replace(
        spec,
        source=Source(path=str(tmp_path / "none")),
        metadata=Place(path=str(tmp_path / metadata) if metadata else ""),
        target=structs.replace(spec.target, format=target_format),
        readiness=Readiness(timeout_seconds=0),
    )
    with pytest.raises(MissingInputError) as caught:
        planned(resolve_any(asked, in_process=True), [0])
    assert caught.value.exit_code == 66
