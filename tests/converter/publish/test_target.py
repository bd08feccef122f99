"""The target folder: taken once, finished stage by stage, announced last."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.errors import TryAgainError, UsageError
from ckpt2pt.io.records import seal
from ckpt2pt.publish import MINDSPORE, TRACKER, Target, partial_name
from ckpt2pt.publish.files import read_small
from targets import finish, finish_rank, finish_stages, replacing


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(root=tmp_path / "out", iteration=500, identity="me", stages=2, tensor=1)


def test_the_tracker_comes_when_every_stage_is_there(target: Target) -> None:
    finish(target, 1)
    assert not target.publish_iteration()
    assert not (target.root / TRACKER).exists()
    finish(target, 0)
    assert target.publish_iteration()
    assert (target.root / TRACKER).read_text() == "500"
    report = json.loads((target.state / "report.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == [0, 1]
    assert "tensors" not in report["stages"][0]["ranks"][0]


def rewrite(path: Path, change: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage", ["gone", "shorter", "other-identity", "manifest-cut", "manifest-changed", "manifest-pipe"]
)
def test_a_rank_counts_only_while_its_files_are_whole(damage: str, target: Target) -> None:
    finish(target, 0, 1)
    path = next(target.folder.glob("mp_rank_00_001/*.pt"))
    manifest = target.state / "rank-00-001.json"
    if damage == "gone":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(b"1234")
    elif damage == "manifest-cut":
        manifest.write_bytes(manifest.read_bytes()[:-9])
    elif damage == "manifest-changed":
        rewrite(manifest, {"files": []})
    elif damage == "manifest-pipe":
        pipe(manifest)
    found = replace(target, identity="other") if damage == "other-identity" else target
    assert found.rank_manifest(0, 1) is None
    assert found.stage_manifest(1) is None
    if damage == "other-identity":
        with pytest.raises(TryAgainError, match="took the folder over"):
            found.publish_iteration()
    else:
        assert not found.publish_iteration()
    assert target.rank_manifest(0, 0) is not None


def test_a_folder_of_another_conversion_is_refused_unless_overwritten(target: Target) -> None:
    finish(target, 0, 1)
    target.publish_iteration()
    other = replace(target, identity="other")
    with pytest.raises(UsageError, match="another conversion"):
        other.claim({}, overwrite=False)
    assert (target.root / TRACKER).read_text() == "500"
    beside = replacing(other)
    assert target.stage_manifest(0), "the old result stays until the new one is complete"
    finish_stages(beside, 0, 1)
    assert target.stage_manifest(0)
    assert beside.publish_iteration()
    assert other.stage_manifest(0)
    assert sorted(path.name for path in target.root.iterdir()) == ["iter_0000500", TRACKER]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: rewrite(path, {"identity": "other"}), "claim of the conversion there is damaged"),
        (lambda path: path.write_text("{"), "claim of the conversion there is damaged"),
        (pipe, "claim of the conversion there is damaged"),
    ],
    ids=["changed", "cut", "pipe"],
)
def test_a_claim_that_was_damaged_is_nobodys(target: Target, damage: Callable[[Path], object], words: str) -> None:
    finish(target, 0, 1)
    damage(target.state / "claim.json")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=words):
            target.claim({}, overwrite=overwrite)
    assert target.rank_manifest(0, 0), "what nobody can tell the owner of is not removed"


def test_two_workers_that_begin_at_once_both_go_on(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second looks for a claim just before the first writes it and makes its rank's folder."""
    real = read_small

    def first(path: Path) -> bytes:
        data = real(path)
        monkeypatch.setattr("ckpt2pt.publish.target.read_small", real)
        finish(target, 0)
        return data

    monkeypatch.setattr("ckpt2pt.publish.target.read_small", first)
    target.check(overwrite=False)


def test_the_tracker_does_not_go_back(target: Target) -> None:
    finish(target, 0, 1)
    target.publish_iteration()
    older = replace(target, iteration=400, identity="older")
    finish(older, 0, 1)
    assert older.publish_iteration()
    assert older.newer == 500
    assert (target.root / TRACKER).read_text() == "500"
    target.folder.rename(target.root / "away")
    assert older.newer is None, "a tracker that leads nowhere is worth nothing"
    older.publish_iteration()
    assert (target.root / TRACKER).read_text() == "400"


def test_mindspore_has_no_tracker(target: Target) -> None:
    target.root.mkdir()
    (target.root / TRACKER).write_text("900")
    assert target.newer is None
    assert replace(target, kind=MINDSPORE).newer is None
    (target.root / "iter_0000900").mkdir()
    assert target.newer == 900
    assert replace(target, kind=MINDSPORE).newer is None


@pytest.mark.parametrize("text", ["release", "²", "9" * 30, ""])
def test_what_is_no_iteration_in_the_tracker_is_replaced(target: Target, text: str) -> None:
    target.root.mkdir()
    (target.root / TRACKER).write_text(text)
    finish(target, 0, 1)
    assert target.publish_iteration()
    assert (target.root / TRACKER).read_text() == "500"


@pytest.fixture
def mended(target: Target) -> tuple[Target, Target]:
    """The same conversion before and after the source of its second stage was mended."""
    before = replace(target, identity="a", options_digest="p", ranks={(0, 0): "r0", (0, 1): "r1"})
    return before, replace(before, identity="b", ranks={(0, 0): "r0", (0, 1): "mended"})


def test_a_source_that_was_mended_goes_on_with_what_is_finished(mended: tuple[Target, Target]) -> None:
    before, after = mended
    finish(before, 0)
    finish_rank(before, 1)
    finish(after)
    assert after.rank_manifest(0, 0)
    assert after.stage_manifest(0)
    assert after.rank_manifest(0, 1) is None, "it was read from what is no longer there"
    finish(after, 1)
    assert after.publish_iteration()
    assert (after.root / TRACKER).read_text() == "500"


def test_a_published_result_is_not_replaced_because_its_source_changed(mended: tuple[Target, Target]) -> None:
    before, after = mended
    finish(before, 0, 1)
    before.publish_iteration()
    with pytest.raises(UsageError, match="a source that changed since"):
        after.claim({}, overwrite=False)
    assert before.stage_manifest(1)


def test_whoever_lost_the_folder_meanwhile_writes_nothing(mended: tuple[Target, Target]) -> None:
    before, after = mended
    before.claim({}, overwrite=False)
    after.claim({}, overwrite=False)
    with pytest.raises(TryAgainError, match="took the folder over"), before.stage_lock(0):
        pass
    with after.stage_lock(0):
        pass


def test_another_purpose_is_another_conversion(mended: tuple[Target, Target]) -> None:
    before, after = mended
    before.claim({}, overwrite=False)
    with pytest.raises(UsageError, match="another conversion"):
        replace(after, options_digest="q").claim({}, overwrite=False)


def test_overwriting_leaves_the_tracker_of_another_iteration(target: Target) -> None:
    finish(target, 0)
    (target.root / TRACKER).write_text("600")
    (target.root / "iter_0000600").mkdir()
    beside = replacing(replace(target, identity="other"))
    finish_stages(beside, 0, 1)
    assert beside.publish_iteration()
    assert (target.root / TRACKER).read_text() == "600"


def test_a_folder_with_strangers_is_refused(target: Target) -> None:
    (target.folder / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds mp_rank_00, which ckpt2pt did not write"):
        target.check(overwrite=False)
    assert not target.state.exists()


def test_a_stage_is_converted_by_one_run_at_a_time(target: Target) -> None:
    target.claim({}, overwrite=False)
    with (
        target.stage_lock(0),
        target.stage_lock(1),
        pytest.raises(TryAgainError, match=f"pid {os.getpid()}"),
        target.stage_lock(0),
    ):
        pass
    with target.stage_lock(0):
        pass


def test_what_a_run_is_working_on_is_not_overwritten(target: Target) -> None:
    finish(target, 0)
    other = replace(target, identity="other", stages=1)
    with target.stage_lock(1), pytest.raises(TryAgainError, match=f"what is to be replaced: .* pid {os.getpid()}"):
        replacing(other)
    assert target.stage_manifest(0)
    assert list(target.folder.rglob("*.pt"))
    beside = replacing(other)
    finish_stages(beside, 0)
    with target.stage_lock(1), pytest.raises(TryAgainError, match="what is to be replaced"):
        beside.publish_iteration()
    assert target.stage_manifest(0)
    assert beside.publish_iteration(), "what was finished meanwhile is still there"


def test_a_run_whose_folder_was_taken_before_it_began_a_stage_ends(target: Target) -> None:
    target.claim({}, overwrite=False)
    beside = replacing(replace(target, identity="other", stages=1))
    finish_stages(beside, 0)
    assert beside.publish_iteration()
    with pytest.raises(TryAgainError, match="took the folder over"), target.stage_lock(0):
        pass


def test_a_stage_whose_files_have_gone_is_not_published(target: Target) -> None:
    finish(target, 0)
    next(target.folder.rglob("*.pt")).unlink()
    with pytest.raises(TryAgainError, match="tp 0 pp 0"):
        target.publish_stage(0, {})


def test_a_tracker_that_is_no_text_is_somebody_elses(target: Target) -> None:
    finish(target, 0, 1)
    (target.root / TRACKER).write_bytes(b"\xff\xfe5")
    replacing(replace(target, identity="other"))
    assert (target.root / TRACKER).read_bytes() == b"\xff\xfe5"


def test_a_lock_that_cannot_be_opened_is_an_error_with_a_hint(target: Target) -> None:
    target.claim({}, overwrite=False)
    (target.state / "stage-000.lock").mkdir()
    with pytest.raises(UsageError, match="Is a directory") as caught, target.stage_lock(0):
        pass
    assert "move it away" in caught.value.hint


def test_a_sweep_takes_only_what_a_killed_run_left(target: Target) -> None:
    folder = target.folder / "mp_rank_00_000"
    finish(target, 0)
    partial_name(folder / "model_optim_rng.pt").write_bytes(b"half")
    (folder / ".keep").write_bytes(b"")
    target.sweep([0])
    assert sorted(p.name for p in folder.iterdir()) == [".keep", "model_optim_rng.pt"]


def test_a_sweep_ends_what_a_run_that_was_killed_at_its_end_was_writing(target: Target) -> None:
    target.claim({}, overwrite=False)
    finish_rank(target, 0)
    writing = target.ledger((0, 0)).writing
    announced = target.ledger((0, 1)).writing
    for path in (writing, announced):
        path.write_bytes(seal({"identity": target.identity, "files": []}))
    target.sweep([0, 1])
    assert (writing.exists(), announced.exists()) == (False, True)
