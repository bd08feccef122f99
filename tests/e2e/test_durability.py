"""Power fails at any moment, on a disk that keeps what it likes: what is said to be there is there, whole.

The system calls of a real run are replayed on a model of such a disk (``powerloss``), and what it may have kept is looked at.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from conversions import flags_for
from powerloss import Call, Disk, available, record

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TRACKER = "latest_checkpointed_iteration.txt"
EACH = 4
"""Outcomes of a power failure that are looked at after each call that changed something."""

DATA = {"write", "pwrite64", "fallocate", "ftruncate"}
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def checkpoint(golden: Path) -> Path:
    return golden / "megatron06" / "b_tp2pp2"


def convert(checkpoint: Path, target: Path, *more: str) -> list[str]:
    return command("convert", *flags_for(checkpoint, target), "--process-limit", "2", *more)


def import_back(checkpoint: Path, target: Path) -> list[str]:
    return command("import", "--megatron-path", str(checkpoint / "A"), "--ms-path", str(target), "--process-limit", "2")


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ckpt2pt", *words, "--progress", "none"]


def files_of(folder: Path) -> Files:
    """Whatever a reader of either framework may find: each file whose name is not hidden, nor in a hidden folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    visible = {
        str(path.relative_to(folder)): path for path in found if not path.relative_to(folder).as_posix().startswith(".")
    }
    return {name: path.read_bytes() for name, path in visible.items() if "/." not in name}


def replay(disk: Disk, calls: list[Call], folder: Path, dice: Random) -> Iterator[Path]:
    """Folders as power failures after each change may leave them."""
    for call in calls:
        # Between two writes of bytes little can go wrong: one of ten is enough.
        if disk.apply(call) and (call.name not in DATA or dice.random() < 0.1):
            for _ in range(EACH):
                shutil.rmtree(folder, ignore_errors=True)
                disk.crash(dice, folder)
                yield folder
    shutil.rmtree(folder, ignore_errors=True)
    disk.crash(dice, folder)  # after the end: else the dice decide whether a complete result is seen at all
    yield folder


def run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def recorded(command: list[str], root: Path) -> list[Call]:
    if not available():
        pytest.skip("strace is missing: `apt-get install strace`")
    return record(command, root.parent / "calls.log")


@pytest.mark.parametrize(
    ("words", "marker"),
    [pytest.param(convert, TRACKER, id="convert"), pytest.param(import_back, ".ckpt2pt/report.json", id="import")],
)
def test_nothing_is_published_that_a_power_failure_can_take(
    words: Callable[[Path, Path], list[str]], marker: str, checkpoint: Path, tmp_path: Path
) -> None:
    root = tmp_path / "volume"
    root.mkdir()
    disk, target = Disk(root), root / "some" / "out"
    calls = recorded(words(checkpoint, target), root)
    expected, dice, published, tries = files_of(target), Random(20261129), 0, 0
    for left in replay(disk, calls, tmp_path / "left", dice):
        result, tries = left / "some" / "out", tries + 1
        found = files_of(result)
        assert found.items() <= expected.items(), f"{sorted(found)}: not what was written"
        if (result / marker).exists():
            published += 1
            assert found == expected, f"{marker} is there without {sorted(set(expected) - set(found))}"
        if tries % 50 == 0:
            run(words(checkpoint, result))
            assert files_of(result) == expected, "the same command again did not complete it"
    real = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert disk.now() == real, "the model missed a call"
    assert published


def test_while_a_result_is_replaced_the_older_or_the_newer_one_is_there(checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "volume"
    target = root / "out"
    run(convert(checkpoint, target))
    older, disk = files_of(target), Disk(root)
    calls = recorded(convert(checkpoint, target, "--convert-param-only", "--overwrite"), root)
    newer, found = files_of(target), Files()
    assert newer != older
    for left in replay(disk, calls, tmp_path / "left", Random(20261129)):
        found = files_of(left / "out")
        assert found in (older, newer), f"{sorted(found)}: neither the older result nor the newer one"
    assert found == newer
