"""Every way in which a result can be wrong is seen and named; a right one passes, by either reader."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.discover import discover
from ckpt2pt.formats.megatron.headers import MegatronRank, read_files
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.torchfile.trees import Call, Global, ordered_dict, tensor, with_attrs
from ckpt2pt.verification.leaves import Leaves, TensorLeaf, open_pt
from ckpt2pt.verification.report import Difference
from ckpt2pt.verification.torch_reader import open_with_torch
from results import Result, Tree, convert, convert_request, edit_tree, flip, set_element

READERS = pytest.mark.parametrize("reader", ["own", pytest.param("torch", marks=pytest.mark.torch)])
PAIR = "(torch.bfloat16, torch.float32)"
NORM = "language_model.encoder.layers.0.input_norm.weight"
EMBEDDED = "language_model.embedding.word_embeddings.weight"
NORM_KEY = "decoder.layers.0.input_layernorm.weight"
"""The same among the tensors of a checkpoint."""
NORM_LEAF = "/model/language_model/encoder/layers.0.input_norm.weight"


@pytest.fixture(scope="module")
def plain(golden: Path) -> Path:
    return golden / "megatron06" / "j_tp1pp2dp2"


@pytest.fixture(scope="module")
def finished(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return convert(plain, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def result(finished: Result, tmp_path: Path) -> Result:
    """A copy to damage."""
    return finished.copied(tmp_path / "out")


def reported(result: Result, reader: str = "own") -> list[tuple[str, str, str]]:
    """(file, tensor, problem) of every difference of the first rank."""
    return [(d.file.rpartition("/")[2], d.tensor, d.problem) for d in result.verify(reader=reader).differences]


def only(result: Result) -> Difference:
    (found,) = result.verify().differences
    return found


@READERS
@pytest.mark.parametrize("full", [True, False], ids=["full", "params-only"])
def test_a_right_result_has_no_difference(golden_set: Path, tmp_path: Path, full: bool, reader: str) -> None:
    result = convert(golden_set, tmp_path, full=full)
    for rank in result.request.topology.ranks():
        report = result.verify(rank, reader)
        assert report.differences == ()
        found = open_pt(result.file("model_optim_rng.pt", rank)).items()
        tensors = [name for name, leaf in found if isinstance(leaf, TensorLeaf)]
        weights = [name for name in tensors if name.startswith("/model")]
        # Each weight once, its three slices, and the five tensors of the random state.
        assert report.checked_tensors == len(weights) * (4 if full else 1) + len(tensors) - len(weights)
        assert weights


def test_megatrons_own_files_pass_but_for_the_spelling_of_numpy(golden_set: Path, tmp_path: Path) -> None:
    """What Megatron-LM wrote is the judge of the examination too, with storages, attributes and order of its own."""
    result = convert(golden_set, tmp_path)
    for rank in result.request.topology.ranks():
        theirs = result._replace(folder=golden_set / "A" / "iter_0000002")
        found = [d for d in theirs.verify(rank).differences if "numpy" not in d.expected and "padding" not in d.problem]
        assert found == []


# ------------------------------------------------------------------------------------------------------------ elements


@READERS
@pytest.mark.parametrize("correct_crc", [True, False], ids=["checksum-corrected", "checksum-wrong"])
def test_one_bit_of_a_weight_is_seen_twice(result: Result, reader: str, correct_crc: bool) -> None:
    flip(result.model, NORM_LEAF, 17, correct_crc=correct_crc)
    found = reported(result, reader)
    assert found[-2:] == [
        ("model_optim_rng.pt", NORM, f"1 of 64 elements differ from the source {NORM_KEY} as bfloat16"),
        ("model_optim_rng.pt", NORM, f"1 of 64 elements differ from param of {NORM} in distrib_optim.pt as bfloat16"),
    ]
    assert [problem.startswith("the CRC-32 of data/") for *_, problem in found[:-2]] == ([] if correct_crc else [True])
    difference = result.verify(reader=reader).differences[-1]
    assert (difference.index, difference.count) == (17, 1)
    assert difference.expected != difference.found


@READERS
@pytest.mark.parametrize("role", ["param", "exp_avg", "exp_avg_sq"])
def test_one_bit_of_a_slice_is_seen(result: Result, role: str, reader: str) -> None:
    flip(result.optim, f"/0/{PAIR}/{role}/0", 70_000)
    first = result.verify(reader=reader).differences[0]
    assert first.tensor.startswith(f"{role} of language_model.")
    assert first.problem.startswith("1 of ")
    assert (first.file, first.count) == ("mp_rank_00_000/distrib_optim.pt", 1)


def test_the_element_is_counted_inside_its_parameter(result: Result) -> None:
    """The last parameter of the buffer is the embedding: its last element is the last of the bucket."""
    leaf = open_pt(result.optim)[f"/0/{PAIR}/exp_avg/0"]
    assert str(leaf) == "float32[78080]"
    flip(result.optim, f"/0/{PAIR}/exp_avg/0", 78_079)
    found = only(result)
    assert found.tensor == f"exp_avg of {EMBEDDED}"
    assert found.index == 256 * 64 - 1


def test_a_large_change_of_a_slice_is_no_longer_the_weight(result: Result) -> None:
    set_element(result.optim, f"/0/{PAIR}/param/0", 78_079, struct.pack("<f", 9.5))
    problem = f"1 of 16,384 elements differ from param of {EMBEDDED} in distrib_optim.pt as bfloat16"
    assert ("model_optim_rng.pt", EMBEDDED, problem) in reported(result)


def test_every_differing_element_is_counted_and_the_first_named(result: Result) -> None:
    for index in (5, 9, 60):
        flip(result.model, NORM_LEAF, index)
    first = result.verify().differences[0]
    assert (first.count, first.index) == (3, 5)
    assert str(first).startswith(
        f"mp_rank_00_000/model_optim_rng.pt: {NORM}: 3 of 64 elements differ from the source {NORM_KEY} as bfloat16, "
        "first at element 5: expected "
    )


@READERS
def test_padding_must_be_zero(plain: Path, tmp_path: Path, reader: str) -> None:
    padded = convert(plain, tmp_path, target_data=3)
    assert padded.verify(reader=reader).differences == ()
    set_element(padded.optim, f"/0/{PAIR}/exp_avg_sq/0", 78_080, struct.pack("<f", 1e-30))
    assert reported(padded, reader) == [
        ("distrib_optim.pt", f"/0/{PAIR}/exp_avg_sq/0", "1 of 1 elements of the padding are not zero")
    ]
    assert padded.verify().differences[0].index == 78_080


def with_source(result: Result, tmp_path: Path, change: Callable[[bytearray, int], None], name: str) -> Result:
    """The same result, a source in which the payload of one entry was changed."""
    source = tmp_path / "changed"
    shutil.copytree(result.request.source, source)
    path = source / "rank_0" / "network.ckpt"
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    change(data, index_file(path)[name].extents[0].offset)
    path.write_bytes(data)
    request = replace(result.request, source=source, target=tmp_path / "again")
    return Result(request, discover(request), result.folder)


@pytest.mark.parametrize(
    ("name", "element"),
    [
        pytest.param(NORM, 3, id="parameter"),
        pytest.param(f"exp_avg.{NORM}", 0, id="first-moment"),
        pytest.param(f"exp_avg_sq.{NORM}", 63, id="second-moment"),
    ],
)
def test_a_source_that_is_another_is_seen(result: Result, tmp_path: Path, name: str, element: int) -> None:
    def change(data: bytearray, offset: int) -> None:
        data[offset + 4 * element + 3] ^= 0x40

    found = with_source(result, tmp_path, change, name).verify().differences
    assert {(d.index, d.count) for d in found} == {(element, 1)}
    of_key = f"{name.removesuffix(NORM)[:-1]} of {NORM_KEY}" if name != NORM else NORM_KEY
    assert all(f"differ from the source {of_key}" in d.problem or name == NORM for d in found)


def test_a_nan_of_another_form_is_the_same_weight_but_not_the_same_slice(result: Result, tmp_path: Path) -> None:
    def change(data: bytearray, offset: int) -> None:
        data[offset : offset + 4] = struct.pack("<I", 0x7F800001)

    with_nan = convert_request(with_source(result, tmp_path, change, NORM).request)
    assert with_nan.verify().differences == ()
    set_element(with_nan.model, NORM_LEAF, 0, struct.pack("<H", 0xFFC1))
    assert with_nan.verify().differences == ()
    assert reported(result._replace(request=with_nan.request, chosen=with_nan.chosen)), "a NaN is not a number"
    start = 78_080 - 256 * 64 - 64
    assert math.isnan(struct.unpack("<f", set_element(with_nan.optim, f"/0/{PAIR}/param/0", start, b"\0\0\xc0\x7f"))[0])
    assert reported(with_nan) == [
        ("distrib_optim.pt", f"param of {NORM}", f"1 of 64 elements differ from the source {NORM_KEY}")
    ]


# ---------------------------------------------------------------------------------------------------------------- keys


def encoder(tree: Tree) -> Call:
    found = tree["model"]["language_model"]["encoder"]
    assert isinstance(found, Call)
    return found


def _drop(tree: Tree, key: str) -> None:
    node = encoder(tree)
    node.pairs = [pair for pair in node.pairs if pair[0] != key]


def _put(tree: Tree, key: str, value: Any) -> None:
    node = encoder(tree)
    node.pairs = [(k, value if k == key else v) for k, v in node.pairs]


def _extra(tree: Tree) -> None:
    node = encoder(tree)
    node.pairs = [*node.pairs, ("layers.9.input_norm.weight", dict(node.pairs)["layers.0.input_norm.weight"])]


def _swap(tree: Tree) -> None:
    node = encoder(tree)
    node.pairs = [node.pairs[1], node.pairs[0], *node.pairs[2:]]


def _rename_chunk(tree: Tree) -> None:
    tree["model0"] = tree.pop("model")


def _flatten_embedding(tree: Tree) -> None:
    model = tree["model"]["language_model"]
    weight = dict(model["embedding"]["word_embeddings"].pairs)["weight"]
    model["embedding"] = ordered_dict([("word_embeddings.weight", weight)])


def _set_args(**changes: Any) -> Callable[[Tree], None]:
    def edit(tree: Tree) -> None:
        tree["args"] = with_attrs(tree["args"], changes)

    return edit


ENCODER = "/model/language_model/encoder"
EMBEDDING = "/model/language_model/embedding"
KEYS = [
    pytest.param(
        lambda tree: _drop(tree, "layers.0.input_norm.weight"), [(NORM_LEAF, "is missing")], id="weight-missing"
    ),
    pytest.param(_extra, [(f"{ENCODER}/layers.9.input_norm.weight", "is unexpected")], id="weight-too-many"),
    pytest.param(
        lambda tree: _drop(tree, "layers.1.mlp.dense_h_to_4h._extra_state"),
        [(f"{ENCODER}/layers.1.mlp.dense_h_to_4h._extra_state", "is missing")],
        id="extra-state-missing",
    ),
    pytest.param(
        lambda tree: _put(tree, "layers.1.mlp.dense_h_to_4h._extra_state", 0),
        [(f"{ENCODER}/layers.1.mlp.dense_h_to_4h._extra_state", "holds something")],
        id="extra-state-not-empty",
    ),
    pytest.param(_swap, [(ENCODER, "keys are in another order than Megatron registers them")], id="order"),
    pytest.param(
        lambda tree: _put(tree, "layers.0.input_norm.weight", 1.0),
        [(NORM_LEAF, "has another type or shape")],
        id="a-number-for-a-weight",
    ),
    pytest.param(
        lambda tree: _put(tree, "layers.0.input_norm.weight", tensor("float16", "1", 64, 0, (64,))),
        [(NORM, "has another type or shape")],
        id="another-type",
    ),
    pytest.param(
        lambda tree: _put(tree, "layers.0.input_norm.weight", tensor("bfloat16", "1", 64, 0, (8, 8))),
        [(NORM, "has another type or shape")],
        id="another-shape",
    ),
    pytest.param(
        _flatten_embedding,
        [
            (f"{EMBEDDING}/word_embeddings", "is not there"),
            (f"{EMBEDDING}/word_embeddings/weight", "is missing"),
            (f"{EMBEDDING}/word_embeddings.weight", "is unexpected"),
        ],
        id="another-nesting",
    ),
    pytest.param(lambda tree: tree.update(iteration=3), [("/iteration", "has another value")], id="iteration"),
    pytest.param(
        _set_args(consumed_train_samples=0), [("/args/consumed_train_samples", "has another value")], id="samples"
    ),
    pytest.param(_set_args(iteration=1), [("/args/iteration", "has another value")], id="iteration-in-args"),
    pytest.param(_set_args(hidden_size=65), [("/args/hidden_size", "has another value")], id="an-argument"),
    pytest.param(_set_args(bf16=1), [("/args/bf16", "has another value")], id="one-for-true"),
    pytest.param(_set_args(mine=1), [("/args/mine", "is unexpected")], id="a-new-argument"),
    pytest.param(
        lambda tree: tree["opt_param_scheduler"].update(num_steps=0),
        [("/opt_param_scheduler/num_steps", "has another value")],
        id="num-steps",
    ),
    pytest.param(
        lambda tree: tree["optimizer"]["optimizer"]["param_groups"][1].update(step=0),
        [("/optimizer/optimizer/param_groups/1/step", "has another value")],
        id="step",
    ),
    pytest.param(
        lambda tree: tree["optimizer"]["optimizer"]["param_groups"][0].pop("lr"),
        [("/optimizer/optimizer/param_groups/0/lr", "is missing")],
        id="hyper-parameter",
    ),
    pytest.param(
        lambda tree: tree.update(checkpoint_version=2.0), [("/checkpoint_version", "has another value")], id="version"
    ),
    pytest.param(lambda tree: tree.update(more=1), [("/more", "is unexpected")], id="a-new-key"),
]


@READERS
@pytest.mark.parametrize(("edit", "expected"), KEYS)
def test_a_key_of_the_model_file_that_is_wrong_is_named(
    result: Result, edit: Callable[[Tree], None], expected: list[tuple[str, str]], reader: str
) -> None:
    edit_tree(result.model, edit)
    found = reported(result, reader)
    assert [(tensor_, problem) for _, tensor_, problem in found] == expected


def test_another_name_of_the_chunk_is_everything_missing(result: Result) -> None:
    edit_tree(result.model, _rename_chunk)
    problems = {problem for _, name, problem in reported(result) if name == NORM_LEAF}
    assert problems == {"is missing"}


@READERS
def test_a_byte_of_the_random_state_is_seen(result: Result, reader: str) -> None:
    flip(result.model, "/rng_state/0/torch_rng_state", 5)
    assert reported(result, reader) == [
        ("model_optim_rng.pt", "/rng_state/0/torch_rng_state", "1 of 5,056 elements differ")
    ]


KEY = (Global("torch", "bfloat16"), Global("torch", "float32"))
OPTIM = [
    pytest.param(
        lambda tree: tree["per_bucket_numel"][0].update({KEY: [78_081]}),
        [(f"/per_bucket_numel/0/{PAIR}/0", "is another number")],
        id="padded-size",
    ),
    pytest.param(
        lambda tree: tree["per_bucket_numel_unpadded"][0].update({KEY: [78_079]}),
        [(f"/per_bucket_numel_unpadded/0/{PAIR}/0", "is another number")],
        id="true-size",
    ),
    pytest.param(
        lambda tree: tree[0][KEY].update(exp_avg=[]),
        [(f"/0/{PAIR}/exp_avg/0", "is missing")],
        id="bucket-missing",
    ),
    pytest.param(
        lambda tree: tree[0][KEY].update(step=[1]),
        [(f"/0/{PAIR}/step/0", "is unexpected")],
        id="something-else",
    ),
    pytest.param(
        lambda tree: tree[0][KEY].update(param=[tensor("float32", "0", 78_080, 0, (78_079,))]),
        [
            (f"/0/{PAIR}/param/0", "has another type or size"),
        ],
        id="bucket-too-short",
    ),
]


@pytest.mark.parametrize(("edit", "expected"), OPTIM)
def test_a_key_of_the_optimizer_file_that_is_wrong_is_named(
    result: Result, edit: Callable[[Tree], None], expected: list[tuple[str, str]]
) -> None:
    edit_tree(result.optim, edit)
    assert [(name, problem) for _, name, problem in reported(result)] == expected


def test_moments_that_changed_places_are_seen(result: Result) -> None:
    def swap(tree: Tree) -> None:
        buffer = tree[0][KEY]
        buffer["exp_avg"], buffer["exp_avg_sq"] = buffer["exp_avg_sq"], buffer["exp_avg"]

    edit_tree(result.optim, swap)
    assert {name.split()[0] for _, name, _ in reported(result)} == {"exp_avg", "exp_avg_sq"}


# --------------------------------------------------------------------------------------------------------------- files


@READERS
@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_a_file_that_is_not_there_is_a_difference(result: Result, name: str, reader: str) -> None:
    result.file(name).unlink()
    assert (name, "file") in [found[:2] for found in reported(result, reader)]


@READERS
def test_a_file_that_was_cut_is_a_difference(result: Result, reader: str) -> None:
    result.optim.write_bytes(result.optim.read_bytes()[:100_000])
    assert ("distrib_optim.pt", "file") in [found[:2] for found in reported(result, reader)]


@READERS
def test_a_result_that_would_run_something_is_refused_and_runs_nothing(
    result: Result, tmp_path: Path, reader: str
) -> None:
    trap = tmp_path / "trap"
    edit_tree(result.model, lambda tree: tree.update(x=Call(Global("os", "mkdir"), (str(trap),))))
    assert any("os.mkdir" in problem for *_, problem in reported(result, reader))
    assert not trap.exists()


@pytest.mark.torch
def test_what_torch_loads_otherwise_than_our_reader_is_a_difference(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have to see the same: here torch is reported another file."""
    other, leaf = result.file("model_optim_rng.pt", (0, 1)), f"{ENCODER}/layers.0.mlp.dense_4h_to_h.weight"
    assert result.verify(reader="torch").differences == ()

    def load(path: Path, **how: Any) -> Leaves:
        found = open_with_torch(path, **how)
        return found | {leaf: open_with_torch(other, **how)[leaf]} if path == result.model else found

    monkeypatch.setattr("ckpt2pt.verification.torch_reader.open_with_torch", load)
    assert [(file, name) for file, name, _ in reported(result, "torch")] == [("model_optim_rng.pt", leaf)]


@pytest.mark.torch
def test_a_tensor_that_is_not_at_its_key_is_a_difference(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of Megatron's files is broken on purpose: it finds a weight that is right, at the key of another."""
    norms = [NORM, NORM.replace("input_norm", "post_attention_norm")]

    def exchange(*paths: Any, **how: Any) -> MegatronRank:
        found = read_files(*paths, **how)
        refs = dict(found.chunks[0])
        refs |= {norms[0]: refs[norms[1]], norms[1]: refs[norms[0]]}
        return replace(found, chunks=(tuple(refs.items()),))

    monkeypatch.setattr("ckpt2pt.verification.prove.read_files", exchange)
    problems = [(name, problem) for _, name, problem in reported(result, "torch")]
    assert (NORM_LEAF, "is not where the tensor lies that was compared") in problems
