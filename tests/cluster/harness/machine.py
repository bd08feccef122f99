"""What the machine has to offer, and commands run on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "openssl": "openssl",
    "ip": "iproute2",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
}
"""Program -> the Debian package it comes in; what a node is made of."""

IMAGE_PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}
"""What images are built with."""


class Unavailable(Exception):
    """This machine cannot run a cluster; the message says what it lacks.  Tests are reported as skipped."""


class ClusterError(Exception):
    """The cluster, or a command on it, failed."""


def run(
    *words: str | Path, env: Mapping[str, str] | None = None, stdin: str | None = None, seconds: float = 600
) -> str:
    """Run a command to its end; its standard output.  A failure is raised with what the command said."""
    done = subprocess.run(
        [str(word) for word in words],
        env={**os.environ, **(env or {})},
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        command = " ".join(str(word) for word in words)
        raise ClusterError(f"exit {done.returncode}: {command}\n{(done.stderr or done.stdout)[-4000:].strip()}")
    return done.stdout


def succeeds(*words: str | Path) -> bool:
    """Whether a command is there and ends with exit code 0."""
    if not shutil.which(str(words[0])):
        return False
    return subprocess.run([str(word) for word in words], capture_output=True, check=False).returncode == 0


def wait_until(what: str, holds: Callable[[], bool], *, seconds: float = 60, every: float = 0.25) -> None:
    """Ask again and again until ``holds``; :class:`ClusterError` names ``what`` was waited for in vain."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:.0f} s for {what}")
        time.sleep(every)


def cache_folder() -> Path:
    """Where built binaries and images are kept from one run to the next."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "ckpt2pt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_node() -> None:
    """Have everything a node is made of, installing packages where that is possible."""
    if os.geteuid() != 0:
        raise Unavailable(
            "a node needs root (network namespaces, cgroups, mounts); CKPT2PT_KUBECONFIG names a cluster to use instead"
        )
    if not _is_there("kubectl"):
        raise Unavailable("kubectl is not installed")
    require(PACKAGES)


def require(packages: Mapping[str, str]) -> None:
    """Have these programs, from apt if need be."""
    missing = sorted({package for program, package in packages.items() if not _is_there(program)})
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable(f"{', '.join(missing)} missing, and only root can install them, with apt-get")
    _install(missing)


def require_go() -> str:
    """The Go tool chain."""
    go = shutil.which("go") or shutil.which("/usr/local/go/bin/go")
    if not go:
        raise Unavailable("Go (1.26 or newer) is not installed; Kubernetes is built with it")
    return go


def _is_there(program: str) -> bool:
    return shutil.which(program) is not None


def _install(packages: Sequence[str]) -> None:
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    # Debian starts a daemon as soon as it is installed; the cluster runs a containerd of its own.
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *packages]
    try:
        run(*install, env=env)
    except ClusterError:
        try:
            run("apt-get", "update", "--quiet")
            run(*install, env=env)
        except ClusterError as error:
            raise Unavailable(f"apt-get cannot install {' '.join(packages)}: {error}") from error
