"""An older result is removed, and nothing that is not ours with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ckpt2pt.errors import FileAccessError
from ckpt2pt.io.paths import listing
from ckpt2pt.publish import Target, remove_ours, retire
from ckpt2pt.publish.retire import files_below
from targets import finish, path_of


@pytest.fixture
def target(tmp_path: Path) -> Target:
    found = Target(root=tmp_path, iteration=500, identity="me", stages=2, tensor=1)
    finish(found, 0, 1)
    return found


def test_a_result_goes_with_its_records(target: Target) -> None:
    (target.folder / "mp_rank_00_002").mkdir()
    (target.folder / "mp_rank_00_001" / ".model_optim_rng.pt.1-2a.partial").touch()
    retire(target.folder)
    assert not list(target.root.iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "mp_rank_00_000/other.pt", ".ckpt2pt/notes.json"])
def test_what_is_not_ours_stays_and_is_reported(name: str, target: Target, caplog: pytest.LogCaptureFixture) -> None:
    (target.folder / name).write_text("theirs")
    for _ in range(2):
        [folder] = listing(target.root)
        (remove_ours if folder.suffix == ".removed" else retire)(folder)
        [folder] = listing(target.root)
        assert (folder / name).read_text() == "theirs"
    assert f"it holds {name}, which ckpt2pt did not write" in caplog.text


def test_what_links_lead_to_stays(target: Target, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "file").touch()
    path = path_of(target, 0)
    path.unlink()
    path.symlink_to(other / "file")
    (target.folder / "linked").symlink_to(other)
    assert "linked" in list(files_below(target.folder))
    retire(target.folder)
    assert (other / "file").exists()


def test_a_folder_that_cannot_be_removed_is_tried_again(
    target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        retire(target.folder)
    assert "the next run will try again" in caplog.text
    [left] = target.root.iterdir()
    remove_ours(left)
    assert not list(target.root.iterdir())


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_empty(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> list[str]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(FileAccessError, match="Stale file handle"):
        list(files_below(target.folder))
