"""Metadata of one layout made of that of another: as the golden runs and the handmade ones have it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.errors import Ckpt2ptError, FormatError, UsageError, ref
from ckpt2pt.formats.ptmeta.make import from_pt_meta
from ckpt2pt.formats.ptmeta.relayout import NewLayout, PtMeta, relayout
from goldens import golden_sets
from torchload import leaves, same

SETS = {folder.name: folder for folder in golden_sets()}
B = SETS["b_tp2pp2"] / "pt_meta"


@pytest.mark.parametrize("name", SETS)
def test_the_same_layout_gives_the_same_maps_and_groups(name: str, tmp_path: Path) -> None:
    old = SETS[name] / "pt_meta"
    bucket = 22592 if "buckets" in name else None
    from_pt_meta(old, tmp_path / "m", NewLayout(bucket_size=bucket), overwrite=False)
    for path in old.glob("*_dp0*.json"):
        assert (tmp_path / "m" / path.name).read_bytes() == path.read_bytes()
    for path in old.glob("args_*.pt"):
        one, other = leaves(path), leaves(tmp_path / "m" / path.name)
        differing = {
            key for key in {**one, **other} if key not in one or key not in other or not same(one[key], other[key])
        }
        assert {key for key in differing if not key.startswith("/rng_state/")} == set()


def arguments(folder: Path, tp: int = 0, pp: int = 0) -> dict[str, Any]:
    found = leaves(folder / f"args_tp{tp:02d}_pp{pp:03d}.pt")
    return {key.removeprefix("/args/"): value for key, value in found.items() if key.startswith("/args/")}


def test_arguments_follow_the_layout(tmp_path: Path) -> None:
    from_pt_meta(B, tmp_path / "m", NewLayout(tensor=4, pipeline=1, virtual=2, data=3), overwrite=False)
    found = arguments(tmp_path / "m", tp=3)
    assert {
        name: found[name]
        for name in (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
            "num_layers_per_virtual_pipeline_stage", "data_parallel_size", "world_size", "rank",
        )
    } == {
        "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 2, "data_parallel_size": 3, "world_size": 12, "rank": 3,
    }  # fmt: skip


def test_groups_come_in_the_order_of_a_stage_s_parameters(tmp_path: Path) -> None:
    """Megatron begins with the group of the first parameter: with weight decay where there is an embedding."""
    from_pt_meta(B, tmp_path / "m", NewLayout(tensor=1, pipeline=4), overwrite=False)
    first = [
        leaves(tmp_path / "m" / f"args_tp00_pp{pp:03d}.pt")["/optimizer/optimizer/param_groups/0/wd_mult"]
        for pp in range(4)
    ]
    assert first == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("new", "rows"),
    [
        (NewLayout(tensor=1, pipeline=1), 256),
        (NewLayout(tensor=1, pipeline=1, tokens=241), 248),
        (NewLayout(tensor=4, pipeline=1, tokens=200), 224),
    ],
)
def test_the_vocabulary_is_padded_for_the_new_tensor_parallel_size(new: NewLayout, rows: int, tmp_path: Path) -> None:
    from_pt_meta(B, tmp_path / "m", new, overwrite=False)
    found = arguments(tmp_path / "m")
    assert found["padded_vocab_size"] == rows
    assert found["vocab_size"] == (new.tokens or 255)
    document = json.loads((tmp_path / "m" / "param_map_buffer0_dp0tp0pp0vpp0.json").read_text())
    (shape,) = (shape for name, (_, shape, *_) in document.items() if "word_embeddings" in name)
    assert shape[0] * (new.tensor or 2) == rows


def test_what_was_assumed_is_reported_and_recorded(tmp_path: Path) -> None:
    made = from_pt_meta(B, tmp_path / "m", NewLayout(tensor=1), overwrite=False)
    assert "255 tokens in 256 rows" in made.sentence()
    assert set(json.loads((tmp_path / "m" / "origin.json").read_text())["assumed"]) == set(made.assumed)
    assert set(made.assumed) == {"vocabulary", "parameter order", "rng_state"}


@pytest.mark.parametrize(
    ("new", "what"),
    [
        (NewLayout(pipeline=3), "4 layers do not divide into 3 stages"),
        (NewLayout(tokens=300), "vocabSize is 300, and the embedding has 256 rows"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(new: NewLayout, what: str) -> None:
    with pytest.raises(Ckpt2ptError, match=what):
        relayout(PtMeta(B), new)


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no pt_meta"):
        relayout(PtMeta(tmp_path), NewLayout(tensor=2))


def test_uneven_stages_are_given(tmp_path: Path) -> None:
    new = NewLayout(tensor=1, pipeline=2, layers_per_stage=(3, 1))
    from_pt_meta(B, tmp_path / "m", new, overwrite=False)
    for pp, layers in enumerate((3, 1)):
        names = json.loads((tmp_path / "m" / f"param_map_buffer0_dp0tp0pp{pp}vpp0.json").read_text())
        assert {name.split("layers.")[1].split(".")[0] for name in names if "layers." in name} == set(
            map(str, range(layers))
        )


def test_uneven_stages_and_their_layers_are_learnt_from_the_maps(tmp_path: Path) -> None:
    new = NewLayout(tensor=1, pipeline=2, layers_per_stage=(3, 1))
    from_pt_meta(B, tmp_path / "uneven", new, overwrite=False)
    from_pt_meta(tmp_path / "uneven", tmp_path / "even", NewLayout(tensor=2), overwrite=False)
    for path in B.glob("*_dp0*.json"):
        assert (tmp_path / "even" / path.name).read_bytes() == path.read_bytes()


def test_maps_of_a_changed_megatron_are_not_taken_for_those_of_another() -> None:
    old = SETS["f_tp1pp1dp2_buckets"] / "pt_meta"
    with pytest.raises(FormatError, match="the param maps of stage 0 are not those") as caught:
        relayout(PtMeta(old), NewLayout(tensor=2))
    assert ref("bucketSize") in caught.value.hint
    assert relayout(PtMeta(old), NewLayout(tensor=2, bucket_size=22592)).layout.tensor == 2


def test_a_model_with_an_order_of_its_own_is_refused(tmp_path: Path) -> None:
    shutil.copytree(B, tmp_path / "m")
    path = tmp_path / "m" / "param_map_buffer0_dp0tp0pp1vpp0.json"
    path.write_text(path.read_text().replace("input_norm", "pre_norm"))
    with pytest.raises(FormatError, match="the param maps of stage 1 are not those"):
        relayout(PtMeta(tmp_path / "m"), NewLayout(tensor=1))
