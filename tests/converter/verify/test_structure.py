"""What a source and its metadata make of a result: ties, chunks of no-op layers, and inputs that do not fit each other."""

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
from ckpt2pt.core.tensor import Key
from ckpt2pt.errors import FormatError, InputError
from ckpt2pt.mapping.names import Rules
from ckpt2pt.meta import data_parallel_size
from ckpt2pt.plan.buckets import Bucket, Placement
from ckpt2pt.pt.pickles import with_attrs
from ckpt2pt.request import Request
from ckpt2pt.survey import meta_of, survey
from ckpt2pt.verify.held import Held
from ckpt2pt.verify.leaves import open_pt
from ckpt2pt.verify.report import Findings
from ckpt2pt.verify.source import held_for
from ckpt2pt.verify.structure import Chunk, bucket_size, chunks_of, others
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


def held(request: Request, rank: tuple[int, int] = (0, 0)) -> Held:
    return held_for(request, survey(request), rank, meta_of(request, rank))[0]


def chunks(request: Request, rank: tuple[int, int] = (0, 0)) -> list[Chunk]:
    meta, findings = meta_of(request, rank), Findings()
    found = chunks_of(meta, request.topology, rank[1], data_parallel_size(meta.template), findings)
    assert not findings.differences
    return found


def converted(request: Request) -> Callable[[], Result]:
    """Convert what is there now; whatever is changed later is compared with that."""
    result = convert_request(request)
    return lambda: Result(request, survey(request), result.folder)


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


def test_names_are_in_order_of_registration_and_buckets_add_up(inputs: Request) -> None:
    [chunk] = chunks(inputs)
    document = json.loads((inputs.metadata / "param_map_buffer0_dp0tp0pp0vpp0.json").read_text())
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
    (inputs.metadata / "param_map_buffer0_dp0tp0pp0vpp0.json").write_text(text)
    with pytest.raises(FormatError, match="param_map_buffer0_dp0tp0pp0vpp0"):
        result.verify()


def test_a_data_parallel_size_that_does_not_fit_the_buckets_is_refused(golden: Path, tmp_path: Path) -> None:
    result = convert_request(request_for(golden / "megatron06" / "f_tp1pp1dp2_buckets", tmp_path))
    other = result._replace(request=replace(result.request, target_data=7))
    with pytest.raises(FormatError, match="a data-parallel group of 7 pads it"):
        other.verify()


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        pytest.param(
            Tensor("language_model.encoder.layers.3.input_norm.weight", "float32", (64,), bytes(256)),
            "decoder.layers.3.input_layernorm.weight: is in the source, and not in the result",
            id="a-layer-of-another-stage",
        ),
        pytest.param(
            Tensor("language_model.encoder.layers.0.input_norm.bias", "float32", (64,), bytes(256)),
            "decoder.layers.0.input_layernorm.bias: is in the source, and not in the result",
            id="a-parameter-more",
        ),
        pytest.param(
            Tensor("exp_avg.language_model.encoder.layers.0.input_norm.bias", "float32", (64,), bytes(256)),
            "exp_avg of decoder.layers.0.input_layernorm.bias: is in the source, and not in the result",
            id="a-moment-more",
        ),
        pytest.param(
            Tensor("language_model.encoder.layers.0.input_norm.gamma", "float32", (64,), bytes(256)),
            "decoder.layers.0.input_layernorm.weight is on two pipeline stages, or in one file by two names",
            id="a-parameter-twice",
        ),
        pytest.param(
            Tensor("mystery", "float32", (1,), bytes(4)), "no mapping for the MindSpore", id="an-unknown-name"
        ),
    ],
)
def test_a_source_tensor_without_a_place_is_told(inputs: Request, tensor: Tensor, problem: str) -> None:
    again = converted(inputs)
    append(inputs, 0, tensor)
    assert problem in told(again())


def told(result: Result) -> str:
    """The differences, or why the source is refused."""
    try:
        return "\n".join(map(str, result.verify().differences))
    except InputError as error:
        return error.what


def test_what_a_rule_file_ignores_is_no_difference(inputs: Request) -> None:
    request = replace(inputs, rules=Rules(ignore=("mystery",)))
    append(request, 0, Tensor("mystery", "float32", (1,), bytes(4)))
    assert told(converted(request)()) == ""


def test_a_moment_that_is_missing_is_told(inputs: Request) -> None:
    again = converted(inputs)
    drop(inputs, 0, "exp_avg_sq.language_model.encoder.layers.1.input_norm")
    assert (
        told(again()) == "mp_rank_00_000: exp_avg_sq of decoder.layers.1.input_layernorm.weight: is not in the source"
    )


# ---------------------------------------------------------------------------------------------------------------- tied


def test_a_tied_copy_on_the_last_stage_is_the_source_of_the_head(inputs: Request) -> None:
    tie(inputs)
    result = convert_request(inputs)
    assert [result.verify((0, pp)).differences for pp in (0, 1)] == [(), ()]
    assert Key("exp_avg", "output_layer.weight") in held(inputs, (0, 1)).tensors
    path = result.file("model_optim_rng.pt", (0, 1))
    set_element(path, "/model/word_embeddings_for_head/weight", 9, struct.pack("<H", 0x4242))
    assert {d.tensor for d in result.verify((0, 1)).differences} == {"word_embeddings.weight"}


def test_a_last_stage_without_a_copy_takes_the_first_stages(inputs: Request) -> None:
    tie(inputs)
    drop(inputs, 2, HEAD)
    result = convert_request(inputs)
    assert result.verify((0, 1)).differences == ()
    found = held(inputs, (0, 1)).tensors
    tensors = [found[key] for key in found if key.name == "embedding.word_embeddings.weight"]
    assert [tensor.key.role for tensor in tensors] == ["param", "exp_avg", "exp_avg_sq"]
    assert all(tensor.views[0].storage[0].path.endswith("rank_0/network.ckpt") for tensor in tensors)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("copy", [HEAD, "word_embeddings_for_head.weight"])
def test_a_copy_that_is_not_carried_must_be_equal(golden: Path, tmp_path: Path, copy: str, equal: bool) -> None:
    request = copied(golden / "megatron06" / "a2_tp1pp1_tied_bias", tmp_path)
    again = converted(request)
    for prefix in ("", "exp_avg.", "exp_avg_sq."):
        data = bytearray(payload(request, 0, prefix + EMBEDDING))
        if not equal and prefix == "exp_avg.":
            data[400] ^= 1
        append(request, 0, Tensor(prefix + copy, "float32", (256, 64), bytes(data)))
    found = again().verify().differences
    assert [(d.tensor, d.index) for d in found] == ([] if equal else [(f"exp_avg of {EMBEDDING}", 100)])


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
    template = open_pt(inputs.metadata / "args_tp00_pp000.pt")
    template |= {"/iteration": 1, "/args/iteration": 1, "/param_name_list/0/0": "x", "/model/x": 1}
    chosen = survey(inputs)
    _, statement = held_for(inputs, chosen, (0, 0), meta_of(inputs, (0, 0)))
    found = others(template, chosen.clock, statement, reference_samples=reference)
    assert found["/args/consumed_train_samples"] == samples
    assert (found["/iteration"], found["/args/iteration"], found["/opt_param_scheduler/num_steps"]) == (2, 2, 8)
    assert found["/optimizer/optimizer/param_groups/1/step"] == 2
    assert not [path for path in found if path.startswith(("/model", "/param_name_list"))]
