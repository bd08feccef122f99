"""The distribution as a user gets it: what the wheel holds, and the command it installs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ckpt2pt import __version__
from goldens import REPOSITORY

COMMAND = Path(sys.executable).with_name("ckpt2pt")


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*words], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "door", [pytest.param([str(COMMAND)], id="script"), pytest.param([sys.executable, "-m", "ckpt2pt"], id="module")]
)
def test_both_doors_tell_the_version(door: list[str]) -> None:
    done = call(*door, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == __version__


def test_help_names_every_command_and_an_unknown_one_is_wrong_usage() -> None:
    done = call(str(COMMAND), "--help")
    assert done.returncode == 0, done.stderr
    for command in ("convert", "plan", "inspect", "verify", "run"):
        assert command in done.stdout
    refused = call(str(COMMAND), "transmogrify")
    assert refused.returncode == 64
    assert "Traceback" not in refused.stderr


def test_wheel_holds_both_packages_typed_and_nothing_else(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {
        "ckpt2pt",
        "ckpt2pt_operator",
        f"ckpt2pt-{__version__}.dist-info",
    }
    assert {"ckpt2pt/py.typed", "ckpt2pt_operator/py.typed", "ckpt2pt/cli.py"} <= names
