"""What a result must hold, worked out from the source and the metadata: layouts that the golden sets do not have."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.ckpt import index_file
from ckpt2pt.errors import FormatError
from ckpt2pt.mapping.names import Rules
from ckpt2pt.pt.pickles import with_attrs
from ckpt2pt.request import Request
from ckpt2pt.survey import survey
from ckpt2pt.verify.expected import Expected, expect, others
from ckpt2pt.verify.leaves import open_pt
from ckptfiles import Tensor, ckpt
from conversions import request_for
from results import Result, convert_request, edit_tree, set_element

HEAD, EMBEDDING = "language_model.output_layer.weight", "language_model.embedding.word_embeddings.weight"


@pytest.fixture
def inputs(golden: Path, tmp_path: Path) -> Request:
    """Copies of a set's source and metadata, to be changed."""
    return copied(golden / "megatron06" / "j_tp1pp2dp2", tmp_path)


def copied(folder: Path, tmp_path: Path) -> Request:
    request = request_for(folder, tmp_path / "out")
    for path, name in ((request.source, "ms"), (request.metadata, "pt_meta")):
        shutil.copytree(path, tmp_path / name)
    for path in (tmp_path / "ms").rglob("*.ckpt"):
        path.chmod(0o600)
    return replace(request, source=tmp_path / "ms", metadata=tmp_path / "pt_meta")


def expected(request: Request, rank: tuple[int, int] = (0, 0)) -> Expected:
    chosen = survey(request)
    return expect(request, chosen, rank, open_pt(request.metadata / f"args_tp{rank[0]:02d}_pp{rank[1]:03d}.pt"))


def edit_map(request: Request, name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = request.metadata / name
    document = json.loads(path.read_text())
    edited = edit(document)
    path.write_text(json.dumps(document if edited is None else edited))


def append(request: Request, rank: int, *tensors: Tensor) -> None:
    path = request.source / f"rank_{rank}" / "network.ckpt"
    path.write_bytes(path.read_bytes() + ckpt(tensors))


def payload(request: Request, rank: int, name: str) -> bytes:
    path = request.source / f"rank_{rank}" / "network.ckpt"
    extent = index_file(path)[name].extents[0]
    return path.read_bytes()[extent.offset : extent.offset + extent.nbytes]


def drop(request: Request, rank: int, part: str) -> None:
    """Write the source again without the entries that have ``part`` in their name."""
    path = request.source / f"rank_{rank}" / "network.ckpt"
    kept = [ref for name, ref in index_file(path).items() if part not in name]
    path.write_bytes(ckpt(Tensor(ref.name, ref.dtype, ref.shape, payload(request, rank, ref.name)) for ref in kept))


def tie(request: Request) -> None:
    """Make the set one with tied embeddings: the last stage's output layer is the copy, in a bucket name of its own."""
    for path in request.metadata.glob("args_*.pt"):
        edit_tree(
            path,
            lambda tree: tree.update(args=with_attrs(tree["args"], {"untie_embeddings_and_output_weights": False})),
        )

    def rename(document: dict[str, Any]) -> dict[str, Any]:
        return {key.replace(HEAD, "word_embeddings.weight"): entry for key, entry in document.items()}

    edit_map(request, "param_map_buffer0_dp0tp0pp1vpp0.json", rename)


def test_the_golden_inputs_raise_no_problem(golden_set: Path, tmp_path: Path) -> None:
    for full in (True, False):
        request = request_for(golden_set, tmp_path, full=full)
        for rank in request.topology.ranks():
            found = expected(request, rank)
            assert found.problems == ()
            assert {len(weight.sources) for chunk in found.chunks for weight in chunk.weights} == {3 if full else 1}
            assert all(bool(chunk.buckets) == (full and bool(chunk.weights)) for chunk in found.chunks)


def test_running_offsets_are_those_of_the_map(inputs: Request) -> None:
    (chunk,) = expected(inputs).chunks
    document = json.loads((inputs.metadata / "param_map_buffer0_dp0tp0pp0vpp0.json").read_text())
    starts = {name.removeprefix("module."): start for name, (_, _, start, _, _) in document.items()}
    assert {weight.name: weight.start for weight in chunk.weights} == starts
    assert chunk.buckets == ((78_080, 78_080),)
    assert [weight.name for weight in chunk.weights] == list(reversed(starts)), "registration order"


def _shift(document: dict[str, Any]) -> None:
    entry = list(document.values())[3]
    entry[2] += 2
    entry[3] += 2


def _end(document: dict[str, Any]) -> None:
    list(document.values())[-1][3] += 1


@pytest.mark.parametrize("edit", [_shift, _end], ids=["gap", "end"])
def test_a_map_that_does_not_add_up_is_a_problem(inputs: Request, edit: Callable[[dict[str, Any]], None]) -> None:
    chosen, template = survey(inputs), open_pt(inputs.metadata / "args_tp00_pp000.pt")
    edit_map(inputs, "param_map_buffer0_dp0tp0pp0vpp0.json", edit)
    found = expect(inputs, chosen, (0, 0), template)
    assert any("running offsets give" in problem for _, problem in found.problems)


@pytest.mark.parametrize("text", ["[1]", '{"a": ["t", [1], 1e999, 1, 0]}', "{"], ids=["list", "infinity", "cut"])
def test_a_map_that_cannot_be_read_is_an_error(inputs: Request, text: str) -> None:
    chosen, template = survey(inputs), open_pt(inputs.metadata / "args_tp00_pp000.pt")
    (inputs.metadata / "param_map_buffer0_dp0tp0pp0vpp0.json").write_text(text)
    with pytest.raises(FormatError, match="cannot be read as a param map"):
        expect(inputs, chosen, (0, 0), template)


def test_a_data_parallel_size_that_does_not_fit_the_buckets_is_a_problem(golden: Path, tmp_path: Path) -> None:
    request = request_for(golden / "megatron06" / "f_tp1pp1dp2_buckets", tmp_path)
    chosen, template = survey(request), open_pt(request.metadata / "args_tp00_pp000.pt")
    assert expect(request, chosen, (0, 0), template).problems == ()
    found = expect(replace(request, target_data=7), chosen, (0, 0), template)
    assert {name for name, _ in found.problems} <= {f"bucket {n}" for n in range(6)}
    assert found.problems


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        pytest.param(
            Tensor("language_model.encoder.layers.3.input_norm.weight", "float32", (64,), bytes(256)),
            "the source has it, and no chunk of this stage holds it",
            id="a-layer-of-another-stage",
        ),
        pytest.param(
            Tensor("language_model.encoder.layers.0.input_norm.bias", "float32", (64,), bytes(256)),
            "the source has it, and pt_meta no slot for language_model.encoder.layers.0.input_norm.bias",
            id="a-parameter-more",
        ),
        pytest.param(
            Tensor("language_model.encoder.layers.0.input_norm.gamma", "float32", (64,), bytes(256)),
            "is a second param of language_model.encoder.layers.0.input_norm.weight",
            id="a-parameter-twice",
        ),
        pytest.param(Tensor("mystery", "float32", (1,), bytes(4)), "no mapping for", id="an-unknown-name"),
    ],
)
def test_a_source_tensor_without_a_home_is_a_problem(inputs: Request, tensor: Tensor, problem: str) -> None:
    append(inputs, 0, tensor)
    ((name, told),) = expected(inputs).problems
    assert name == tensor.name
    assert told.startswith(problem)


def test_what_a_rule_file_ignores_is_no_problem(inputs: Request) -> None:
    append(inputs, 0, Tensor("mystery", "float32", (1,), bytes(4)))
    assert expected(replace(inputs, rules=Rules(ignore=("mystery",)))).problems == ()


def test_a_moment_that_is_missing_is_a_problem(inputs: Request) -> None:
    drop(inputs, 0, "exp_avg_sq.language_model.encoder.layers.1.input_norm")
    assert expected(inputs).problems == (
        ("language_model.encoder.layers.1.input_norm.weight", "the source has no exp_avg_sq for it"),
    )


# ---------------------------------------------------------------------------------------------------------------- tied


def test_a_tied_copy_on_the_last_stage_is_the_source_of_the_head(inputs: Request) -> None:
    tie(inputs)
    result = convert_request(inputs)
    assert [result.verify((0, pp)).differences for pp in (0, 1)] == [(), ()]
    (chunk,) = expected(inputs, (0, 1)).chunks
    head = next(weight for weight in chunk.weights if weight.name == "word_embeddings.weight")
    assert head.leaf == "/model/word_embeddings_for_head/weight"
    assert head.sources["exp_avg"].name == f"exp_avg.{HEAD}"
    path = result.file("model_optim_rng.pt", (0, 1))
    set_element(path, head.leaf, 9, struct.pack("<H", 0x4242))
    assert {d.tensor for d in result.verify((0, 1)).differences} == {"word_embeddings.weight"}


def test_a_last_stage_without_a_copy_takes_the_first_stages(inputs: Request) -> None:
    tie(inputs)
    drop(inputs, 2, HEAD)
    result = convert_request(inputs)
    assert result.verify((0, 1)).differences == ()
    (chunk,) = expected(inputs, (0, 1)).chunks
    sources = next(weight for weight in chunk.weights if weight.name == "word_embeddings.weight").sources
    assert {role: ref.name for role, ref in sources.items()} == {
        "param": EMBEDDING,
        "exp_avg": f"exp_avg.{EMBEDDING}",
        "exp_avg_sq": f"exp_avg_sq.{EMBEDDING}",
    }
    assert sources["param"].extents[0].path.endswith("rank_0/network.ckpt")


@pytest.mark.parametrize("equal", [True, False])
def test_a_copy_that_is_not_carried_must_be_equal(golden: Path, tmp_path: Path, equal: bool) -> None:
    request = copied(golden / "megatron06" / "a2_tp1pp1_tied_bias", tmp_path)
    result = convert_request(request)
    for prefix in ("", "exp_avg.", "exp_avg_sq."):
        data = bytearray(payload(request, 0, prefix + EMBEDDING))
        if not equal and prefix == "exp_avg.":
            data[400] ^= 1
        append(request, 0, Tensor(prefix + HEAD, "float32", (256, 64), bytes(data)))
    again = Result(request, survey(request), result.folder)
    found = again.verify().differences
    assert [(d.tensor, d.index) for d in found] == ([] if equal else [(f"exp_avg.{HEAD} = exp_avg.{EMBEDDING}", 100)])


# --------------------------------------------------------------------------------------------------------------- no-op


@pytest.mark.torch  # it reads the result, too
def test_a_chunk_of_noop_layers_alone_has_its_key_and_no_buffer(golden: Path, tmp_path: Path) -> None:
    """Stage 1 of two, chunk 0 of two: slots 2 and 3 are taken from the source, and from the maps."""
    request = copied(golden / "megatron06" / "e_tp1pp2vpp2_noop_tail", tmp_path)
    topology = replace(request.topology, noop=request.topology.noop | {2, 3})
    request = replace(request, topology=topology)
    # Maps are numbered over buffers: chunk 1's takes the number of chunk 0's.
    maps = [request.metadata / f"param_map_buffer0_dp0tp0pp1vpp{number}.json" for number in (0, 1)]
    maps[1].replace(maps[0])
    drop(request, 1, "layers.2.")
    drop(request, 1, "layers.3.")
    result = convert_request(request)
    for reader in ("own", "torch"):
        assert result.verify((0, 1), reader).differences == ()
    empty, head = expected(request, (0, 1)).chunks
    assert (empty.key, empty.weights, empty.buckets) == ("model0", (), ())
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
    template = open_pt(inputs.metadata / "args_tp00_pp000.pt")
    template |= {"/iteration": 1, "/args/iteration": 1, "/param_name_list/0/0": "x", "/model/x": 1}
    found = others(template, survey(inputs), (0, 0), reference_samples=reference)
    assert found["/args/consumed_train_samples"] == samples
    assert (found["/iteration"], found["/args/iteration"], found["/opt_param_scheduler/num_steps"]) == (2, 2, 8)
    assert found["/optimizer/optimizer/param_groups/1/step"] == 2
    assert not [path for path in found if path.startswith(("/model", "/param_name_list"))]
