"""verify A B across formats and layouts: what is equal is found equal, and one bit is found by its tensor's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.names import Rules
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.registry import read
from ckpt2pt.library.commands import convert
from ckpt2pt.verification.across import compare_across, differ_in_layout, read_both
from cutting import HEAD, MOMENTS, core_name, model, write_mindspore
from results import flip

SET = "b_tp2pp2"
QKV = "attention.qkv_proj.weight"


@pytest.fixture
def pair(golden: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A golden set in both frameworks, to be damaged."""
    for name in ("ms", "A"):
        shutil.copytree(golden / "megatron06" / SET / name, tmp_path / name)
    return tmp_path / "ms", tmp_path / "A"


def verify(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    code = main(["verify", *map(str, words), "--output", "json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else {}, err


def flip_source(file: Path, entry: str, index: int = 0) -> None:
    """Turn the lowest bit of an element of a MindSpore file."""
    extent = index_file(file)[entry].extents[0]
    raw = bytearray(file.read_bytes())
    raw[extent.offset + 4 * index] ^= 1
    file.write_bytes(raw)


# --------------------------------------------------------------------------------------------------------------- equal


def test_two_trainings_with_a_pt_meta_inside_are_compared_by_their_own_files(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("one", "other"):
        shutil.copytree(golden / "megatron06" / SET / "ms", tmp_path / side)
        shutil.copytree(golden / "megatron06" / SET / "pt_meta", tmp_path / side / "pt_meta")
        shutil.copytree(golden / "megatron06" / SET / "pt_meta", tmp_path / side / "a_template")
    code, found, _ = verify(capsys, tmp_path / "one", tmp_path / "other")
    assert (code, found["differences"]) == (0, [])
    flip_source(next((tmp_path / "other" / "rank_0").glob("*.ckpt")), f"language_model.encoder.layers.0.{QKV}")
    code, found, _ = verify(capsys, tmp_path / "one", tmp_path / "other")
    assert (code, len(found["differences"])) == (76, 1)


def test_both_frameworks_hold_the_same_in_every_golden_set(
    golden_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found, _ = verify(capsys, golden_set / "ms", golden_set / "A")
    assert (code, found["equal"], found["differences"], found["notes"]) == (0, True, [], [])
    tensors = read(golden_set / "A").index.values()
    replicas = [len(tensor.replicas) for tensor in tensors] + [
        len(tensor.replicas) for tensor in read(golden_set / "ms").index.values()
    ]
    assert found["equalLeaves"] == len(tensors) + sum(replicas)
    assert {tensor.key.role for tensor in tensors} == {"param", "main_param", "exp_avg", "exp_avg_sq"}


def test_shards_are_equal_to_whole_files_and_to_megatrons(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = golden / "megatron06" / "j_tp1pp2dp2"
    for other in ("A", "ms", "ms_zero_merged", "ms_zero_merged_st"):
        for paths in ((folder / "ms_zero_src", folder / other), (folder / other, folder / "ms_zero_src")):
            code, found, _ = verify(capsys, *paths)
            assert (code, found["equalLeaves"]) == (0, 108 if other == "A" else 81)


def test_virtual_stages_alone_are_another_layout(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = golden / "megatron06" / SET / "A"
    convert(source=source, target=tmp_path / "new", target_vpp=2)
    code, found, _ = verify(capsys, source, tmp_path / "new")
    assert (code, found["differences"]) == (0, [])
    assert found["equalLeaves"] > 50


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_any_two_layouts_of_mindspore_are_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gated: bool, bias: bool
) -> None:
    arrays = model(gated=gated, bias=bias)
    one = write_mindspore(tmp_path / "one", arrays, gated=gated, tp=2, pp=2)
    layouts: list[dict[str, Any]] = [
        {"tp": 1},
        {"tp": 4, "suffix": "safetensors"},
        {"tp": 8, "pp": 4},
        {"tp": 4, "v2": True},
    ]
    for number, layout in enumerate(layouts):
        other = write_mindspore(tmp_path / str(number), arrays, gated=gated, **layout)
        code, found, err = verify(capsys, one, other)
        assert (code, err) == (0, ""), layout
        assert found["bytesCompared"] > 2 * sum(array.nbytes for array in arrays.values())


def test_a_layout_that_differs_in_values_alone_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns of a row-parallel weight that changed places: the same numbers in the same files."""
    arrays = model()
    name = "language_model.encoder.layers.3.mlp.projection.weight"
    one = write_mindspore(tmp_path / "one", arrays, tp=2)
    other = write_mindspore(tmp_path / "other", arrays | {name: np.roll(arrays[name], 1, axis=1)}, tp=4)
    code, found, _ = verify(capsys, one, other)
    assert code == 76
    assert [row["name"] for row in found["differences"]] == [f"param/{core_name(name)}"]


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("rank", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("moment", ["", *MOMENTS])
def test_one_bit_of_a_mindspore_file_is_found(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], rank: tuple[int, int], moment: str
) -> None:
    file = pair[0] / f"rank_{2 * rank[1] + rank[0]}" / "network.ckpt"
    entry = next(name for name in index_file(file) if name.startswith(moment + "language") and name.endswith(QKV))
    flip_source(file, entry, 5)
    code, found, err = verify(capsys, *pair)
    assert code == 76
    role = moment.rstrip(".") or "main_param"
    name = f"{role}/{core_name(entry.removeprefix(moment))}"
    # The lowest bit of a float32 is not in a bfloat16, unless it tips the rounding.
    assert [row["name"] for row in found["differences"]] == [name]
    (row,) = found["differences"]
    assert (row["differing"], row["kind"]) == (1, "value")
    assert row["file"] == f"rank_{2 * rank[1] + rank[0]}/network.ckpt | mp_rank_0{rank[0]}_00{rank[1]}/distrib_optim.pt"
    assert f"{name}: 1 of " in err
    assert err.startswith("ckpt2pt: 1 leaves differ")


@pytest.mark.parametrize("kind", ["param", "exp_avg", "exp_avg_sq"])
def test_one_bit_of_a_bucket_is_found(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], kind: str) -> None:
    optim = next(pair[1].glob("iter_*/mp_rank_01_001")) / "distrib_optim.pt"
    flip(optim, f"/0/(torch.bfloat16, torch.float32)/{kind}/0", 3)
    code, found, _ = verify(capsys, *pair)
    role = "main_param" if kind == "param" else kind
    assert code == 76
    assert [row["name"].split("/")[0] for row in found["differences"]] == [role]


def test_one_bit_of_a_weight_is_found(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    file = next(pair[1].glob("iter_*/mp_rank_01_000")) / "model_optim_rng.pt"
    flip(file, "/model/language_model/encoder/layers.0.mlp.dense_h_to_4h.weight", 40)
    # Megatron's own copies of the weight tell as well: the layout of the buckets is proved by them.
    code, _, err = verify(capsys, *pair)
    assert code in {65, 76}
    assert "mlp" in err


def test_a_norm_that_differs_on_the_second_rank_is_found(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = pair[0] / "rank_1" / "network.ckpt"
    flip_source(file, "language_model.encoder.layers.0.input_norm.weight", 7)
    code, found, err = verify(capsys, *pair)
    assert code == 76
    (row,) = found["differences"]
    assert (row["name"], row["file"]) == (
        "copy of param/decoder.layers.0.input_layernorm.weight",
        "left, rank_1/network.ckpt",
    )
    assert (row["index"], row["numel"]) == (7, 64)
    assert "copy of param/decoder.layers.0.input_layernorm.weight" in err


def test_a_tied_copy_that_differs_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = model()
    embedding = "language_model.embedding.word_embeddings.weight"
    tied = arrays | {prefix + HEAD: arrays[prefix + embedding] for prefix in ("", *MOMENTS)}
    one = write_mindspore(tmp_path / "pp2", tied, tp=2, pp=2)
    alone = {name: array for name, array in tied.items() if HEAD not in name}
    other = write_mindspore(tmp_path / "pp1", alone, tp=2)
    assert verify(capsys, one, other)[0] == 0
    flip_source(one / "rank_3" / "network_rank_3-0_12.ckpt", f"exp_avg.{HEAD}", 2)
    code, found, _ = verify(capsys, one, other)
    assert code == 76
    assert [row["name"] for row in found["differences"]] == ["exp_avg/output_layer.weight"]


def test_a_missing_rank_is_missing_input(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(pair[0] / "rank_3")
    code, found, err = verify(capsys, *pair)
    assert (code, found) == (66, {})
    assert "rank_3" in err


@pytest.mark.parametrize("sizes", [("--tp-size", 1), ("--pp-size", 4), ("--tp-size", 4, "--pp-size", 1)])
def test_wrong_parallel_sizes_are_reported(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], sizes: tuple[object, ...]
) -> None:
    code, _, err = verify(capsys, *pair, *sizes)
    assert code == 65
    assert "parallel size" in err


def test_mixed_iterations_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_mindspore(tmp_path / "one", model(), tp=2)
    other = write_mindspore(tmp_path / "other", model(), tp=4, iteration=13)
    code, found, err = verify(capsys, one, other)
    assert code == 76
    assert [(row["name"], row["left"], row["right"]) for row in found["differences"]] == [("iteration", "12", "13")]
    assert "iteration: value: 12 | 13" in err


def test_an_optimizer_on_one_side_is_a_difference_for_each_role(
    golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = golden / "megatron06" / "b_tp2pp2"
    code, found, err = verify(capsys, folder / "C_params", folder / "ms")
    rows = {row["name"]: (row["kind"], row["right"]) for row in found["differences"]}
    assert code == 76
    assert rows == {f"{role}/*": ("right only", "27 tensors") for role in ("exp_avg", "exp_avg_sq")}
    assert "exp_avg/*: right only" in err
    assert verify(capsys, folder / "C_params", folder / "ms", "--ignore", "exp_avg*")[0] == 0
    assert verify(capsys, folder / "ms_params", folder / "C_params")[0] == 0


# ---------------------------------------------------------------------------------------------------- padding, ignoring


def padded(arrays: dict[str, Any], rows: int) -> dict[str, Any]:
    return {
        name: np.concatenate([array, np.zeros((rows, array.shape[1]), array.dtype)])
        if "word_embeddings" in name or "output_layer" in name
        else array
        for name, array in arrays.items()
    }


def test_a_vocabulary_of_another_size_is_a_difference_unless_its_padding_is_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_mindspore(tmp_path / "one", padded(model(), 8), tp=4)
    other = write_mindspore(tmp_path / "other", padded(model(), 16), tp=8)
    code, found, err = verify(capsys, one, other)
    assert code == 76
    assert len(found["differences"]) == 6
    assert {row["kind"] for row in found["differences"]} == {"type"}
    assert "param/embedding.word_embeddings.weight float32[24, 6]" in err or "float32[24, 6]" in err
    assert "the padding of 6 of them with --ignore-padding" in err
    code, found, _ = verify(capsys, one, other, "--ignore-padding")
    assert code == 0
    assert "param/output_layer.weight: rows from 24 on are on one side only" in "\n".join(found["notes"])


def test_a_difference_in_the_rows_of_both_is_found_with_padding_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_mindspore(tmp_path / "one", padded(model(), 8), tp=4)
    changed = model()
    changed[HEAD][15, 5] += 1
    other = write_mindspore(tmp_path / "other", padded(changed, 16), tp=8)
    code, found, _ = verify(capsys, one, other, "--ignore-padding")
    assert code == 76
    assert [(row["name"], row["index"]) for row in found["differences"]] == [("param/output_layer.weight", 15 * 6 + 5)]


def test_what_is_ignored_is_left_out_and_what_matches_nothing_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = model()
    changed = {name: array + ("layers.2." in name) for name, array in arrays.items()}
    one = write_mindspore(tmp_path / "one", arrays, tp=2)
    other = write_mindspore(tmp_path / "other", changed, tp=4)
    code, found, _ = verify(capsys, one, other)
    assert (code, len(found["differences"])) == (76, 18)
    code, found, _ = verify(capsys, one, other, "--ignore", "*/decoder.layers.2.*", "--ignore", "param/none")
    assert (code, found["notes"]) == (0, ["the ignored param/none matches no tensor"])


# ------------------------------------------------------------------------------------------------------ details


def test_a_float32_weight_is_rounded_to_the_other_sides_type(golden: Path) -> None:
    folder = golden / "megatron06" / "f_tp1pp1dp2_buckets"
    found = compare_across(read(folder / "ms_params"), read(folder / "A"), ignore=["main_param/*", "exp_avg*"])
    assert (found.same, found.equal) == (True, 27)


def test_a_module_of_a_rule_file_is_compared_rank_by_rank(tmp_path: Path) -> None:
    arrays = model(moments=False)
    arrays["language_model.encoder.layers.0.attention.gate.weight"] = np.arange(24, dtype="<f4").reshape(4, 6)
    rules = Rules(layer_modules={"self_attention.gate": "attention.gate"})
    one, other = (write_mindspore(tmp_path / str(tp), arrays, tp=tp) for tp in (2, 4))
    same = compare_across(*read_both(one, one, tensor=None, pipeline=None, rules=rules))
    assert same.same
    found = compare_across(*read_both(one, other, tensor=None, pipeline=None, rules=rules))
    # Nobody knows along which axis it is cut, so another layout of it is another shape.
    assert [(row.name, row.kind) for row in found.rows] == [
        ("param/decoder.layers.0.self_attention.gate.weight", "type")
    ]


def test_folders_of_one_layout_are_compared_file_by_file(golden: Path, tmp_path: Path) -> None:
    folder = golden / "megatron06" / "b_tp2pp2"
    assert not differ_in_layout(folder / "A", folder / "C_full", asked=False)
    assert not differ_in_layout(folder / "ms", folder / "ms_params", asked=False)
    assert differ_in_layout(folder / "ms", folder / "ms_params", asked=True)
    assert differ_in_layout(folder / "A", golden / "megatron06" / "f_tp1pp1dp2_buckets" / "A", asked=False)
    assert differ_in_layout(folder / "ms", golden / "megatron06" / "f_tp1pp1dp2_buckets" / "ms", asked=False)
    assert not differ_in_layout(next(folder.glob("ms/rank_0/*")), next(folder.glob("ms/rank_1/*")), asked=True)
    one = golden / "megatron06" / "f_tp1pp1dp2_buckets"
    assert list(one.glob("C_full/iter_*/mp_rank_00_000/*.pt"))
    assert not differ_in_layout(one / "A", one / "C_full", asked=False), "the reference's suffix is no other layout"


def test_a_checkpoint_beside_something_else_is_reported_what_is_read(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = golden / "megatron06" / "b_tp2pp2"
    for other in (folder / "pt_meta", tmp_path):
        for paths in ((folder / "ms", other), (other, folder / "A")):
            code, found, err = verify(capsys, *paths)
            assert (code, found) == (65, {})
            assert "neither a MindSpore training output" in err
            assert str(other) in err
    assert verify(capsys, folder / "pt_meta", folder / "pt_meta")[0] == 0
    code, _, err = verify(capsys, folder / "ms" / "rank_0" / "network.ckpt", folder / "A")
    assert code == 64
    assert "one is a folder, the other a file" in err


def test_the_table_names_tensors_and_files(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    flip_source(
        pair[0] / "rank_2" / "network.ckpt", "exp_avg.language_model.encoder.layers.3.attention.qkv_proj.weight"
    )
    assert main(["verify", *map(str, pair)]) == 76
    out = capsys.readouterr().out
    assert "exp_avg/decoder.layers.3.self_attention.linear_qkv.weight" in out
    assert "1 differ" in out.splitlines()[-1]
