"""Two checkpoints side by side: every kind of difference is seen, counted and named, and nothing else is."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.errors import InputError, UsageError, VerificationError
from ckpt2pt.publish import TRACKER
from ckpt2pt.verification import gather
from ckpt2pt.verification.compare import Comparison, Row, compare, same_bytes
from ckpt2pt.verification.gather import Files
from ckptfiles import Tensor, ckpt, safe, some_tensors
from results import Result, convert, edit_tree, flip, set_element

PAIR = "(torch.bfloat16, torch.float32)"


def save(path: Path, tree: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tree, path)
    return path


def two(tmp_path: Path, left: object, right: object, **options: Any) -> Comparison:
    return compare(save(tmp_path / "l.pt", left), save(tmp_path / "r.pt", right), **options)


def one_row(tmp_path: Path, left: object, right: object) -> Row:
    (row,) = two(tmp_path, left, right).rows
    return row


def floats(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------------ elements


def summary_digest(tree: dict[str, torch.Tensor]) -> str:
    """What a tool that hashes a printed summary sees of a tensor (MindSpeed-Core-MS feature-0.1, tools/md5sum.py)."""
    return hashlib.md5(str(tree).encode(), usedforsecurity=False).hexdigest()


def test_changes_that_a_hash_of_the_printed_summary_does_not_see_are_seen(tmp_path: Path) -> None:
    torch.manual_seed(1)
    left = torch.randn(64, 64)
    right = left.clone()
    right[12:52, 12:52] += 1
    assert summary_digest({"w": left}) == summary_digest({"w": right}), "1,600 of 4,096 elements, the same digest"
    row = one_row(tmp_path, {"w": left}, {"w": right})
    assert (row.name, row.differing, row.numel, row.index) == ("/w", 1600, 4096, 12 * 64 + 12)


def test_a_single_element_is_seen(tmp_path: Path) -> None:
    left = torch.zeros(1000, 1000)
    right = left.clone()
    right[999, 1] = 1e-45
    row = one_row(tmp_path, {"w": left}, {"w": right})
    assert (row.kind, row.differing, row.index) == ("value", 1, 999_001)
    assert row.max_abs is not None
    assert 0 < row.max_abs < 2e-45
    assert row.left == "float32[1000, 1000] 0 (0x00000000)"
    assert row.right.endswith("(0x00000001)")


@pytest.mark.parametrize(
    ("left", "right", "kind", "differing", "bits_only", "max_abs"),
    [
        pytest.param([1.0, 2.0], [1.0, 4.5], "value", 1, 0, 2.5, id="a-value"),
        pytest.param([0.0, 1.0], [-0.0, 1.0], "bits", 0, 1, None, id="signed-zero"),
        pytest.param([0.0, 1.0], [-0.0, 3.0], "value", 1, 1, 2.0, id="both"),
        pytest.param([math.nan, 1.0], [0.0, 1.5], "value", 2, 0, math.nan, id="nan-against-a-number"),
        pytest.param([math.inf, 1.0], [-math.inf, 1.0], "value", 1, 0, math.inf, id="infinities"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_and_bits_are_distinguished(
    tmp_path: Path, left: Any, right: Any, kind: str, differing: int, bits_only: int, max_abs: float, dtype: torch.dtype
) -> None:
    row = one_row(tmp_path, torch.tensor(left, dtype=dtype), torch.tensor(right, dtype=dtype))
    assert (row.kind, row.differing, row.bits_only) == (kind, differing, bits_only)
    assert repr(row.max_abs) == repr(max_abs)
    json.dumps(row.document(), allow_nan=False)


def test_a_nan_equals_any_nan(tmp_path: Path) -> None:
    left = torch.from_numpy(np.array([0x7FC00000, 0x7F800001, 0x3F800000], "<u4").view("<f4"))
    right = torch.from_numpy(np.array([0xFFC00001, 0x7FC00000, 0x3F800000], "<u4").view("<f4"))
    assert two(tmp_path, left, right).same


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128],
)
def test_other_types_are_compared_by_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    left = torch.tensor([0, 1, 1, 1], dtype=dtype)
    right = torch.tensor([0, 1, 0, 1], dtype=dtype)
    row = one_row(tmp_path, left, right)
    assert (row.kind, row.differing, row.index) == ("value", 1, 2)


def test_integers_beyond_what_float64_holds_are_compared_exactly(tmp_path: Path) -> None:
    row = one_row(tmp_path, torch.tensor([1 << 60]), torch.tensor([(1 << 60) + 1]))
    assert (row.differing, row.left) == (1, f"int64[1] {1 << 60}")


def test_a_difference_in_type_still_tells_which_values_differ(tmp_path: Path) -> None:
    row = one_row(tmp_path, floats(1, 2, 3.001), floats(1, 2, 3.001).bfloat16())
    assert (row.kind, row.differing, row.index) == ("type", 1, 2)
    assert (row.left.split()[0], row.right.split()[0]) == ("float32[3]", "bfloat16[3]")
    row = one_row(tmp_path, floats(1, 2), floats(1, 2).bfloat16())
    assert (row.kind, row.differing) == ("type", 0)


def test_a_difference_in_shape_is_reported_without_reading(tmp_path: Path) -> None:
    row = one_row(tmp_path, torch.zeros(2, 3), torch.zeros(3, 2))
    assert (row.kind, row.left, row.right, row.differing) == ("type", "float32[2, 3]", "float32[3, 2]", None)


def test_layout_in_the_file_is_no_difference(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    left = {"a": whole[:6].view(2, 3), "b": whole.view(3, 4).T}
    right = {"a": whole[:6].view(2, 3).clone(), "b": whole.view(3, 4).T.contiguous()}
    assert two(tmp_path, left, right).same


def test_many_blocks_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "BLOCK_BYTES", 64)
    left = torch.zeros(1000)
    right = left.clone()
    right[[20, 500, 999]] = floats(1, math.nan, 2)
    row = one_row(tmp_path, left, right)
    assert (row.differing, row.index) == (3, 20)
    assert row.max_abs is not None
    assert math.isnan(row.max_abs), "a NaN in a middle block is not forgotten"


def test_a_list_of_numbers_is_one_row_with_counts(tmp_path: Path) -> None:
    states = [random.Random(seed).getstate() for seed in (1, 2)]
    left, right = ({"rng_state": [{"random_rng_state": state}], "betas": (0.9, 0.95)} for state in states)
    right["betas"] = (0.9, 0.99)
    rng, betas = two(tmp_path, left, right).rows
    numbers = [tuple(map(int, state[1])) for state in states]
    unlike = [index for index, (one, other) in enumerate(zip(*numbers, strict=True)) if one != other]
    assert (rng.name, rng.kind, rng.numel) == ("/rng_state/0/random_rng_state/1/*", "value", 625)
    assert (rng.differing, rng.index, rng.left) == (len(unlike), unlike[0], str(numbers[0][unlike[0]]))
    assert (betas.name, betas.differing, betas.left, betas.right) == ("/betas/1", None, "0.95", "0.99")
    assert f"{len(unlike)} of 625 elements differ, first at element {unlike[0]}" in str(rng)


# -------------------------------------------------------------------------------------------------------------- leaves


def test_leaves_of_one_side_a_container_for_all_below_it(tmp_path: Path) -> None:
    left = {"same": 1, "mine": {"a": 1, "b": [2, 3]}, "list": [1]}
    right = {"same": 1, "list": [1, 2], "yours": torch.zeros(2)}
    found = two(tmp_path, left, right)
    assert [(row.kind, row.name, row.left, row.right) for row in found.rows] == [
        ("left only", "/mine", "dict with 4 leaves", ""),
        ("right only", "/list/1", "", "2"),
        ("right only", "/yours", "", "float32[2]"),
    ]


@pytest.mark.parametrize(
    ("left", "right", "kind"),
    [
        pytest.param(1, 2, "value", id="number"),
        pytest.param(1, True, "type", id="bool"),
        pytest.param(1, 1.0, "type", id="float"),
        pytest.param("a", None, "type", id="none"),
        pytest.param(torch.float32, torch.bfloat16, "value", id="dtype"),
        pytest.param({}, [], "value", id="container"),
        pytest.param(torch.zeros(1), 0.0, "type", id="tensor"),
    ],
)
def test_other_leaves_are_equal_in_type_and_value(tmp_path: Path, left: object, right: object, kind: str) -> None:
    row = one_row(tmp_path, {"x": left}, {"x": right})
    assert (row.kind, row.name, row.differing) == (kind, "/x", None)
    assert two(tmp_path, {"x": left}, {"x": left}).same


def test_the_order_of_keys_is_noted_and_is_no_difference(tmp_path: Path) -> None:
    found = two(tmp_path, {"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert found.same
    assert found.notes == ("l.pt: keys are in another order, first /a | /b",)
    assert two(tmp_path, {"a": 1, "b": 2, "c": 3}, {"a": 1, "c": 3}).notes == ()


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (["/args"], []),
        (["/args/save"], ["/args/load/a"]),
        (["*/save", "/args/load"], []),
        (["/arg"], ["/args/save", "/args/load/a"]),
    ],
)
def test_ignored_leaves_are_left_out_with_all_below(tmp_path: Path, ignore: list[str], left: list[str]) -> None:
    one, other = ({"args": {"save": value, "load": {"a": value}}, "x": 1} for value in (1, 2))
    assert [row.name for row in two(tmp_path, one, other, ignore=ignore).rows] == left


@pytest.mark.parametrize("pattern", ["/args/*/a", "/*/load/a", "/args/lo?d", "*d/a"])
def test_a_pattern_holds_in_the_middle_as_well(pattern: str, tmp_path: Path) -> None:
    one, other = ({"args": {"load": {"a": value}}} for value in (1, 2))
    found = two(tmp_path, one, other, ignore=[pattern])
    assert found.same
    assert not found.notes


def test_a_pattern_that_matches_nothing_is_said(tmp_path: Path) -> None:
    found = two(tmp_path, {"a": 1}, {"a": 1}, ignore=["/b", "/a", "/c/*"])
    assert found.notes == ("the ignored /b matches no leaf", "the ignored /c/* matches no leaf")
    assert "note: the ignored /b matches no leaf" in found.render()


@pytest.mark.parametrize(
    ("left", "right", "kind"), [("2", None, "left only"), (None, "2", "right only"), ("2", "release", "value")]
)
def test_the_tracker_is_compared_as_well(left: str | None, right: str | None, kind: str, tmp_path: Path) -> None:
    for side, tracker in (("l", left), ("r", right)):
        name = "release" if tracker == "release" else "iter_0000002"
        (tmp_path / side / name).mkdir(parents=True)
        save(tmp_path / side / name / "x.pt", {"a": 1})
        if tracker:
            (tmp_path / side / TRACKER).write_text(tracker)
    found = compare(tmp_path / "l", tmp_path / "r")
    assert [(row.file, row.kind, row.left, row.right) for row in found.rows] == [
        (TRACKER, kind, left or "", right or "")
    ]
    with pytest.raises(VerificationError, match=TRACKER):
        found.raise_differences()
    assert compare(tmp_path / "l", tmp_path / "l").same


# --------------------------------------------------------------------------------------------------------- checkpoints


def test_a_file_equals_itself_leaf_by_leaf(golden_set: Path) -> None:
    found = compare(golden_set / "A", golden_set / "A")
    assert found.same
    assert found.files == len(list((golden_set / "A").rglob("*.pt")))
    assert found.nbytes > 100_000
    assert found.equal > 100


def test_a_conversion_equals_megatrons_own_but_for_a_listed_few(golden_set: Path, tmp_path: Path) -> None:
    result = convert(golden_set, tmp_path)
    # _metadata is an attribute that no loader needs.
    found = compare(golden_set / "A", result.request.target, ignore=["*/@state"], ignore_padding=True)
    assert [row for row in found.rows if "numpy" not in row.left] == []


def test_the_reference_differs_in_the_samples_wherever_it_puts_the_files(golden: Path) -> None:
    folders = [path.parent for path in sorted((golden / "megatron06").glob("*/C_full"))]
    assert folders
    for folder in folders:
        found = compare(folder / "A", folder / "C_full", ignore=["*/@state"], ignore_padding=True)
        assert found.files == len(list((folder / "A").rglob("*.pt"))), "mp_rank_00 is mp_rank_00_000"
        assert {row.name for row in found.rows if "numpy" not in row.left} == {"/args/consumed_train_samples"}


@pytest.fixture(scope="module")
def finished(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return convert(golden / "megatron06" / "j_tp1pp2dp2", tmp_path_factory.mktemp("finished"), target_data=3)


@pytest.fixture
def pair(finished: Result, tmp_path: Path) -> tuple[Result, Result]:
    return finished, finished.copied(tmp_path / "out")


@pytest.mark.parametrize("correct_crc", [True, False], ids=["checksum-corrected", "checksum-wrong"])
def test_one_bit_between_two_results_is_seen(pair: tuple[Result, Result], correct_crc: bool) -> None:
    one, other = pair
    flip(other.optim, f"/0/{PAIR}/exp_avg/0", 99, correct_crc=correct_crc)
    (row,) = compare(one.request.target, other.request.target).rows
    assert (row.file, row.name) == ("mp_rank_00_000/distrib_optim.pt", f"/0/{PAIR}/exp_avg/0")
    assert (row.differing, row.index, row.numel) == (1, 99, 78_081)


def test_padding_may_be_left_out(pair: tuple[Result, Result]) -> None:
    one, other = pair
    set_element(other.optim, f"/0/{PAIR}/param/0", 78_080, struct.pack("<f", 1))
    (row,) = compare(one.optim, other.optim).rows
    assert (row.index, row.numel) == (78_080, 78_081)
    assert compare(one.optim, other.optim, ignore_padding=True).same
    flip(other.optim, f"/0/{PAIR}/param/0", 78_079)
    (row,) = compare(one.optim, other.optim, ignore_padding=True).rows
    assert (row.index, row.numel) == (78_079, 78_080)


def test_padding_alone_is_reported_as_such(pair: tuple[Result, Result]) -> None:
    one, other = pair
    set_element(other.optim, f"/0/{PAIR}/param/0", 78_080, struct.pack("<f", 1))
    with pytest.raises(VerificationError) as caught:
        compare(one.optim, other.optim).raise_differences()
    assert "and the padding of 1 of them with ignorePadding" in str(caught.value)
    flip(other.optim, f"/0/{PAIR}/param/0", 78_079)
    with pytest.raises(VerificationError) as caught:
        compare(one.optim, other.optim).raise_differences()
    assert "padding" not in caught.value.hint


def test_metadata_of_a_state_dict_may_be_on_one_side_but_not_two_unlike_ones(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    with_it, without, other = (module.state_dict() for _ in range(3))
    del without._metadata
    other._metadata[""]["version"] = 2
    for name, state in {"a": with_it, "b": without, "c": other}.items():
        torch.save({"model": state}, tmp_path / f"{name}.pt")
    for left, right, side in (("a", "b", "left"), ("b", "a", "right")):
        found = compare(tmp_path / f"{left}.pt", tmp_path / f"{right}.pt")
        assert found.same, found.render()
        assert found.notes == (f"{left}.pt: on the {side} only: _metadata of 1 state dicts, which no loader needs",)
    (row,) = compare(tmp_path / "a.pt", tmp_path / "c.pt").rows
    assert row.name == "/model/@state/_metadata/''/version"


def test_padding_of_another_length_may_be_left_out(pair: tuple[Result, Result], golden: Path, tmp_path: Path) -> None:
    one, _ = pair
    bare = convert(golden / "megatron06" / "j_tp1pp2dp2", tmp_path / "bare", target_data=1)
    kinds = {row.kind for row in compare(one.optim, bare.optim).rows}
    assert kinds == {"value", "type"}
    found = compare(one.optim, bare.optim, ignore_padding=True, ignore=["/per_bucket_numel"])
    assert found.same


def test_rows_of_a_folder_name_the_missing_files(pair: tuple[Result, Result]) -> None:
    one, other = pair
    shutil.rmtree(other.folder / "mp_rank_00_001")
    found = compare(one.folder, other.folder)
    assert [(row.file, row.kind) for row in found.rows] == [
        ("mp_rank_00_001/distrib_optim.pt", "left only"),
        ("mp_rank_00_001/model_optim_rng.pt", "left only"),
    ]


def test_the_two_containers_of_mindspore_are_compared_by_name(tmp_path: Path) -> None:
    tensors = [each for each in some_tensors() if each.data]
    (tmp_path / "x.ckpt").write_bytes(ckpt(tensors))
    (tmp_path / "x.safetensors").write_bytes(safe(tensors))
    found = compare(tmp_path / "x.ckpt", tmp_path / "x.safetensors")
    assert found.same
    assert found.equal == len(tensors)
    changed = [*tensors[1:], Tensor("t.bool", "bool", (2, 3), bytes(6)), Tensor("new", "int8", (1,), b"x")]
    (tmp_path / "y.ckpt").write_bytes(ckpt(changed))
    assert [(row.name, row.kind) for row in compare(tmp_path / "x.safetensors", tmp_path / "y.ckpt").rows] == [
        ("t.bool", "value"),
        ("new", "right only"),
    ]


def test_golden_sources_of_both_containers_agree(golden: Path) -> None:
    folder = golden / "megatron06"
    if not (folder / "b_tp2pp2").is_dir():
        pytest.skip("the committed subset has one of the two")
    found = compare(folder / "b_tp2pp2" / "ms", folder / "b_st_tp2pp2_safetensors" / "ms")
    assert found.same
    assert found.files == 4


def test_a_torch_archive_and_a_mindspore_file_do_not_compare(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(ckpt(some_tensors()))
    with pytest.raises(UsageError, match="one is a torch archive"):
        compare(save(tmp_path / "x.pt", {}), tmp_path / "x.ckpt")


def test_a_pickle_with_a_class_of_a_fork_needs_leave(pair: tuple[Result, Result]) -> None:
    from ckpt2pt.errors import UnsafePickleError
    from ckpt2pt.formats.torchfile.trees import Call, Global

    one, _ = pair
    edit_tree(pair[1].model, lambda tree: tree.update(x=Call(Global("fork.args", "Mode"), (1,))))
    with pytest.raises(UnsafePickleError):
        compare(one.model, pair[1].model)
    (row,) = compare(one.model, pair[1].model, allow=["fork.args.Mode"]).rows
    assert row.kind == "right only"


# -------------------------------------------------------------------------------------------------------- what is said


def test_the_error_the_table_and_the_document_say_the_same(tmp_path: Path) -> None:
    found = two(tmp_path, {"w": floats(1, 2), "n": 1, "same": 0}, {"w": floats(1, 2.5), "n": 2, "same": 0})
    with pytest.raises(VerificationError) as caught:
        found.raise_differences()
    assert caught.value.exit_code == 76
    assert "l.pt: /w: 1 of 2 elements differ, first at element 1" in caught.value.what
    assert "l.pt: /n: value: 1 | 2" in caught.value.what
    text = found.render().splitlines()
    assert text[0].split() == ["file", "name", "kind", "left", "right", "differing", "of", "max", "abs", "first"]
    assert text[-1] == "1 file, 2 leaves are equal, 2 differ; 16 B compared"
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert [row["name"] for row in document["differences"]] == ["/w", "/n"]
    assert document["differences"][0]["maxAbs"] == 0.5


def test_equal_checkpoints_raise_nothing(tmp_path: Path) -> None:
    found = two(tmp_path, {"w": floats(1)}, {"w": floats(1)})
    found.raise_differences()
    assert found.render() == "1 file, 2 leaves are equal, no difference; 8 B compared"


def test_an_error_names_only_the_first_few(tmp_path: Path) -> None:
    found = two(tmp_path, dict.fromkeys("abcdefgh", 1), dict.fromkeys("abcdefgh", 2))
    with pytest.raises(VerificationError, match="and 3 more"):
        found.raise_differences()


# --------------------------------------------------------------------------------------------------------- tied copies


def ref(path: Path, name: str, data: bytes, dtype: str = "float32") -> TensorRef:
    path.write_bytes(data)
    return TensorRef(name, dtype, (len(data) // 4,), (Extent(str(path), 0, len(data)),))


def test_tied_copies_that_are_equal_pass(tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(1 << 20)
    with Files() as files:
        same_bytes(ref(tmp_path / "a", "embedding", data), ref(tmp_path / "b", "head", data), files)


def test_tied_copies_that_differ_are_refused_with_both_names_and_the_element(tmp_path: Path) -> None:
    data = bytearray(1 << 20)
    kept = ref(tmp_path / "a", "embedding", bytes(data))
    data[800_002] = 0x80
    with Files() as files, pytest.raises(InputError) as caught:
        same_bytes(kept, ref(tmp_path / "b", "head", bytes(data)), files)
    for part in ("embedding float32[262144]", "head float32[262144]", "element 200000", "0 (0x00000000)", "0x00800000"):
        assert part in caught.value.what
    assert (caught.value.exit_code, caught.value.where) == (65, f"{tmp_path / 'a'} and {tmp_path / 'b'}")


def test_tied_copies_of_unlike_shape_are_refused(tmp_path: Path) -> None:
    with Files() as files, pytest.raises(InputError, match="differ in type or shape"):
        same_bytes(ref(tmp_path / "a", "embedding", bytes(8)), ref(tmp_path / "b", "head", bytes(12)), files)


def test_an_array_and_a_list_of_its_numbers_differ_in_one_row(tmp_path: Path) -> None:
    state = [("MT19937", numbers, 624, 0, 0.0) for numbers in (np.arange(624, dtype=np.uint32), [*range(624)])]
    for path, one in zip((tmp_path / "a.pt", tmp_path / "b.pt"), state, strict=True):
        torch.save({"rng_state": [{"np_rng_state": one}]}, path)
    for left, right in (("a.pt", "b.pt"), ("b.pt", "a.pt")):
        [row] = compare(tmp_path / left, tmp_path / right).rows
        assert row.name == "/rng_state/0/np_rng_state/1"
