"""Layouts end to end, each judged by torch: virtual stages, padded buckets, no-op layers, tied embeddings, uneven stages."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckpt2pt.errors import Ckpt2ptError, CoverageError, InputError, TopologyError
from ckptfiles import Tensor
from handmade import EMBEDDING, HEAD, PREFIX, Handmade
from layouts import LAYOUTS, topology


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_finds_every_value_where_megatron_looks_for_it(layout: str, tmp_path: Path) -> None:
    made = Handmade(**LAYOUTS[layout])
    outcome = made.convert(tmp_path)
    assert outcome.published
    made.check(outcome)


@pytest.mark.parametrize("data", [2, 3])
def test_the_layout_under_test_has_gaps_between_its_buckets(data: int) -> None:
    made = Handmade(topology=topology(pipeline=2, virtual=2), bucket_numel=50, data=data)
    buckets = made.buckets(0, 0)
    assert len(buckets) > 2
    assert any(after[0][1] > before[-1][2] for before, after in pairwise(buckets))
    assert len(made.buckets(1, 0)) == len(made.buckets(0, 1)) == 1


def test_safetensors_and_ckpt_of_one_model_give_the_same_files(tmp_path: Path) -> None:
    made = Handmade(topology=topology(pipeline=2), data=2)
    first = made.convert(tmp_path / "ckpt")
    made.write_source(tmp_path / "safe" / "ms", suffix="safetensors")
    # The template holds random state, so both conversions take one.
    (tmp_path / "safe" / "pt_meta").symlink_to(tmp_path / "ckpt" / "pt_meta")
    from ckpt2pt.run.conversion import run
    from conversions import Quiet

    second = run(made.request(tmp_path / "safe"), range(2), Quiet())
    for path in first.target.folder.rglob("*.pt"):
        assert path.read_bytes() == (second.target.folder / path.relative_to(first.target.folder)).read_bytes()


def test_megatron_names_have_a_gap_where_a_noop_layer_keeps_its_slot(tmp_path: Path) -> None:
    made = Handmade(topology=topology(noop=frozenset({1})))
    tree = torch.load(made.convert(tmp_path).target.folder / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    slots = {name.split(".")[1] for name in tree["model"]["language_model"]["encoder"] if name.startswith("layers.")}
    assert slots == {"0", "2", "3"}


def test_a_chunk_of_noop_layers_has_an_empty_encoder_and_no_optimizer_buffer(tmp_path: Path) -> None:
    made = Handmade(topology=topology(num_layers=6, pipeline=2, virtual=3, noop=frozenset({2})))
    folder = made.convert(tmp_path).target.folder / "mp_rank_00_000"
    tree = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    assert tree["model1"] == {"language_model": {"encoder": {}}}
    assert sorted(p.name for p in (tmp_path / "pt_meta").glob("*pp0vpp*")) == [
        "param_map_buffer0_dp0tp0pp0vpp0.json",
        "param_map_buffer0_dp0tp0pp0vpp1.json",
    ]
    # Buffer 1 is chunk 2's: the numbers move up.
    optimizer = torch.load(folder / "distrib_optim.pt", weights_only=False)
    assert [number for number in optimizer if isinstance(number, int)] == [0, 1]


@pytest.mark.parametrize("full", [True, False])
def test_full_verification_accepts_each_layout(full: bool, tmp_path: Path) -> None:
    made = Handmade(topology=topology(num_layers=12, pipeline=2, virtual=3, noop=frozenset({4, 5, 8})), data=2)
    assert made.convert(tmp_path, full=full).published


# ---------------------------------------------------------------------------------------------------- tied embeddings


def tied(pipeline: int) -> Handmade:
    return Handmade(topology=topology(pipeline=pipeline), tied=True, data=2)


def respell(made: Handmade, rank: tuple[int, int], old: str, new: str | None) -> None:
    """Rename a parameter and its moments in a source file, or take them out."""
    for prefix in PREFIX.values():
        each = made.entries[rank].pop(prefix + old)
        if new:
            made.entries[rank][prefix + new] = replace(each, name=prefix + new)


@pytest.mark.parametrize(
    "spelling", [HEAD, "word_embeddings.weight", "word_embeddings_for_head.weight", EMBEDDING], ids=str
)
def test_the_last_stages_own_copy_is_taken_whatever_it_is_called(spelling: str, tmp_path: Path) -> None:
    made = tied(2)
    respell(made, (0, 1), HEAD, spelling)
    made.check(made.convert(tmp_path))


@pytest.mark.parametrize("prefixes", [("exp_avg.", "exp_avg_sq."), ("adam_m.", "adam_v."), ("moment1.", "moment2.")])
def test_a_last_stage_without_a_copy_takes_the_first_stages(prefixes: tuple[str, str], tmp_path: Path) -> None:
    made = tied(2)
    respell(made, (0, 1), HEAD, None)
    for old, new in zip(("exp_avg.", "exp_avg_sq."), prefixes, strict=True):
        for entries in made.entries.values():
            for name in [name for name in entries if name.startswith(old)]:
                each = entries.pop(name)
                entries[new + name.removeprefix(old)] = replace(each, name=new + name.removeprefix(old))
    for role in PREFIX:
        made.truth[0, 1, role, "0:word_embeddings.weight"] = made.truth[0, 0, role, f"0:{EMBEDDING}"]
    made.check(made.convert(tmp_path))


def test_the_copy_is_written_where_megatron_looks_for_it(tmp_path: Path) -> None:
    made = tied(2)
    folder = made.convert(tmp_path).target.folder
    last = torch.load(folder / "mp_rank_00_001" / "model_optim_rng.pt", weights_only=False)["model"]
    assert list(last) == ["language_model", "word_embeddings_for_head"]
    assert list(last["word_embeddings_for_head"]) == ["weight"]
    # A module's own state dict, as Megatron-LM cac60ce4 saves it (megatron/model/gpt_model.py).
    assert type(last["word_embeddings_for_head"]) is OrderedDict
    first = torch.load(folder / "mp_rank_00_000" / "model_optim_rng.pt", weights_only=False)["model"]
    assert list(first) == ["language_model"]


def add_output_layer(made: Handmade, *, different: str = "") -> None:
    for role, prefix in PREFIX.items():
        data = bytearray(made.entries[0, 0][prefix + EMBEDDING].data)
        if role == different:
            data[-1] ^= 1
        made.entries[0, 0][prefix + HEAD] = Tensor(prefix + HEAD, "float32", (made.vocab, made.hidden), bytes(data))


def test_an_equal_copy_in_the_output_layer_of_one_stage_is_compared_and_left_out(tmp_path: Path) -> None:
    made = tied(1)
    add_output_layer(made)
    outcome = made.convert(tmp_path)
    made.check(outcome)


@pytest.mark.parametrize("role", list(PREFIX))
def test_a_different_copy_in_the_output_layer_of_one_stage_is_refused(role: str, tmp_path: Path) -> None:
    made = tied(1)
    add_output_layer(made, different=role)
    with pytest.raises(InputError, match="output_layer"):
        made.convert(tmp_path)
    assert not list((tmp_path / "out").rglob("*.pt"))


def test_params_only_does_not_compare_moments_it_does_not_carry(tmp_path: Path) -> None:
    made = tied(1)
    add_output_layer(made, different="exp_avg")
    assert made.convert(tmp_path, full=False).published


def test_an_output_layer_that_is_not_tied_is_no_copy(tmp_path: Path) -> None:
    made = Handmade(topology=topology())
    made.check(made.convert(tmp_path))


# ------------------------------------------------------------------------------------------------------------- refused

FIRST_NORM = "language_model.encoder.layers.0.input_norm.weight"


def change(made: Handmade, name: str, **more: Any) -> None:
    made.entries[0, 0][name] = replace(made.entries[0, 0][name], **more)


def remove(made: Handmade, name: str) -> None:
    del made.entries[0, 0][name]


def add(made: Handmade, name: str) -> None:
    made.entries[0, 0][name] = Tensor(name, "float32", (5,), bytes(20))


REFUSED: dict[str, tuple[Any, type[Ckpt2ptError], str]] = {
    "missing-param": (lambda m: remove(m, FIRST_NORM), CoverageError, f"{FIRST_NORM} is missing"),
    "missing-moment": (
        lambda m: remove(m, f"exp_avg_sq.{FIRST_NORM}"),
        CoverageError,
        f"exp_avg_sq.{FIRST_NORM} is missing",
    ),
    "extra-param": (lambda m: add(m, "language_model.pooler.weight"), CoverageError, "pooler.weight has no place"),
    "extra-layer": (
        lambda m: add(m, "language_model.encoder.layers.4.input_norm.weight"),
        CoverageError,
        "layers.4.input_norm.weight has no place",
    ),
    "extra-moment": (lambda m: add(m, "exp_avg.unknown"), CoverageError, "exp_avg.unknown has no place"),
    "two-spellings": (
        lambda m: add(m, "language_model.encoder.layers.0.input_norm.gamma"),
        CoverageError,
        "input_norm.gamma has no place",
    ),
    "pipeline-suffix-twice": (
        lambda m: add(m, "language_model.encoder.layers.0_pp0_id1.input_norm.weight"),
        CoverageError,
        "are the same param",
    ),
    "wrong-shape": (
        lambda m: change(m, FIRST_NORM, shape=(1, 5)),
        TopologyError,
        r"has shape \[1, 5\], the target needs \[5\]",
    ),
    "wrong-shape-of-a-moment": (
        lambda m: change(m, f"exp_avg.{FIRST_NORM}", shape=(4,), data=bytes(16)),
        TopologyError,
        r"exp_avg.* has shape \[4\]",
    ),
    "int8": (lambda m: change(m, FIRST_NORM, dtype="int8", data=bytes(5)), InputError, "is of type int8"),
    "float64": (lambda m: change(m, FIRST_NORM, dtype="float64", data=bytes(40)), InputError, "is of type float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_does_not_fit_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    damage, error, message = REFUSED[case]
    made = Handmade(topology=topology())
    damage(made)
    with pytest.raises(error, match=message) as caught:
        made.convert(tmp_path)
    assert "rank_0" in caught.value.where
    assert caught.value.exit_code == 65
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["buffer_0_bucket_0", "exp_avg.buffer_0_bucket_0"])
def test_a_stage_of_shards_beside_one_of_parameters_is_refused(name: str, tmp_path: Path) -> None:
    made = Handmade(topology=topology(pipeline=2))
    made.entries[0, 1][name] = Tensor(name, "float32", (5,), bytes(20))
    with pytest.raises(InputError, match="1 data-parallel shards") as caught:
        made.convert(tmp_path)
    assert "rank_1" in caught.value.where
    assert not (tmp_path / "out").exists()


def test_a_missing_parameter_names_the_nearest_there_is(tmp_path: Path) -> None:
    made = Handmade(topology=topology())
    each = made.entries[0, 0].pop(FIRST_NORM)
    near = FIRST_NORM.replace("input_norm", "input_normm")
    made.entries[0, 0][near] = replace(each, name=near)
    with pytest.raises(CoverageError, match=f"nearest is {near}"):
        made.convert(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_source_of_half_precision_fills_both_files(dtype: str, tmp_path: Path) -> None:
    made = Handmade(topology=topology(), data=2)
    for key, values in made.truth.items():
        half = torch.from_numpy(values).to(getattr(torch, dtype))
        made.truth[key] = half.float().numpy()
        _, _, role, name = key
        each = next(p for p in made.parameters(0, 0) if f"0:{p.megatron}" == name)
        entry = PREFIX[role] + each.mindspore
        made.entries[0, 0][entry] = Tensor(entry, dtype, each.shape, half.view(torch.int16).numpy().tobytes())
    made.check(made.convert(tmp_path))


def test_a_source_in_any_order_with_sliced_tensors_gives_the_same_values(tmp_path: Path) -> None:
    made = Handmade(topology=topology(pipeline=2))
    request = made.write(tmp_path)
    from ckpt2pt.run.conversion import run
    from ckptfiles import chunk, entry, tensor, value
    from conversions import Quiet

    rng = np.random.default_rng(1)
    for path in (tmp_path / "ms").rglob("*.ckpt"):
        entries = made.entries[0, int(path.parent.name[5:])]
        data = b""
        for name in rng.permutation(sorted(entries)):
            each = entries[name]
            if not each.shape:
                data += entry(each.name, "Int64", each.shape, each.data)
                continue
            for start in range(0, len(each.data), 7):  # inside an element more often than not
                data += value(each.name, chunk(2, tensor("Float32", each.shape, each.data[start : start + 7])))
        path.write_bytes(data)
    made.check(run(request, range(2), Quiet()))


def test_target_data_parallel_pads_for_the_run_to_come(tmp_path: Path) -> None:
    made = Handmade(topology=topology(), data=1)
    request = made.write(tmp_path, target_data=8)
    from ckpt2pt.run.conversion import run
    from conversions import Quiet

    outcome = run(request, range(1), Quiet())
    made.data = 8
    made.check(outcome)
