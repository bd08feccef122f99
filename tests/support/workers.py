"""Local workers for tests: a stand-in for ``python -m ckpt2pt``, and a look at the processes of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Index N at its try T does what the line "N T ..." of the script says: prints, waits, ends with a code or a signal.
# It leaves the report of a worker that has done its stage, unless the script gives it another word, or none.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

here = Path(__file__).parents[1]
index = os.environ["JOB_COMPLETION_INDEX"]
tries = here / f"tries-{index}"
with tries.open("a") as file:
    file.write(json.dumps({"args": sys.argv[1:], "parent": os.environ.get("CKPT2PT_PARENT")}) + "\\n")
number = str(len(tries.read_text().splitlines()))
running = here / f"running-{index}"
running.touch()
last_word = Path(sys.argv[sys.argv.index("--termination-log") + 1])
done = {"version": 1, "exitCode": 0, "reason": "Converted", "stages": [int(index)], "iteration": 5, "verified": "digest"}
last_word.write_text(json.dumps(done))
(here / f"seen-{index}-{number}").write_text(str(len(list(here.glob("running-*")))))
try:
    for line in (here / "script").read_text().splitlines():
        which, attempt, verb, *rest = line.split(maxsplit=3)
        text = rest[0] if rest else ""
        if which not in {index, "*"} or attempt not in {number, "*"}:
            continue
        if verb == "err":
            print(text, file=sys.stderr, flush=True)
        elif verb == "out":
            print(text, flush=True)
        elif verb == "word":
            last_word.write_text(text)
        elif verb == "mute":
            last_word.unlink()
        elif verb == "sleep":
            time.sleep(float(text))
        elif verb == "kill":
            running.unlink()
            os.kill(os.getpid(), getattr(signal, text))
            time.sleep(60)
        elif verb == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif verb == "exit":
            if last_word.read_text() == json.dumps(done):
                last_word.unlink()
            sys.exit(int(text))
finally:
    running.unlink(missing_ok=True)
"""


def stand_in(folder: Path, *script: str) -> Path:
    """A package that shadows ckpt2pt in child processes whose PYTHONPATH begins with ``folder``."""
    package = folder / "ckpt2pt"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    (folder / "script").write_text("\n".join(script))
    return folder


def children(parent: int) -> list[int]:
    """Processes whose parent is ``parent``."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything; what follows it is state and parent.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and not only waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], T], seconds: float = 20) -> T:
    """The first true answer of ``condition``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s in vain, as process {os.getpid()}")
