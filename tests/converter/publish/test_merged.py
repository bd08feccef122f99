"""Files that join those of all ranks: last, once, whatever dies or is at work beside, and never over files that are not right."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from zlib import crc32

import pytest

from ckpt2pt.errors import TargetConflictError, TryAgainError, VerificationError
from ckpt2pt.publish import TORCH_DIST, TRACKER, Target
from ckpt2pt.publish.files import partial_name
from ckpt2pt.publish.locks import locked
from ckpt2pt.publish.merged import publish_merged
from ckpt2pt.publish.unchanged import refuse_lost
from ckpt2pt.verification.prove import verify_records
from targets import Killed, dying, left_over

FILES = {"common.pt": b"common", "metadata.json": b"{}", ".metadata": b"which chunk lies where"}
STAGES = 3


@pytest.fixture
def target(tmp_path: Path) -> Target:
    found = Target(root=tmp_path / "out", iteration=500, identity="me", stages=STAGES, tensor=1, kind=TORCH_DIST)
    return replace(found, ranks=dict.fromkeys(((0, pp) for pp in range(STAGES)), "me"))


def finish(target: Target, *stages: int, repair: bool = False) -> None:
    target.claim({}, overwrite=False)
    for pp in stages:
        name, content = f"__{pp}_0.distcp", b"chunks of stage %d" % pp
        entry = {"path": name, "nbytes": len(content), "crc32": f"{crc32(content):08x}"}
        target.ledger((0, pp), repair=repair).announce([entry])
        (target.folder / name).write_bytes(content)
        entry |= {"mtimeNs": (target.folder / name).stat().st_mtime_ns}
        target.publish_rank(0, pp, {"tp": 0, "pp": pp, "files": [entry]})
        target.publish_stage(pp, {})


def merge(_: Target) -> Mapping[str, bytes]:
    return FILES


def publish(target: Target, *, repair: bool = False) -> bool:
    return target.publish_iteration(join=partial(publish_merged, merge, repair=repair))


def there(target: Target) -> dict[str, bytes]:
    return {name: (target.folder / name).read_bytes() for name in FILES if (target.folder / name).exists()}


def test_they_come_when_every_stage_is_there(target: Target) -> None:
    finish(target, 0, 2)
    assert not publish(target)
    assert not there(target)
    finish(target, 1)
    assert publish(target)
    assert there(target) == FILES
    assert (target.root / TRACKER).read_text() == "500"
    report = verify_records(target.root)
    assert report.differences == ()


def test_a_second_finisher_changes_nothing(target: Target) -> None:
    finish(target, *range(STAGES))
    assert publish(target)
    before = {name: (target.folder / name).stat().st_ino for name in FILES}
    assert publish(target)
    assert {name: (target.folder / name).stat().st_ino for name in FILES} == before


def test_a_run_that_dies_anywhere_leaves_what_the_next_completes(target: Target) -> None:
    at = steps = 0
    while at <= steps + 1:
        one = replace(target, root=target.root / str(at))
        finish(one, *range(STAGES))
        with dying(at) as calls:
            with suppress(Killed):
                publish(one)
            steps = calls()
        if (one.root / TRACKER).exists():
            assert there(one) == FILES
        if ".metadata" in there(one):
            assert there(one) == FILES, "the last one makes a checkpoint of the others"
        assert publish(one)
        assert there(one) == FILES
        assert left_over(one) == []
        assert not list(one.state.glob("writing-*"))
        at += 1
    assert at > 8, f"it died at {at} steps"


def test_two_processes_that_finish_at_once_both_find_it_published(target: Target) -> None:
    finish(target, *range(STAGES))
    children: list[int] = []
    for _ in range(4):
        child = os.fork()
        if not child:
            try:
                os._exit(0 if publish(target) else 1)
            finally:
                traceback.print_exc()
                os._exit(2)  # whatever was raised: the rest of the tests is not this process's
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert there(target) == FILES
    assert left_over(target) == []


def test_kill_9_between_the_files_leaves_no_tracker(target: Target) -> None:
    finish(target, *range(STAGES))
    child = os.fork()
    if not child:
        real = Path.replace

        def killed(self: Path, to: Path) -> Path:
            if to.name == ".metadata":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, to)

        Path.replace = killed  # type: ignore[method-assign, assignment]
        try:
            publish(target)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert set(there(target)) == {"common.pt", "metadata.json"}
    assert not (target.root / TRACKER).exists()
    assert publish(target)
    assert there(target) == FILES
    assert left_over(target) == []


@pytest.mark.parametrize("damage", ["lost", "cut", "changed", "changed-and-set-back"])
def test_a_file_that_is_not_as_it_was_written_is_found_before_anything_joins_it(damage: str, target: Target) -> None:
    finish(target, *range(STAGES))
    path = target.folder / "__1_0.distcp"
    seen = path.stat()
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(path.read_bytes().swapcase())
    if damage == "changed-and-set-back":
        os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))
    if damage in {"lost", "cut"}:
        assert not publish(target)
        with pytest.raises(TryAgainError, match="removed or cut") as refused:
            refuse_lost(target)
        assert "stage 1" in refused.value.hint
    else:
        with pytest.raises(VerificationError, match="not as it was written") as changed:
            publish(target)
        assert str(path) in str(changed.value.where)
    assert not there(target)
    assert not (target.root / TRACKER).exists()
    finish(target, 1, repair=True)  # converted again
    assert publish(target)


def test_a_file_that_was_only_touched_is_read_and_right(target: Target) -> None:
    finish(target, *range(STAGES))
    os.utime(target.folder / "__1_0.distcp", ns=(1, 1))
    assert publish(target)


def test_stages_that_wait_for_others_have_lost_nothing(target: Target) -> None:
    finish(target, 0)
    assert not publish(target)
    refuse_lost(target)


def test_what_ckpt2pt_did_not_write_is_not_replaced(target: Target) -> None:
    finish(target, *range(STAGES))
    (target.folder / "common.pt").write_bytes(b"somebody's")
    for repair in (False, True):
        with pytest.raises(TargetConflictError, match=r"common\.pt"):
            publish(target, repair=repair)
    assert (target.folder / "common.pt").read_bytes() == b"somebody's"
    assert not (target.root / TRACKER).exists()


def test_one_that_was_changed_is_found_and_repaired_when_asked_for(target: Target) -> None:
    finish(target, *range(STAGES))
    assert publish(target)
    (target.folder / ".metadata").write_bytes(b"x" * len(FILES[".metadata"]))
    [difference] = verify_records(target.root).differences
    assert (difference.file, difference.problem) == (".metadata", "has another CRC-32")
    with pytest.raises(TargetConflictError, match=r"\.metadata"):
        publish(target)
    assert publish(target, repair=True)
    assert there(target) == FILES


def test_what_is_there_besides_is_reported(target: Target) -> None:
    finish(target, *range(STAGES))
    assert publish(target)
    (target.folder / "__9_0.distcp").write_bytes(b"")
    [difference] = verify_records(target.root).differences
    assert difference.file == "__9_0.distcp"


def test_what_another_run_writes_of_the_tracker_stays(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its temporary file lies in the folder of both; only whoever has the lock of the tracker may remove what is left."""
    finish(target, *range(STAGES))
    theirs = partial_name(target.state / TRACKER)
    theirs.write_bytes(b"500")
    monkeypatch.setattr("ckpt2pt.publish.target.WAIT_SECONDS", 0.0)
    with locked(target.root / f".{TRACKER}.lock", "writing the tracker"):
        with pytest.raises(TryAgainError, match="writing the tracker"):
            publish(target)
        assert theirs.exists()
    assert publish(target)
    assert not theirs.exists()
