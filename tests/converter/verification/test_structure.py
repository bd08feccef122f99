"""What is no tensor: names, buckets, chunks of no-op layers, header numbers; and param maps that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from changed import converted, copied, drop, edit_map, metadata_of
from ckpt2pt.core.buckets import Bucket, Placement
from ckpt2pt.discover import discover, meta_of
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.ptmeta.metadata import data_parallel_size
from ckpt2pt.verification.leaves import open_pt
from ckpt2pt.verification.report import Findings
from ckpt2pt.verification.source import held_for
from ckpt2pt.verification.structure import Chunk, bucket_size, chunks_of, others
from conversions import request_for
from results import convert_request, edit_tree


@pytest.fixture
def inputs(golden: Path, tmp_path: Path) -> Request:
    """Copies of a set's source and metadata, to be changed."""
    return copied(golden / "megatron06" / "j_tp1pp2dp2", tmp_path)


def chunks(request: Request, rank: tuple[int, int] = (0, 0)) -> list[Chunk]:
    meta, findings = meta_of(request, rank), Findings()
    found = chunks_of(meta, request.topology, rank[1], data_parallel_size(meta.template), findings)
    assert not findings.differences
    return found


def test_names_are_in_order_of_registration_and_buckets_add_up(inputs: Request) -> None:
    [chunk] = chunks(inputs)
    document = json.loads((metadata_of(inputs) / "param_map_buffer0_dp0tp0pp0vpp0.json").read_text())
    assert list(chunk.names.values()) == [name.removeprefix("module.") for name in reversed(document)]
    assert chunk.buckets == ((78_080, 78_080),)


def test_a_bucket_is_measured_by_the_shapes_in_it(inputs: Request) -> None:
    """Offsets that were read wrong do not make the sizes and places of the proof."""
    meta = meta_of(inputs, (0, 0))
    [chunk], found = meta.chunks, Findings()
    assert chunk.buffer
    [bucket] = chunk.buffer.buckets
    first, *rest = bucket.placements
    late = [
        replace(first, stop=first.stop + 8),
        *(replace(one, start=one.start + 8, stop=one.stop + 8) for one in rest),
    ]
    wrong = replace(bucket, placements=tuple(late), numel=bucket.numel + 8)
    buffer = replace(chunk.buffer, buckets=(wrong,))
    [measured] = chunks_of(replace(meta, chunks=(replace(chunk, buffer=buffer),)), inputs.topology, 0, 2, found)
    assert measured.buckets == ((78_080, 78_080),)
    assert {one.tensor for one in found.differences} == {one.name for one in rest}


def test_a_bucket_is_padded_to_the_data_parallel_group() -> None:
    placement = Placement(name="w", shape=(5,), start=0, stop=5)
    bucket = Bucket(index=0, start=0, placements=(placement,), numel=5)
    assert bucket_size(bucket, 4, Findings()) == (8, 5)
    assert bucket_size(bucket, None, Findings()) == (5, 5)


def _shift(document: dict[str, Any]) -> None:
    entry = list(document.values())[3]
    entry[2] += 2
    entry[3] += 2


def _end(document: dict[str, Any]) -> None:
    list(document.values())[-1][3] += 1


@pytest.mark.parametrize("edit", [_shift, _end], ids=["gap", "end"])
def test_a_map_that_does_not_add_up_is_refused(inputs: Request, edit: Callable[[dict[str, Any]], None]) -> None:
    result = converted(inputs)()
    edit_map(inputs, "param_map_buffer0_dp0tp0pp0vpp0.json", edit)
    with pytest.raises(FormatError, match="param_map_buffer0_dp0tp0pp0vpp0"):
        result.verify()


@pytest.mark.parametrize("text", ["[1]", '{"a": ["t", [1], 1e999, 1, 0]}', "{"], ids=["list", "infinity", "cut"])
def test_a_map_that_cannot_be_read_is_refused(inputs: Request, text: str) -> None:
    result = converted(inputs)()
    (metadata_of(inputs) / "param_map_buffer0_dp0tp0pp0vpp0.json").write_text(text)
    with pytest.raises(FormatError, match="param_map_buffer0_dp0tp0pp0vpp0"):
        result.verify()


def test_a_data_parallel_size_that_does_not_fit_the_buckets_is_refused(golden: Path, tmp_path: Path) -> None:
    result = convert_request(request_for(golden / "megatron06" / "f_tp1pp1dp2_buckets", tmp_path))
    other = result._replace(request=replace(result.request, target_data=7))
    with pytest.raises(FormatError, match="a data-parallel group of 7 pads it"):
        other.verify()


# --------------------------------------------------------------------------------------------------------------- no-op


@pytest.mark.torch  # it reads the result, too
def test_a_chunk_of_noop_layers_alone_has_its_key_and_no_buffer(golden: Path, tmp_path: Path) -> None:
    """Stage 1 of two, chunk 0 of two: slots 2 and 3 are taken from the source, and from the maps."""
    request = copied(golden / "megatron06" / "e_tp1pp2vpp2_noop_tail", tmp_path)
    topology = replace(request.topology, noop=request.topology.noop | {2, 3})
    request = replace(request, topology=topology)
    # Maps are numbered over buffers: chunk 1's takes the number of chunk 0's.
    maps = [metadata_of(request) / f"param_map_buffer0_dp0tp0pp1vpp{number}.json" for number in (0, 1)]
    maps[1].replace(maps[0])
    drop(request, 1, "layers.2.")
    drop(request, 1, "layers.3.")
    result = convert_request(request)
    for reader in ("own", "torch"):
        assert result.verify((0, 1), reader).differences == ()
    empty, head = chunks(request, (0, 1))
    assert (empty.key, empty.names, empty.buckets) == ("model0", {}, ())
    assert head.buckets
    edit_tree(result.file("model_optim_rng.pt", (0, 1)), lambda tree: tree.pop("model0"))
    assert {d.tensor for d in result.verify((0, 1)).differences} == {
        "/model0",
        "/model0/language_model",
        "/model0/language_model/encoder",
    }


# ---------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(("reference", "samples"), [(False, 8), (True, 0)], ids=["true", "reference"])
def test_the_other_keys_carry_the_time_of_the_source(inputs: Request, reference: bool, samples: int) -> None:
    template = open_pt(metadata_of(inputs) / "args_tp00_pp000.pt")
    template |= {"/iteration": 1, "/args/iteration": 1, "/param_name_list/0/0": "x", "/model/x": 1}
    chosen = discover(inputs)
    _, statement = held_for(inputs, chosen, (0, 0), meta_of(inputs, (0, 0)))
    found = others(template, chosen.training_step, statement, reference_samples=reference)
    assert found["/args/consumed_train_samples"] == samples
    assert (found["/iteration"], found["/args/iteration"], found["/opt_param_scheduler/num_steps"]) == (2, 2, 8)
    assert found["/optimizer/optimizer/param_groups/1/step"] == 2
    assert not [path for path in found if path.startswith(("/model", "/param_name_list"))]
