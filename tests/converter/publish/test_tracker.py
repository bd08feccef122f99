"""The tracker: what cannot be read is an error and never none."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
from pathlib import Path

import pytest

from ckpt2pt.errors import FileAccessError, UsageError
from ckpt2pt.publish import TRACKER, Target, read_tracker, tracked
from targets import finish


@pytest.mark.parametrize(
    ("text", "iteration"), [(b"500", 500), (b" 7\n", 7), (b"release", None), ("²".encode(), None), (b"9" * 30, None), (b"\xff5", None)]
)  # fmt: skip
def test_an_iteration_is_decimal_digits(text: bytes, iteration: int | None, tmp_path: Path) -> None:
    assert (read_tracker(tmp_path), tracked(tmp_path)) == ("", None)
    (tmp_path / TRACKER).write_bytes(text)
    assert tracked(tmp_path) == iteration
    assert read_tracker(tmp_path)


def test_a_tracker_that_cannot_be_read_does_not_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "iter_0000900").mkdir()
    (tmp_path / TRACKER).write_text("900")
    target = Target(root=tmp_path, iteration=500, identity="me", stages=1, tensor=1)
    finish(target, 0)
    real = os.open

    def broken(path: str | Path, *more: int, **others: int) -> int:
        if Path(path).name == TRACKER:
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *more, **others)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", broken)
        with pytest.raises(FileAccessError, match=r"reading failed: .*Input/output error"):
            target.publish_iteration()
    assert (tmp_path / TRACKER).read_text() == "900"
    assert target.publish_iteration()
    assert (tmp_path / TRACKER).read_text() == "900"


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_in_the_place_of_a_tracker_is_refused_before_anything_is_written(
    kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "out" / TRACKER
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    target = Target(root=tmp_path / "out", iteration=500, identity="me", stages=1, tensor=1)
    with pytest.raises(UsageError, match="not a regular file") as caught:
        target.check(overwrite=True)
    assert caught.value.where == str(path)
    assert [entry.name for entry in path.parent.iterdir()] == [TRACKER]


@pytest.mark.parametrize(
    ("said", "reported"),
    [
        ("900", "named iteration 900, which is not there"),
        ("release", "named the release checkpoint"),
        ("\x1b[31m" + "9" * 50, r"named '\\x1b\[31m9{35}', which is no iteration"),
        ("500", ""),
        ("400", ""),
        ("", ""),
    ],
)
def test_a_tracker_that_is_replaced_without_being_older_is_reported(
    said: str, reported: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / TRACKER).write_text(said)
    target = Target(root=tmp_path, iteration=500, identity="me", stages=1, tensor=1)
    finish(target, 0)
    with caplog.at_level(logging.WARNING):
        assert target.publish_iteration()
    assert (tmp_path / TRACKER).read_text() == "500"
    assert len(caplog.messages) == bool(reported)
    if reported:
        assert re.search(rf"{reported}; it names iteration 500 now", caplog.messages[0])


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("lockless")
def test_without_locks_two_iterations_that_end_at_once_leave_the_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = (Target(root=tmp_path, iteration=n, identity=str(n), stages=1, tensor=1) for n in (500, 900))
    for target in (early, late):
        finish(target, 0)
    real = os.replace

    def meanwhile(source: Path, place: Path) -> None:
        if Path(place).name == TRACKER:
            monkeypatch.setattr(os, "replace", real)
            assert late.publish_iteration()
            assert (tmp_path / TRACKER).read_text() == "900"
        real(source, place)

    monkeypatch.setattr(os, "replace", meanwhile)
    assert early.publish_iteration()
    assert (tmp_path / TRACKER).read_text() == "900"


@pytest.mark.usefixtures("lockless")
def test_without_locks_a_tracker_that_somebody_set_back_is_followed(tmp_path: Path) -> None:
    late, early = (Target(root=tmp_path, iteration=n, identity=str(n), stages=1, tensor=1) for n in (900, 500))
    finish(late, 0)
    assert late.publish_iteration()
    finish(early, 0)
    (tmp_path / TRACKER).write_text("400")
    assert early.publish_iteration()
    assert (tmp_path / TRACKER).read_text() == "500"
