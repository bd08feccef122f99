"""The door: what comes before the command line is there."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt2pt.core.topology import Topology
from handmade import Handmade

# Sends itself a signal in the midst of the imports.
INTERRUPTED = """
import importlib.abc, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from ckpt2pt import __main__ as door

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "ckpt2pt.cli.options":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Interrupting())
sys.exit(door.{program}())
"""


@pytest.mark.parametrize("program", ["main", "kubectl"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_during_the_imports_ends_with_75_and_a_hint(number: signal.Signals, program: str) -> None:
    script = INTERRUPTED.format(number=int(number), program=program)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith("ckpt2pt: stopped by a signal")
    assert "Traceback" not in done.stderr


@pytest.fixture
def convert(tmp_path: Path) -> str:
    """A conversion into ``out``, for a shell in ``tmp_path``."""
    made = Handmade(topology=Topology(num_layers=2))
    request = made.write(tmp_path)
    paths = {"ms-path": request.source, "param-map-path": request.metadata, "megatron-path": tmp_path / "out"}
    words = [sys.executable, "-m", "ckpt2pt", "convert", "--num-layers", "2", "--multiprocess-off"]
    return shlex.join([*words, *(f"--{flag}={path}" for flag, path in paths.items())])


@pytest.mark.parametrize(
    ("streams", "code"),
    [
        pytest.param(">/dev/full", 74, id="no-room-for-the-result"),
        pytest.param("2>/dev/full", 0, id="no-room-for-logs"),
        pytest.param("2>&1 >/dev/null | true", 0, id="nobody-reads-the-logs"),
        pytest.param("2>&-", 0, id="no-stderr"),
        pytest.param(">&- 2>&- <&-", 0, id="no-streams-at-all"),
    ],
)
def test_streams_that_cannot_be_written_to_end_as_documented(
    streams: str, code: int, convert: str, tmp_path: Path
) -> None:
    script = f"set -o pipefail; {convert} {streams}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("the result could not be written" in done.stderr) == (code == 74)
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "12"


@pytest.mark.parametrize(
    "locale", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_a_path_that_stdout_cannot_spell_is_reported_nevertheless(
    locale: dict[str, str], convert: str, tmp_path: Path
) -> None:
    words = [*shlex.split(convert), "--megatron-path", str(tmp_path / "öut")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **locale})
    assert done.returncode == 0, done.stderr
    assert r"\xf6ut/iter_0000012" in done.stdout


def test_nothing_of_ours_is_imported_before_signals_are_handled() -> None:
    script = "import sys; import ckpt2pt.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    found = done.stdout.split()
    assert [name for name in found if name.startswith("ckpt2pt")] == ["ckpt2pt", "ckpt2pt.__main__"]
    assert not {"argparse", "ctypes", "logging", "threading"}.intersection(found)
