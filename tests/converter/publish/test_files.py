"""Small files: whole or not at all, durable with every folder that leads to them, and never through a link."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ckpt2pt.errors import FileAccessError, NoSpaceError, TryAgainError, UsageError
from ckpt2pt.io.records import seal
from ckpt2pt.publish import make_folder, partial_name, publish_bytes, read_json, read_record, sweep_partials


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_bytes(tmp_path / "a", b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError):
        publish_bytes(tmp_path / "a", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b"[" * 200_000, None])
def test_a_document_that_is_not_whole_is_none(data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "a.json").write_bytes(data)
    assert read_json(tmp_path / "a.json") is None


def synced(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """Folders and files as they are synced from now on, by their path below ``root``."""
    seen: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        seen.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), root))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def test_every_folder_that_leads_to_a_new_one_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = synced(monkeypatch, tmp_path)
    for _ in range(2):  # whoever made them may have been killed before they were synced
        make_folder(tmp_path / "out" / "iter_1" / "mp_rank_00", tmp_path / "out")
        assert seen == ["out/iter_1", "out", "."]
        seen.clear()


def test_a_folder_that_cannot_be_synced_is_an_error_but_where_that_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [errno.EINVAL, errno.EIO]

    def fsync(_: int) -> None:
        raise OSError(numbers[0], "no")

    monkeypatch.setattr(os, "fsync", fsync)
    make_folder(tmp_path / "a" / "b", tmp_path / "a")
    numbers.pop(0)
    with pytest.raises(FileAccessError, match="making the folder"):
        make_folder(tmp_path / "a" / "b", tmp_path / "a")


@pytest.mark.parametrize("place", ["iter_1", "iter_1/.ckpt2pt"])
def test_nothing_is_made_through_a_link_below_the_root(place: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    root = tmp_path / "out"
    (root / place).parent.mkdir(parents=True)
    (root / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="symbolic link"):
        make_folder(root / "iter_1" / ".ckpt2pt", root)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    make_folder(tmp_path / "out" / "iter_1", tmp_path / "out")
    assert (tmp_path / "disk" / "iter_1").is_dir()


def test_the_name_appears_behind_the_data_and_the_fence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = synced(monkeypatch, tmp_path)

    def fence() -> None:
        assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
        assert len(seen) == 1, "the data is synced"

    publish_bytes(tmp_path / "a", b"new", fence=fence)
    assert seen[1:] == ["."]


def test_what_the_fence_refuses_leaves_nothing(tmp_path: Path) -> None:
    def fence() -> None:
        raise TryAgainError("taken", where="here", hint="again")

    with pytest.raises(TryAgainError, match="taken"):
        publish_bytes(tmp_path / "a", b"new", fence=fence)
    assert not list(tmp_path.iterdir())


def test_a_temporary_file_that_another_run_has_swept_is_reported_as_that(tmp_path: Path) -> None:
    with pytest.raises(TryAgainError, match="another run is at work here"):
        publish_bytes(tmp_path / "a", b"new", fence=lambda: sweep_partials(tmp_path))


def test_only_temporary_files_of_ours_are_swept(tmp_path: Path) -> None:
    for name in (".a.partial", ".a.1-zz.partial", "a.1-2.partial", ".b.1-2.partial"):
        (tmp_path / name).touch()
    partial_name(tmp_path / "a").touch()
    sweep_partials(tmp_path, "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".a.1-zz.partial",
        ".a.partial",
        ".b.1-2.partial",
        "a.1-2.partial",
    ]


def test_a_record_is_read_whole_though_the_file_system_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "record.json").write_bytes(seal({"identity": "me"}))
    real, calls = os.read, iter(range(1_000_000))

    def busy(fd: int, nbytes: int) -> bytes:
        if next(calls) % 2:
            raise BlockingIOError(errno.EAGAIN, "busy")
        return real(fd, min(nbytes, 7))

    monkeypatch.setattr(os, "read", busy)
    assert read_record(tmp_path / "record.json") == {"identity": "me"}


def test_a_folder_above_the_root_that_cannot_be_synced_is_an_error_with_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink() == tmp_path:
            raise OSError(errno.EIO, "broken")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FileAccessError) as caught:
        make_folder(tmp_path / "root" / "a", tmp_path / "root")
    assert caught.value.where == str(tmp_path / "root" / "a")
