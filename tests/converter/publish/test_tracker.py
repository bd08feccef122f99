"""The tracker: what cannot be read is an error and never none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ckpt2pt.errors import FileAccessError
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
