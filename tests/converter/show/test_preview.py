"""Plans as documents, at the size of real models: only headers are read, so a terabyte costs nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import discover, prepare_all, target_of
from ckpt2pt.discover.request import Request
from ckpt2pt.run.conversion import run
from ckpt2pt.show.preview import preview, render
from conversions import Quiet
from handmade import Handmade
from synthetic import Model, build


def planned(request: Request, *, stages: range | None = None, names: bool = False) -> dict[str, Any]:
    chosen = discover(request)
    ranks = prepare_all(request, chosen, stages or range(request.topology.pipeline))
    document = preview(request, chosen, target_of(request, chosen), ranks, names=names)
    assert render(document)
    found: dict[str, Any] = json.loads(json.dumps(document))
    return found


def test_a_plan_foretells_the_files_byte_for_byte(tmp_path: Path) -> None:
    made = Handmade(topology=Topology(num_layers=4, pipeline=2, noop=frozenset({1})), bucket_numel=50, data=3)
    request = made.write(tmp_path)
    document = planned(request)
    assert not any(rank["done"] for rank in document["ranks"])
    outcome = run(request, range(2), Quiet())
    for rank in document["ranks"]:
        sizes = {p.name: p.stat().st_size for p in (outcome.target.folder / rank["directory"]).glob("*.pt")}
        assert sizes == {file["name"]: file["nbytes"] for file in rank["files"]}
    assert document["bytesToWrite"] == outcome.bytes_written
    assert document["bytesToRead"] == sum(4 * values.size for values in made.truth.values())
    first = document["ranks"][0]["chunks"][0]
    assert (first["layers"], first["noopLayers"], first["embedding"], first["head"]) == ([0], [1], True, False)
    assert len(first["buckets"]) == len(made.buckets(0, 0)) > 1
    assert all(rank["done"] for rank in planned(request)["ranks"])


def test_names_are_listed_when_asked_for(tmp_path: Path) -> None:
    made = Handmade(topology=Topology(num_layers=2))
    (chunk,) = planned(made.write(tmp_path), names=True)["ranks"][0]["chunks"]
    assert [(row["megatron"], row["mindspore"], tuple(row["shape"])) for row in chunk["names"]] == [
        (each.megatron, each.mindspore, each.shape) for each in made.parameters(0, 0)
    ]


def synthetic(folder: Path, model: Model) -> Request:
    build(folder, model, headers_only=True)
    return Request(
        topology=model.topology, source=folder / "ms", metadata=folder / "pt_meta", target=folder / "out", workers=4
    )


def test_seventy_billion_parameters_are_planned(tmp_path: Path) -> None:
    cut = Topology(num_layers=80, tensor=8, pipeline=4)
    model = Model(topology=cut, hidden=8192, heads=64, groups=8, ffn=28672, vocab=32000)
    document = planned(synthetic(tmp_path, model))
    numel = sum(chunk["numel"] for rank in document["ranks"] for chunk in rank["chunks"])
    assert 68e9 < numel < 70e9
    assert document["bytesToRead"] == 12 * numel
    assert 14 * numel <= document["bytesToWrite"] < 14 * numel + (32 << 20)
    assert [chunk["layers"][0] for rank in document["ranks"][::8] for chunk in rank["chunks"]] == [0, 20, 40, 60]


@pytest.mark.slow
def test_a_hundred_thousand_small_tensors_are_planned(tmp_path: Path) -> None:
    model = Model(topology=Topology(num_layers=5560), hidden=2, heads=1, groups=1, ffn=2, vocab=4)
    document = planned(synthetic(tmp_path, model))
    assert document["ranks"][0]["chunks"][0]["parameters"] == 6 * 5560 + 3
    assert 3 * (6 * 5560 + 3) > 100_000
