"""Both ways of pt-meta, then a conversion with what they made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.ptmeta.make import from_checkpoint, from_description
from ckpt2pt.run.conversion import run
from conversions import Quiet, request_for
from descriptions import wanted_for, write_description
from goldens import golden_sets
from torchload import leaves, same

SETS = golden_sets()
# What differs from the files of the run that there never was.
REPORTED = {"rng_state", "num_floating_point_operations_so_far"}
NUMPY = "/rng_state/0/np_rng_state/1"


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
    manifest = json.loads((outcome.target.state / "stage-000.json").read_text())
    assert manifest["assumed"] == json.loads(json.dumps(made.assumed))
    ours, theirs = (iteration_folder(place) for place in (tmp_path / "out", folder / "A"))
    files = [path.relative_to(theirs) for path in sorted(theirs.glob("mp_rank_*/*.pt"))]
    assert files == [path.relative_to(ours) for path in sorted(ours.glob("mp_rank_*/*.pt"))]
    assert len(files) == 2 * made.ranks
    for name in files:
        one, other = by_key(ours / name), by_key(theirs / name)
        assert list(one) == list(other)  # every key of either, in order
        differing = {key for key in one if not same(one[key], other[key])}
        tops = {key.split("/")[1] for key in differing}
        assert tops == (REPORTED if name.name == "model_optim_rng.pt" else set())
        assert tops <= set(manifest["assumed"])


def by_key(path: Path) -> dict[str, Any]:
    """Leaves as real torch reads them; numpy's random numbers are one leaf, for we write them as a list."""
    found = leaves(path)
    numbers = {key: value for key, value in found.items() if key.startswith(NUMPY)}
    drawn = [int(number) for value in numbers.values() for number in np.ravel(value)]
    assert len(drawn) == (624 if path.name == "model_optim_rng.pt" else 0)
    return {NUMPY if key in numbers else key: drawn if key in numbers else value for key, value in found.items()}


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
        hint = caught.value.hint
        assert all(word in hint for word in [*words, "ckpt2pt pt-meta", f"--param-map-path {tmp_path / 'none'}"])
