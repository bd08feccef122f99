"""What stands at a path: only two errors mean nothing, whatever pathlib takes for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt2pt.errors import Ckpt2ptError, FileAccessError, MissingInputError, PermissionDeniedError
from ckpt2pt.io.paths import is_file, is_folder, is_there, listing, status

LOOKS: dict[str, Callable[[Path], object]] = {
    "status": status,
    "is-there": is_there,
    "is-file": is_file,
    "is-folder": is_folder,
    "listing": listing,
    "pattern": lambda path: listing(path, "*/*"),
}
each_look = pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)


@each_look
@pytest.mark.parametrize("name", ["nothing", "file/nothing"])
def test_what_is_not_there_is_no_error(look: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not look(tmp_path / name)


@each_look
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ESTALE, FileAccessError),
        (errno.EIO, FileAccessError),
        (errno.EAGAIN, FileAccessError),
        (errno.EACCES, PermissionDeniedError),
        (errno.ENOTCONN, FileAccessError),
    ],
    ids=["stale", "io", "again", "denied", "not-connected"],
)
def test_anything_else_is_an_error_with_the_path(
    look: Callable[[Path], object],
    number: int,
    kind: type[Ckpt2ptError],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.stat

    def broken(path: Path, *, follow_symlinks: bool = True) -> object:
        if path.name == "broken":
            raise OSError(number, os.strerror(number))
        return real(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "stat", broken)
    monkeypatch.setattr(os, "listdir", broken)
    with pytest.raises(kind, match="broken"):
        look(tmp_path / "broken")


def test_a_path_of_the_users_that_leads_nowhere_is_a_missing_input(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MissingInputError, match="leads nowhere"):
        is_folder(tmp_path / "loop", "--ms-path")


def test_a_listing_is_sorted_and_matches_part_by_part(tmp_path: Path) -> None:
    for name in ("rank_1/b.ckpt", "rank_0/a.ckpt", "rank_0/a.json", "other/c.ckpt", "rank_2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = listing(tmp_path, "rank_*/*.ckpt")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["rank_0/a.ckpt", "rank_1/b.ckpt"]
    assert [path.name for path in listing(tmp_path)] == ["other", "rank_0", "rank_1", "rank_2"]
