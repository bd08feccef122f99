"""A checkpoint surveyed: its cut, its no-op layers, and ranks that do not belong together."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import discover
from ckpt2pt.discover.mindspore import prepare_mindspore
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import FormatError
from goldens import golden_sets
from imports import import_request
from results import edit_tree

SETS = {folder.name: folder for folder in golden_sets()}


def request(source: Path, **more: Any) -> Request:
    return import_request(source=source, target=Path("unused"), **more)


def test_the_cut_is_learnt_from_the_checkpoint() -> None:
    cut = request(SETS["b_st_tp2pp2_safetensors"] / "A").topology
    assert (cut.num_layers, cut.tensor, cut.pipeline, cut.virtual, cut.noop) == (4, 2, 2, 1, frozenset())
    asked = request(SETS["e_tp1pp2vpp2_noop_tail"] / "A")
    cut, training_step = asked.topology, discover(asked).training_step
    assert (cut.num_layers, cut.tensor, cut.pipeline, cut.virtual, training_step.iteration) == (8, 1, 2, 2, 2)
    assert cut.noop == {6, 7}  # those without parameters


def test_the_folder_of_one_iteration_does_as_well() -> None:
    folder = SETS["a2_tp1pp1_tied_bias"] / "A"
    assert discover(request(folder / "iter_0000002")).identity == discover(request(folder)).identity


def test_options_are_part_of_the_identity() -> None:
    folder = SETS["a2_tp1pp1_tied_bias"] / "A"
    seen = {discover(request(folder, **more)).identity for more in ({}, {"full": False}, {"prefix": "x"}, {"data": 2})}
    assert len(seen) == 4


def test_ranks_of_two_iterations_are_refused(tmp_path: Path) -> None:
    shutil.copytree(SETS["b_st_tp2pp2_safetensors"] / "A", tmp_path / "A", copy_function=shutil.copyfile)
    path = tmp_path / "A" / "iter_0000002" / "mp_rank_01_001" / "model_optim_rng.pt"
    path.parent.chmod(0o755)
    edit_tree(path, lambda tree: tree.update(iteration=4))
    with pytest.raises(FormatError, match="4 of 4 ranks state an iteration: 2, 4"):
        discover(request(tmp_path / "A"))


def test_every_element_is_read_once_whatever_the_number_of_copies() -> None:
    asked = request(SETS["b_st_tp2pp2_safetensors"] / "A", data=3, copies=True)
    prepared = prepare_mindspore(asked, discover(asked), (1, 1))
    single = request(SETS["b_st_tp2pp2_safetensors"] / "A")
    alone = prepare_mindspore(single, discover(single), (1, 1))
    assert [file.name for file in prepared.files] == [f"rank_{number}/network.ckpt" for number in (7, 9, 11)]
    assert sum(move.nbytes for move in prepared.moves()) == sum(move.nbytes for move in alone.moves())
    assert {len(move.sinks) for move in prepared.moves()} == {3}


def test_what_decides_the_result_is_in_its_meaning_and_nothing_else() -> None:
    folder = SETS["a2_tp1pp1_tied_bias"] / "A"
    one = request(folder)
    assert request(folder, workers=9, overwrite=True, verify="full").identity_options() == one.identity_options()
    changes: list[dict[str, Any]] = [
        {"full": False}, {"format": "safetensors"}, {"prefix": "p"}, {"contents": ("param",)}, {"copies": True},
    ]  # fmt: skip
    assert all(request(folder, **change).identity_options() != one.identity_options() for change in changes)
    assert replace(one, topology=Topology(num_layers=3)).identity_options() != one.identity_options()
