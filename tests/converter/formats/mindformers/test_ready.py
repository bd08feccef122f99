"""An iteration is complete when all of its files are there, as a MindFormers training writes them one after the other."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ckpt2pt.core.foldernames import TRACKER
from ckpt2pt.errors import InputError, MissingInputError, TimedOutError
from ckpt2pt.formats.mindformers.ready import Iterations
from mindformers_made import Model, save, save_sharded


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def saved(root: Path, iteration: int = 3) -> Path:
    """As two ranks save it; the files cannot be written to any more."""
    folder = save_sharded(root, Model().arrays, {"output_layer.weight": (2, 1)}, ranks=2, iteration=iteration)
    for file in folder.iterdir():
        file.chmod(0o400)
    return folder


def aged(root: Path, seconds: float) -> None:
    """Everything there was last changed so long ago."""
    when = time.time() - seconds
    for path in (*root.rglob("*"), root):
        os.utime(path, (when, when))


def test_a_training_that_has_not_begun_and_one_that_has_not_saved(root: Path) -> None:
    seen = Iterations(root).look()
    assert (seen.ready, seen.sentence) == (False, f"source folder {root} is not there")
    assert isinstance(seen.to_error(), MissingInputError)
    root.mkdir()
    seen = Iterations(root).look()
    assert seen.sentence == f"checkpoint in {root} is incomplete: no iteration is there"
    assert "iteration_*" in seen.to_error(5).hint
    assert (Iterations(root).steps(), Iterations(root).begun()) == ([], [])


def test_what_the_tracker_names_is_complete_at_once(root: Path) -> None:
    saved(root)
    watcher = Iterations(root, settle_seconds=60)
    assert (watcher.steps(), watcher.begun()) == ([(-1, 3)], [])
    assert watcher.look().ready
    assert watcher.look().wanted == (-1, 3)


@pytest.mark.parametrize("last", ["common.json", "metadata.json", "qwen3-opt-0000001-0000002.safetensors"])
def test_every_moment_of_a_save(root: Path, last: str) -> None:
    """The one before is named by the tracker; the newest is what counts, and waits for its last file."""
    saved(root, 3)
    folder = saved(root, 4)
    (root / TRACKER).write_text("3")
    (folder / last).rename(root / last)
    watcher = Iterations(root, settle_seconds=0)
    seen = watcher.look()
    assert (seen.wanted, seen.ready) == ((-1, 4), False)
    assert last in seen.sentence
    assert watcher.begun() == [(-1, 4)]
    assert watcher.look((-1, 3)).ready
    part = folder / Path(last).with_suffix(".tmp")
    (root / last).rename(part)
    assert f"{part.name} is being written" in watcher.look().sentence
    assert isinstance(watcher.look().to_error(1), TimedOutError)
    part.rename(folder / last)
    assert watcher.look().ready


def test_what_the_tracker_does_not_name_yet_has_to_rest(root: Path) -> None:
    """As of asynchronous saves, of which the last has no tracker."""
    saved(root)
    (root / TRACKER).unlink()
    watcher = Iterations(root, settle_seconds=30)
    assert "does not name it yet" in watcher.look().sentence
    aged(root, 31)
    assert watcher.look().ready
    assert watcher.look().stable_for > 30


def test_files_that_can_be_written_to_have_to_rest(root: Path) -> None:
    folder = saved(root)
    file = next(folder.glob("*-model-0000000-*"))
    file.chmod(0o600)
    watcher = Iterations(root, settle_seconds=30)
    assert f"{file.name} may still be written" in watcher.look().sentence
    aged(root, 31)
    assert watcher.look().ready


def test_what_a_killed_training_left_is_passed_by_when_a_later_save_is_complete(root: Path) -> None:
    (saved(root, 6) / "metadata.json").unlink()
    (root / TRACKER).unlink()
    watcher = Iterations(root)
    assert watcher.begun() == [(-1, 6)]
    assert not watcher.look().ready
    aged(root, 60)
    saved(root, 4)  # it went on from 2, and its tracker is newer
    assert (watcher.steps(), watcher.begun()) == ([(-1, 4)], [])
    assert watcher.look().wanted == (-1, 4)
    assert watcher.look().ready


def test_an_iteration_that_is_asked_for(root: Path) -> None:
    saved(root, 3)
    assert Iterations(root, wanted=3).look().ready
    seen = Iterations(root, wanted=5).look()
    assert "iteration_00000005 is missing" in seen.sentence
    assert isinstance(seen.to_error(), MissingInputError)


def test_what_the_tracker_names_and_cannot_be_read_is_broken(root: Path) -> None:
    folder = saved(root)
    file = next(folder.glob("*-model-0000000-*"))
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-4])
    watcher = Iterations(root)
    seen = watcher.look()
    assert seen.broken
    assert file.name in seen.sentence
    assert isinstance(seen.to_error(), InputError)
    file.unlink()
    assert isinstance(watcher.look().to_error(), MissingInputError), "what has changed is read again"


def test_weights_alone_wait_for_no_optimizer(root: Path) -> None:
    folder = saved(root)
    (folder / "qwen3-opt-0000001-0000002.safetensors").unlink()
    assert not Iterations(root).look().ready
    assert Iterations(root, weights_alone=True).look().ready


def test_one_rank_has_no_metadata(root: Path) -> None:
    save(root, Model().arrays)
    assert Iterations(root).look().ready
