"""The real kstatus, and Argo CD's own Lua: one small Go program (``tests/judges/kstatus``), built once into the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helm import MissingError, cache_root, locked

SOURCE = Path(__file__).parents[1] / "judges" / "kstatus"


def kstatus(objects: Sequence[dict[str, Any]]) -> list[str]:
    """What kstatus says of each object: InProgress, Failed, Current, Terminating; ``MissingError`` where there is no Go."""
    return _ask(objects)


def argo_health(script: Path, objects: Sequence[dict[str, Any]]) -> list[str]:
    """``status: message`` of each object, by a health script of Argo CD; ``MissingError`` where there is no Go."""
    return _ask(objects, script)


def _ask(objects: Sequence[dict[str, Any]], *words: Path) -> list[str]:
    lines = "".join(json.dumps(each) + "\n" for each in objects)
    done = subprocess.run([_program(), *words], input=lines, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == len(objects), done.stdout
    return answers


def _program() -> Path:
    digest = hashlib.sha256(b"".join((SOURCE / name).read_bytes() for name in ("main.go", "go.mod", "go.sum")))
    program = cache_root() / f"kstatus-{digest.hexdigest()[:12]}" / "kstatus"
    if program.exists():
        return program
    if shutil.which("go") is None:
        raise MissingError("Go is not installed to build the judge of kstatus; install Go")
    with locked(program.parent):
        if not program.exists():
            partial = program.with_suffix(".partial")
            words = ["go", "-C", str(SOURCE), "build", "-mod=readonly", "-trimpath", "-o", str(partial), "."]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"go build of {SOURCE} failed: {done.stderr.strip()[-2000:]}")
            partial.rename(program)
    return program
