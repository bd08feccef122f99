"""A process ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from workers import alive, wait_for

CHILD = """
import os, signal, sys, time
from ckpt2pt.io.parent import end_with
time.sleep(float(sys.argv[2]))
end_with(int(sys.argv[1]), signal.SIGKILL)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("late", [0.0, 0.5], ids=["reported-in-time", "gone-before"])
def test_it_ends_however_its_parent_ended(late: float, tmp_path: Path) -> None:
    words = [sys.executable, "-c", PARENT, CHILD, str(late)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        if not late:
            assert parent.stdout.readline() == "ready\n"
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not alive(child))
