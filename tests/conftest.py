"""Fixtures for every room: the golden checkpoints and the comparison with committed golden text."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from goldens import golden_root, golden_sets
from markers import marked, marked_files
from torchtests import needs_torch

SYNCED = frozenset({"engine", "io", "publish"})
HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no module that has no test in this half of `make test`, which runs what needs no torch first and may install it then.

    Collecting all of them takes longer than many of the tests.
    """
    half = str(config.getoption("markexpr"))
    if not collection_path.name.startswith("test_") or collection_path.suffix != ".py":
        return None
    if needs_torch(collection_path):
        return True if not HAS_TORCH or half.startswith("not torch") else None
    return True if half.startswith("torch") and "mark.torch" not in collection_path.read_text("utf-8") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs torch, and skip it where torch is not installed."""
    for item in items:
        if needs_torch(item.path):
            item.add_marker("torch")
        if not HAS_TORCH and item.get_closest_marker("torch"):
            item.add_marker(pytest.mark.skip(reason="torch is not installed: `make judges`"))


def pytest_collection_finish() -> None:
    """Take what was imported out of the sight of the garbage collector: each rank ends with a full collection, of which torch's
    million objects would be nearly all."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool | None, bool | None]:
    """Wait for the disk only in the rooms that read past the page cache or tell of a sync that failed: elsewhere no test can
    see whether the machine would keep a file, and waiting is half of the time.  A closed descriptor is refused still."""
    with pytest.MonkeyPatch.context() as patch:
        if SYNCED.isdisjoint(item.path.parts):
            patch.setattr(os, "fsync", os.fstat)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def captured_without_markers() -> Iterator[None]:
    """Whatever a test reads of a program's output names options as a user knows them."""
    read, run = pytest.CaptureFixture.readouterr, subprocess.run

    def readouterr(self: pytest.CaptureFixture[str]) -> object:
        found = read(self)
        assert not marked(f"{found.out}{found.err}")
        return found

    def checked(*words: Any, **options: Any) -> Any:
        done = run(*words, **options)
        assert not marked(f"{done.stdout}{done.stderr}")
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytest.CaptureFixture, "readouterr", readouterr)
        patch.setattr(subprocess, "run", checked)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """The same of what it has not read, and of the files that it leaves."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if call.when == "call" and report.passed:
        found = [*marked(report.capstdout + report.capstderr), *(marked_files(folder) if folder else ())]
        if found:
            report.outcome, report.longrepr = "failed", f"names of options that no edge has spelled: {found}"
    return report


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder that holds the golden data: ``megatron06/<set>/`` and ``mindspore/``."""
    return golden_root()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``golden_set`` runs once for each Megatron 0.6 set that is at hand."""
    if "golden_set" in metafunc.fixturenames:
        sets = golden_sets()
        metafunc.parametrize("golden_set", sets, ids=[folder.name for folder in sets], scope="session")


@pytest.fixture
def assert_golden() -> Callable[[str, Path], None]:
    """Compare text with a committed file; ``GOLDEN=update pytest`` rewrites the file, to be reviewed as a diff."""

    def compare(text: str, path: Path) -> None:
        if os.environ.get("GOLDEN") == "update":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing; GOLDEN=update pytest writes it"
        assert text == path.read_text(encoding="utf-8"), f"differs from {path.name}; if meant: GOLDEN=update pytest"

    return compare


@pytest.fixture
def unexpected() -> Iterator[Path]:
    """A folder for files that this process then does not own; pytest's own folders are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder
        os.seteuid(os.getuid())
