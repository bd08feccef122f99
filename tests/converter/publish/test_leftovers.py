"""What killed runs left beside a result is swept by the next; what somebody is at work in is not."""

from __future__ import annotations

import fcntl
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt2pt.errors import TryAgainError
from ckpt2pt.publish import Target
from targets import contents, convert, finish, finish_stages, left_over, replacing


@pytest.fixture
def old(tmp_path: Path) -> Target:
    found = Target(root=tmp_path, iteration=500, identity="older", stages=2, tensor=1)
    finish(found, 0, 1, content=b"older")
    assert found.publish_iteration()
    return found


def test_a_replacement_that_nobody_works_on_is_swept_by_whoever_comes(old: Target) -> None:
    finish_stages(replacing(replace(old, identity="newer")), 0)
    assert left_over(old) == [".iter_0000500.newer.new"]
    old.claim({}, overwrite=False)
    assert left_over(old) == []
    finish_stages(replacing(replace(old, identity="newer")), 0)
    convert(replace(old, identity="third"), b"third")
    assert (left_over(old), contents(old)) == ([], {b"third"})


def test_one_that_is_worked_on_stays(old: Target) -> None:
    beside = replacing(replace(old, identity="newer"))
    with beside.stage_lock(0):
        old.claim({}, overwrite=False)
        with pytest.raises(TryAgainError, match="what is to be replaced"):
            replacing(replace(old, identity="third"))
        finish_stages(beside, 0, 1, content=b"newer")
        assert beside.publish_iteration()
    assert contents(old) == {b"newer"}


def test_without_locks_only_another_replacement_sweeps_it(old: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(38, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    beside = replacing(replace(old, identity="newer"))
    with beside.stage_lock(0):
        old.claim({}, overwrite=False)
        finish_stages(beside, 0)
    replacing(replace(old, identity="third"))
    with pytest.raises(TryAgainError, match="took the folder over"):
        beside.fence()
