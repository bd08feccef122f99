"""When a checkpoint is whole, and what is said while it is not."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import InputError, MissingInputError, TimedOutError, aside, ref
from ckpt2pt.formats.mindspore.ready import Observation, Watcher
from ckptfiles import Tensor, ckpt

FOUR = Topology(num_layers=4, tensor=2, pipeline=2)
WHOLE = ckpt([Tensor("a", "float32", (1,), b"\0\0\0\0")])


def save(
    root: Path, rank: int, name: str = "0_12", *, data: bytes = WHOLE, mode: int = 0o400, stable_for: float = 0
) -> Path:
    path = root / f"rank_{rank}" / f"network_rank_{rank}-{name}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    then = time.time() - stable_for
    os.utime(path, (then, then))
    return path


def temporary(path: Path) -> Path:
    """What MindSpore calls it until it is whole."""
    return path.rename(path.with_suffix(".tmp"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for rank in range(4):
        save(tmp_path, rank)
    return tmp_path


def look(root: Path, topology: Topology = FOUR, settle: float = 10, **more: Any) -> Observation:
    return Watcher(root, topology, settle_seconds=settle, **more).look()


def test_four_ranks_at_one_step_are_whole(root: Path) -> None:
    seen = look(root)
    assert seen.ready
    assert seen.wanted == (0, 12)


def test_a_rank_that_is_missing(root: Path) -> None:
    (root / "rank_3").rename(root / "elsewhere")
    (root / "rank_2" / "network_rank_2-0_12.ckpt").unlink()
    seen = look(root)
    assert seen.sentence == "checkpoint 0_12 is incomplete: rank_2 has none yet; rank_3 is missing"
    error = seen.to_error(300)
    assert isinstance(error, MissingInputError)
    assert error.what == "after 300 s the checkpoint 0_12 is incomplete: rank_2 has none yet; rank_3 is missing"
    assert error.where == str(root)


def test_nothing_is_there_yet(tmp_path: Path) -> None:
    seen = look(tmp_path)
    assert (seen.wanted, len(seen.blockers)) == (None, 4)
    assert seen.sentence.startswith(f"checkpoint in {tmp_path} is incomplete: rank_0 is missing; ")
    assert seen.to_error(1).exit_code == 66


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    seen = look(tmp_path / "none")
    assert (seen.ready, seen.broken) == (False, False)
    assert seen.sentence == f"source folder {tmp_path / 'none'} is not there"
    error = seen.to_error(3)
    assert isinstance(error, MissingInputError)
    assert error.what == f"after 3 s the source folder {tmp_path / 'none'} is not there"
    assert ref("source.path") in error.hint


def test_a_rank_at_another_step(root: Path) -> None:
    save(root, 0, "0_20")
    save(root, 1, "0_20")
    save(root, 2, "0_8")
    seen = look(root)
    assert seen.sentence == "checkpoint 0_20 is incomplete: rank_2 is at 0_8, 0_12; rank_3 is at 0_12"
    assert isinstance(seen.to_error(1), InputError)
    assert aside("source.iteration") in seen.to_error(1).hint


def test_later_epochs_are_newer_than_larger_steps(root: Path) -> None:
    for rank in range(4):
        save(root, rank, "1_2")
    assert look(root).wanted == (1, 2)


@pytest.mark.parametrize("older", [True, False], ids=["an-older-one-is-there", "nothing-else"])
def test_a_file_under_its_temporary_name(root: Path, older: bool) -> None:
    if older:
        for rank in range(4):
            save(root, rank, "0_20")
    name = "0_20" if older else "0_12"
    path = temporary(root / "rank_1" / f"network_rank_1-{name}.ckpt")
    seen = look(root)
    assert seen.sentence == f"checkpoint {name} is incomplete: rank_1 is being written ({path.name})"
    assert isinstance(seen.to_error(1), TimedOutError)


def test_the_first_temporary_file_of_a_new_save_is_enough(root: Path) -> None:
    temporary(save(root, 2, "0_13", data=WHOLE[:3]))
    seen = look(root)
    assert seen.wanted == (0, 13)
    assert [blocker.kind for blocker in seen.blockers] == ["other", "other", "unfinished", "other"]


def test_what_some_ranks_have_begun_is_known_and_what_they_have_yet_to_remove_is_not(root: Path) -> None:
    save(root, 0, "0_4")
    save(root, 2, "0_20")
    temporary(save(root, 1, "0_30", stable_for=60))
    watcher = Watcher(root, FOUR, settle_seconds=10)
    assert (watcher.steps(), watcher.begun()) == ([(0, 12)], [(0, 20), (0, 30)])
    assert watcher.look((0, 20)).stable_for < 10
    assert 60 <= watcher.look((0, 30)).stable_for < 70


def test_what_a_killed_save_of_an_older_step_left_is_no_obstacle(root: Path) -> None:
    temporary(save(root, 1, "0_9"))
    assert look(root).ready


def test_a_file_that_may_be_written_has_to_rest(root: Path) -> None:
    save(root, 1, mode=0o644)
    watcher = Watcher(root, FOUR, settle_seconds=0.3)
    first = watcher.look()
    assert "rank_1 may still be written (network_rank_1-0_12.ckpt changed 0 s ago)" in first.sentence
    assert first.to_error(1).exit_code == 75
    time.sleep(0.35)
    assert watcher.look().ready
    save(root, 1, data=WHOLE + WHOLE.replace(b"a", b"b", 1), mode=0o644)
    assert not watcher.look().ready, "it was written to again"


def test_a_file_copied_long_ago_has_rested(root: Path) -> None:
    save(root, 1, mode=0o644, stable_for=60)
    assert look(root).ready
    save(root, 1, mode=0o644, stable_for=-3600)
    assert not look(root).ready, "a clock that goes ahead proves nothing"


def test_a_file_that_is_no_checkpoint(root: Path) -> None:
    save(root, 3, data=WHOLE[:-2])
    seen = look(root)
    assert "rank_3 is broken (network_rank_3-0_12.ckpt: " in seen.sentence
    assert seen.to_error(1).exit_code == 65
    save(root, 3)
    assert look(root).ready


def test_other_files_of_a_training_are_no_checkpoints(root: Path) -> None:
    for name in ("network_best_rank_0-9_9.ckpt", "network-graph.meta", "x_breakpoint.ckpt", ".hidden-9_9.ckpt"):
        (root / "rank_0" / name).write_bytes(b"")
    assert look(root).ready


def test_files_without_a_step(tmp_path: Path) -> None:
    for rank in range(4):
        save(tmp_path, rank).rename(tmp_path / f"rank_{rank}" / "network.ckpt")
    assert look(tmp_path).ready
    temporary(tmp_path / "rank_0" / "network.ckpt")
    assert look(tmp_path).sentence == "checkpoint is incomplete: rank_0 is being written (network.tmp)"


def test_the_trainings_own_report_comes_last(root: Path) -> None:
    for rank, step in enumerate((12, 12, 12, 8)):
        (root / f"rank_{rank}" / "meta.json").write_text(json.dumps({"last_epoch": 0, "last_step": step}))
    seen = look(root)
    assert seen.sentence == "checkpoint 0_12 is incomplete: meta.json of the ranks still says 0_8"
    assert seen.to_error(1).exit_code == 65
    (root / "rank_3" / "meta.json").write_text('{"last_epoch": 0, "last_step": 12}8}')
    assert look(root).ready


def test_the_other_shards_of_a_distributed_optimizer_are_needed(root: Path) -> None:
    topology = Topology(num_layers=4, tensor=2, data=2)  # rank 2 and 3 are data-parallel copies
    assert look(root, topology).ready
    info = root / "opt_shard_info" / "rank_1" / "dist_opt_shard_info_rank_1-0_0.json"
    info.parent.mkdir(parents=True)
    info.write_text('{"dp_rank_list": [1, 3]}garbage of a longer text')
    assert look(root, topology).ready
    (root / "rank_3" / "network_rank_3-0_12.ckpt").unlink()
    assert look(root, topology).sentence == "checkpoint 0_12 is incomplete: rank_3 has none yet"
    (root / "rank_2" / "network_rank_2-0_12.ckpt").unlink()
    merged = root / "rank_1" / "network_rank_1-0_12_dp_merged.ckpt"
    (root / "rank_1" / "network_rank_1-0_12.ckpt").rename(merged)
    assert look(root, topology).ready, "merged files hold everything"


def test_a_chosen_checkpoint_is_all_that_counts(root: Path) -> None:
    save(root, 0, "0_20")
    assert look(root, choose=lambda _: (0, 12)).ready
    assert look(root, choose=lambda _: (0, 20)).sentence.startswith("checkpoint 0_20 is incomplete: rank_1 is at 0_12;")
    none = look(root, choose=lambda _: None)
    assert none.sentence == f"checkpoint in {root} is incomplete: rank_0 is at 0_12, 0_20, not that one"
    assert none.to_error(1).exit_code == 66


def test_many_ranks_are_counted(tmp_path: Path) -> None:
    save(tmp_path, 0)
    seen = look(tmp_path, Topology(num_layers=16, tensor=4, pipeline=4))
    assert seen.sentence.endswith("rank_8 is missing; and 7 more")
