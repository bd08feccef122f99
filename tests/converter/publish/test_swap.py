"""A complete result takes the place of an older one: killed at any step, one of the two is complete, or the next run makes it so."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from ckpt2pt.errors import FileAccessError, UsageError
from ckpt2pt.publish import MEGATRON, MINDSPORE, TRACKER, Kind, Target, swap
from targets import Killed, contents, convert, dying, finish, finish_stages, left_over, path_of, replacing


@pytest.fixture(params=[MEGATRON, MINDSPORE], ids=["megatron", "mindspore"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


def older(root: Path, kind: Kind) -> Target:
    """A published result of three stages; the newer one has two."""
    target = Target(root=root, iteration=500, identity="older-conversion", stages=3, tensor=1, kind=kind)
    finish(target, 0, 1, 2, content=b"older")
    assert target.publish_iteration()
    return target


def newer(target: Target) -> Target:
    return replace(target, identity="newer-conversion", stages=2)


def test_the_older_result_stays_until_the_newer_is_complete(kind: Kind, tmp_path: Path) -> None:
    old = older(tmp_path, kind)
    beside = replacing(newer(old))
    finish_stages(beside, 0, content=b"newer")
    assert not beside.publish_iteration()
    assert contents(old) == {b"older"}
    assert old.stage_manifest(2)
    finish_stages(beside, 1, content=b"newer")
    assert beside.publish_iteration()
    assert contents(newer(old)) == {b"newer"}
    assert not path_of(old, 2).exists(), "what only the older one had is gone"
    assert all(newer(old).stage_manifest(pp) for pp in range(2))
    assert left_over(old) == []


def every_step(kind: Kind, root: Path, *, exchange: bool) -> Iterator[Target]:
    """The older result after the run that replaces it was killed, a step later each time."""
    for at in count():
        old = older(root / str(at), kind)
        beside = replacing(newer(old))
        finish_stages(beside, 0, 1, content=b"newer")
        with dying(at, exchange=exchange):
            try:
                beside.publish_iteration()
            except Killed:
                pass
            else:
                assert at > 5, "nothing was done"
                return
        yield old


@pytest.mark.parametrize(
    ("kind", "exchange"),
    [(MEGATRON, True), (MEGATRON, False), (MINDSPORE, True)],
    ids=["megatron", "megatron-two-renames", "mindspore"],
    indirect=["kind"],
)
def test_killed_at_any_step_one_of_the_two_is_complete(
    kind: Kind, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(swap, "_exchanged", lambda *_: False)
    windows = 0
    for old in every_step(kind, tmp_path, exchange=exchange):
        new = newer(old)
        seen = contents(new)
        whole = seen in ({b"older"}, {b"newer"})
        if kind is MEGATRON:
            assert (old.root / TRACKER).read_text() == "500"
            windows += not whole
            assert whole or not exchange, "in one step there is no moment between the two"
        else:
            assert whole or swap.unfinished(new.state)
        if not whole:
            new.recover()
            assert contents(new) == {b"newer"}, "what was begun only goes forward"
        convert(new, b"newer")
        assert contents(new) == {b"newer"}
        assert not path_of(old, 2).exists()
        assert left_over(old) == []
    assert windows == (1 if kind is MEGATRON and not exchange else 0)


@pytest.mark.parametrize(
    ("kind", "exchange"),
    [(MEGATRON, True), (MEGATRON, False), (MINDSPORE, True)],
    ids=["megatron", "megatron-two-renames", "mindspore"],
    indirect=["kind"],
)
def test_whoever_comes_next_finds_one_of_the_two(
    kind: Kind, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run may be that of the older conversion again: it finds its own result, or is reported the newer."""
    if not exchange:
        monkeypatch.setattr(swap, "_exchanged", lambda *_: False)
    for old in every_step(kind, tmp_path, exchange=exchange):
        old.recover()
        if contents(newer(old)) == {b"newer"}:
            with pytest.raises(UsageError, match="another conversion"):
                old.check(overwrite=False)
        else:
            assert not old.check(overwrite=False).beside
            assert all(old.stage_manifest(pp) for pp in range(3))
            old.claim({}, overwrite=False)
            assert left_over(old) == [], "what nobody is at work on any more is swept"


def test_a_file_that_appears_meanwhile_is_not_replaced(kind: Kind, tmp_path: Path) -> None:
    old = older(tmp_path, kind)
    beside = replacing(newer(old))
    finish_stages(beside, 0, 1, content=b"newer")
    path_of(old, 1).write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="which ckpt2pt did not write, or which was changed since"):
        beside.publish_iteration()
    assert path_of(old, 1).read_bytes() == b"somebody's"
    assert path_of(old, 0).read_bytes() == b"older"


def test_a_rename_that_fails_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = older(tmp_path, MEGATRON)
    beside = replacing(newer(old))
    finish_stages(beside, 0, 1, content=b"newer")
    monkeypatch.setattr(swap, "_exchanged", lambda *_: False)
    real = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.suffix == swap.NEW:
            raise OSError(errno.EIO, "no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(FileAccessError, match="replacing"):
        beside.publish_iteration()
    assert contents(old) == {b"older"}


def test_two_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (other / "inside").mkdir(parents=True)
    assert swap._exchanged(one, other), "this machine's file system can"
    assert (one / "inside").is_dir()
    with pytest.raises(FileNotFoundError):
        swap._exchanged(one, tmp_path / "not there")


def test_a_mount_is_refused_before_anything_is_written() -> None:
    swap.refuse_mount(Path("/proc/self"))
    with pytest.raises(UsageError, match="mount of its own"):
        swap.refuse_mount(Path("/proc"))
