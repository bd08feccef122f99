"""Real helm, version 3 and 4, and what goes with it, built once from the Go module proxy into the cache: ``python tests/support/helm.py``.

``helm("v3")`` is the path of the program; tests and the cluster suite run it as it is.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

VERSIONS = {"v3": "v3.22.0", "v4": "v4.3.1"}
"""The one place that says which."""

DOCS_VERSION = "v1.14.2"
"""Of helm-docs, which writes the chart's README."""

ACTIONLINT_VERSION = "v1.7.12"
"""Of actionlint, which checks the workflow of a release."""

CRANE_VERSION = "v0.22.1"
"""Of crane, which serves a registry of images."""

_MODULES = {
    **{f"helm-{version}": f"helm.sh/helm/{major}/cmd/helm@{version}" for major, version in VERSIONS.items()},
    f"helm-docs-{DOCS_VERSION}": f"github.com/norwoodj/helm-docs/cmd/helm-docs@{DOCS_VERSION}",
    f"actionlint-{ACTIONLINT_VERSION}": f"github.com/rhysd/actionlint/cmd/actionlint@{ACTIONLINT_VERSION}",
    f"crane-{CRANE_VERSION}": f"github.com/google/go-containerregistry/cmd/crane@{CRANE_VERSION}",
}


class MissingError(Exception):
    """The program is not there and cannot be built; the message says why and what to do."""


def cache_root() -> Path:
    """``${XDG_CACHE_HOME:-~/.cache}/ckpt2pt``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckpt2pt"


def helm(major: str = "v4") -> Path:
    """The program ``helm`` of major version ``v3`` or ``v4``, built if need be; ``MissingError`` where there is no Go."""
    return _program(f"helm-{VERSIONS[major]}")


def helm_docs() -> Path:
    """The program ``helm-docs``, built if need be; ``MissingError`` where there is no Go."""
    return _program(f"helm-docs-{DOCS_VERSION}")


def actionlint() -> Path:
    """The program ``actionlint``, built if need be; ``MissingError`` where there is no Go."""
    return _program(f"actionlint-{ACTIONLINT_VERSION}")


def crane() -> Path:
    """The program ``crane``, built if need be; ``MissingError`` where there is no Go."""
    return _program(f"crane-{CRANE_VERSION}")


def _program(name: str) -> Path:
    module = _MODULES[name]
    program = cache_root() / name / module.partition("@")[0].rpartition("/")[2]
    if program.exists():
        return program
    if shutil.which("go") is None:
        raise MissingError(
            f"{name} is not in {program.parent} and Go is not installed to build it; install Go, then: make helm"
        )
    with locked(program.parent):
        if not program.exists():
            _build(module, program)
    return program


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """A folder of the cache, made if need be, for one process: several test workers ask at the same time, and one builds."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(module: str, program: Path) -> None:
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        done = subprocess.run(
            ["go", "install", "-trimpath", "-ldflags=-s -w", module],
            env={**os.environ, "GOBIN": folder, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"go install {module} failed: {done.stderr.strip()[-2000:]}")
        (Path(folder) / program.name).rename(program)


def main() -> int:
    """Build all of them; where there is no Go, say so and go on without."""
    for name in _MODULES:
        started = time.monotonic()
        try:
            program = _program(name)
        except MissingError as reason:
            sys.stderr.write(f"skipped: {reason}\n")
            continue
        sys.stdout.write(f"{name}: {program} ({time.monotonic() - started:.0f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
