"""The door: what comes before the command line is there."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# Sends itself a signal in the midst of the imports.
INTERRUPTED = """
import importlib.abc, os, sys
from ckpt2pt import __main__ as door

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "ckpt2pt.options":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Interrupting())
sys.exit(door.{program}())
"""


@pytest.mark.parametrize("program", ["main", "kubectl"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_during_the_imports_ends_with_75_and_a_mend(number: signal.Signals, program: str) -> None:
    script = INTERRUPTED.format(number=int(number), program=program)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith("ckpt2pt: stopped by a signal")
    assert "Traceback" not in done.stderr


def test_nothing_of_ours_is_imported_before_signals_are_heard() -> None:
    script = "import sys; import ckpt2pt.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    found = done.stdout.split()
    assert [name for name in found if name.startswith("ckpt2pt")] == ["ckpt2pt", "ckpt2pt.__main__"]
    assert not {"argparse", "ctypes", "logging", "threading"}.intersection(found)
