"""What a spec asks for becomes a request of the target's kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Pace
from ckpt2pt.kube.conversion import schema
from ckpt2pt.kube.resolve import resolve_any
from ckpt2pt.run.targets.request import DistRequest, McoreRequest

REQUEST = DistRequest(
    topology=Topology(num_layers=2, tensor=2, pipeline=2), source=Path("a"), target=Path("b"), workers=3
)


def spec(**more: object) -> schema.Spec:
    target = schema.Target(path="out", format="Megatron", **more)  # type: ignore[arg-type]
    sizes = schema.Parallelism(tensor=2, pipeline=1, virtual_pipeline=2)
    return schema.Spec(source=schema.Source(path="ms", format="Ckpt"), parallelism=sizes, target=target)


def test_fields_of_the_target_arrive() -> None:
    degrees = schema.Degrees(tensor=4)
    found = resolve_any(spec(names="Legacy", megatron_version="0.12", parallelism=degrees, data_parallel=8))
    assert isinstance(found, McoreRequest)
    assert (found.source, found.source_format, found.metadata) == (Path("ms"), "ckpt", None)
    assert (found.tensor, found.topology.tensor, found.topology.pipeline, found.target_virtual) == (2, 4, 1, 2)
    assert (found.names, found.transformer, found.release, found.data, found.workers) == (
        "legacy",
        "auto",
        (0, 12),
        8,
        2,
    )


@pytest.mark.parametrize("version", ["0.6", "0.20", "1.0", "0.7\n", "019"])
def test_release_that_is_none_is_refused(version: str) -> None:
    with pytest.raises(Exception, match="megatronVersion"):
        resolve_any(spec(megatron_version=version))


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
