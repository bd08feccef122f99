"""Both ways of pt-meta, then a conversion with what they made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.ptmeta.make import from_checkpoint, from_description
from ckpt2pt.run import run
from ckpt2pt.verify.compare import compare
from conversions import Quiet, request_for
from descriptions import wanted_for, write_description
from goldens import golden_sets

SETS = golden_sets()
# An OrderedDict's _metadata, which Megatron's files have and loading ignores (docs/format-pt.md).
STATE = "*@state*"


def golden(name: str) -> Path:
    return next(folder for folder in SETS if folder.name.startswith(name))


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_a_description_alone_gives_megatrons_files_but_for_what_the_manifest_lists(
    folder: Path, tmp_path: Path
) -> None:
    description = write_description(folder, tmp_path / "run.yaml")
    made = from_description(description, tmp_path / "m", wanted_for(folder), accepted=True, overwrite=False)
    made.confirm()
    request = request_for(folder, tmp_path / "out", metadata=tmp_path / "m")
    outcome = run(request, range(request.topology.pipeline), Quiet())
    assert outcome.published
    assumed = ("*/rng_state/*", "*/num_floating_point_operations_so_far")
    compare(tmp_path / "out", folder / "A", ignore=(STATE, *assumed), ignore_padding=True).raise_differences()
    manifest = json.loads((outcome.target.state / "stage-000.json").read_text())
    assert manifest["assumed"] == json.loads(json.dumps(made.assumed))
    assert {"rng_state", "num_floating_point_operations_so_far"} <= set(manifest["assumed"])


def test_nothing_is_written_before_the_assumptions_are_accepted(tmp_path: Path) -> None:
    description = write_description(SETS[0], tmp_path / "run.yaml")
    made = from_description(description, tmp_path / "m", wanted_for(SETS[0]), accepted=False, overwrite=False)
    assert not (tmp_path / "m").exists()
    assert made.written is None
    assert "rng_state" in made.sentence()
    with pytest.raises(UsageError, match="rests on the assumptions"):
        made.confirm()


def test_a_checkpoint_gives_metadata_without_assumptions(tmp_path: Path) -> None:
    made = from_checkpoint(
        golden("b_st_") / "A", tmp_path, target_data=None, bucket_size=None, compare=True, overwrite=False
    )
    document = made.document()
    assert (document["ranks"], document["paramMaps"], document["assumed"]) == (4, 4, {})
    assert "proved" in made.sentence()
    assert json.loads((tmp_path / "origin.json").read_text())["from"] == "checkpoint"


def test_convert_without_metadata_says_which_way_fits(tmp_path: Path) -> None:
    folder = golden("a2_")
    for target, words in {
        tmp_path / "out": ["--megatron-path MEGATRON", "--description FILE"],
        folder / "A": [str(folder / "A")],
    }.items():
        request = request_for(folder, target, metadata=tmp_path / "none")
        with pytest.raises(MissingInputError) as caught:
            run(request, [0], Quiet())
        mend = caught.value.mend
        assert all(word in mend for word in [*words, "ckpt2pt pt-meta", f"--param-map-path {tmp_path / 'none'}"])
