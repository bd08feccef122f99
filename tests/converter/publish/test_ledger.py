"""What is ours, and the fence: of two runs of which one has taken over, only one goes on."""

from __future__ import annotations

import os
from pathlib import Path
from zlib import crc32

import pytest

from ckpt2pt.errors import TryAgainError, UsageError
from ckpt2pt.io.records import Json, seal
from ckpt2pt.publish import Holdings, Ledger, publish_bytes, read_record


def entry(path: Path, *, mtime: bool = True) -> Json:
    data = path.read_bytes()
    reported: Json = {"path": path.name, "nbytes": len(data), "crc32": f"{crc32(data):08x}"}
    return reported | ({"mtimeNs": path.stat().st_mtime_ns} if mtime else {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a.pt").write_bytes(b"content")
    return tmp_path / "a.pt"


def test_what_was_not_touched_is_ours_without_being_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Holdings.of(file.parent, [{"files": [entry(file)]}])
    monkeypatch.setattr("ckpt2pt.publish.ledger.InputFile", None)
    assert held.is_ours("a.pt")


def test_a_copy_is_ours_by_its_digest(file: Path) -> None:
    held = Holdings.of(file.parent, [{"files": [entry(file)]}])
    os.utime(file)
    assert held.is_ours("a.pt")


@pytest.mark.parametrize(
    "change", [b"", b"longer content", b"CONTENT", None], ids=["empty", "longer", "same-size", "link"]
)
def test_what_was_changed_is_not_ours(change: bytes | None, file: Path) -> None:
    held = Holdings.of(file.parent, [{"files": [entry(file, mtime=False)]}])
    if change is None:
        file.rename(file.parent / "b.pt")
        file.symlink_to("b.pt")
    else:
        file.write_bytes(change)
    assert not held.is_ours("a.pt")


@pytest.mark.parametrize(
    "files", [None, 7, ["a.pt"], [{"path": "a.pt"}], [{"path": "a.pt", "nbytes": "7", "crc32": 1}]]
)
def test_a_record_of_another_shape_lists_nothing(files: object, file: Path) -> None:
    assert not Holdings.of(file.parent, [{"files": files}]).is_ours("a.pt")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    found = Ledger(
        folder=tmp_path,
        claim=tmp_path / "claim.json",
        identity="me",
        writing=tmp_path / "writing.json",
        record=tmp_path / "record.json",
        hint="choose another",
    )
    publish_bytes(found.claim, seal({"identity": "me"}))
    return found


def test_names_are_in_a_record_before_they_appear(ledger: Ledger) -> None:
    path = ledger.folder / "a.pt"
    ledger.announce([{"path": "a.pt", "nbytes": 3, "crc32": f"{crc32(b'new'):08x}"}])
    path.write_bytes(b"new")  # and killed here
    assert Holdings.of(ledger.folder, [ledger.writing]).is_ours("a.pt")
    ledger.announce([{"path": "a.pt", "nbytes": 5, "crc32": "00000000"}])
    assert Holdings.of(ledger.folder, [ledger.writing]).is_ours("a.pt"), "killed before it was replaced"
    ledger.publish({"files": [entry(path)]})
    assert not ledger.writing.exists()
    assert Holdings.of(ledger.folder, [ledger.record]).is_ours("a.pt")


def test_a_name_that_is_somebody_elses_does_not_appear(ledger: Ledger) -> None:
    (ledger.folder / "a.pt").write_bytes(b"theirs")
    with pytest.raises(UsageError, match=r"a\.pt is there, which ckpt2pt did not write"):
        ledger.announce([{"path": "a.pt", "nbytes": 3, "crc32": "00000000"}])
    assert not ledger.writing.exists()


def test_whoever_was_taken_over_from_writes_nothing(ledger: Ledger) -> None:
    publish_bytes(ledger.claim, seal({"identity": "other", "host": "node-7"}))
    for act in (ledger.fence, lambda: ledger.announce([]), lambda: ledger.publish({})):
        with pytest.raises(TryAgainError, match=r"another run took the folder over .*node-7"):
            act()
    assert read_record(ledger.record) is None
    ledger.claim.unlink()
    with pytest.raises(TryAgainError, match="took the folder over"):
        ledger.fence()
