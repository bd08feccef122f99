"""pt_meta from a description: it differs from Megatron's own in nothing but what is listed as assumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.errors import InputError, TopologyError
from ckpt2pt.formats.ptmeta.describe import describe
from ckpt2pt.formats.ptmeta.files import render
from ckpt2pt.formats.ptmeta.synthesize import Synthesized, synthesize
from ckpt2pt.verification.compare import compare
from descriptions import wanted_for, write_description
from goldens import golden_sets

SETS = golden_sets()
# The random state and the operations so far of a run that there never was.
ASSUMED = ("*/rng_state/*", "*/num_floating_point_operations_so_far")


def made(folder: Path, tmp_path: Path, **more: Any) -> Synthesized:
    said = describe(write_description(folder, tmp_path / "run.yaml"))
    said = replace(said, given={**said.given, **more})
    return synthesize(said, wanted_for(folder))


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_only_what_is_assumed_differs(folder: Path, tmp_path: Path) -> None:
    found = made(folder, tmp_path)
    for name, content in render(found.ranks, with_maps=True).items():
        if name.endswith(".json"):
            assert content == (folder / "pt_meta" / name).read_bytes()
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / name).write_bytes(content)
    compare(tmp_path / "made", folder / "pt_meta", ignore=ASSUMED).raise_differences()
    assert {"rng_state", "num_floating_point_operations_so_far", "parameter order"} <= set(found.assumed)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"ffn_hidden_size": 128}, "does not fit the checkpoint.*shape"),
        ({"add_bias_linear": True}, "does not fit the checkpoint.*missing"),
        ({"untie_embeddings_and_output_weights": False}, "does not fit the checkpoint|holds"),
        ({"num_layers": 3}, "has no place in the target"),
        ({"normalization": "LayerNorm"}, "does not fit the checkpoint.*missing"),
        ({"vocab_size": 1000}, "does not fit the checkpoint: vocab_size is 1000, the embedding has 256 rows on 1 "),
    ],
)
def test_a_description_that_does_not_fit_is_refused(more: dict[str, Any], what: str, tmp_path: Path) -> None:
    folder = next(folder for folder in SETS if folder.name == "f_tp1pp1dp2_buckets")
    if "untie_embeddings_and_output_weights" in more:
        # A tied model may bring a copy of its embedding; then it is the values that decide, when it is converted.
        assert made(folder, tmp_path, **more).ranks[0].buffers != made(folder, tmp_path).ranks[0].buffers
        return
    with pytest.raises((InputError, TopologyError), match=what):
        made(folder, tmp_path, **more)


def test_defaults_and_rules_are_distinguished(tmp_path: Path) -> None:
    found = made(SETS[0], tmp_path)
    defaults, derived = found.assumed["args at their default"], found.assumed["args worked out"]
    assert isinstance(defaults, dict)
    assert isinstance(derived, dict)
    assert "adam_beta1" in defaults
    assert {"world_size", "padded_vocab_size"} <= set(derived)
    assert not set(defaults) & set(derived)


def test_shards_of_the_distributed_optimizer_are_a_source_as_well(tmp_path: Path) -> None:
    folder = next(folder for folder in SETS if folder.name == "j_tp1pp2dp2")
    said = describe(write_description(folder, tmp_path / "run.yaml"))
    found = synthesize(said, replace(wanted_for(folder), source=folder / "ms_zero_src"))
    for name, content in render(found.ranks, with_maps=True).items():
        if name.endswith(".json"):
            assert content == (folder / "pt_meta" / name).read_bytes()
