"""A registry on this machine, in the place of the user's own; buildah and the node speak to it without TLS."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import images
from harness.machine import UnavailableError, succeeds, wait_until
from helm import MissingError, crane


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry that runs."""

    address: str

    def export(self, image: str, platform: str) -> bytes:
        """The files of an image for one architecture, as a tar."""
        return subprocess.check_output([crane(), "export", "--platform", platform, f"{self.address}/{image}", "-"])


@contextmanager
def registry() -> Iterator[Registry]:
    """An empty one, gone afterwards with all that was pushed."""
    try:
        program = crane()
    except MissingError as error:
        raise UnavailableError(str(error)) from error
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"localhost:{free.getsockname()[1]}"  # containerd speaks plain HTTP with what is called so
    with tempfile.TemporaryDirectory() as scratch:
        serve = [str(program), "registry", "serve", "--address", address, "--disk", scratch]
        with subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                wait_until("the registry", lambda: succeeds(program, "catalog", address), seconds=30)
                yield Registry(address)
            finally:
                process.terminate()


def checkout(folder: Path) -> Path:
    """A copy of this checkout, as a user has one."""
    listed = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=images.REPOSITORY
    )
    there = b"\0".join(
        name for name in listed.split(b"\0") if name and (images.REPOSITORY / os.fsdecode(name)).exists()
    )
    copy = ["tar", "--create", "--null", "--files-from=-"]
    packed = subprocess.run(copy, cwd=images.REPOSITORY, input=there, capture_output=True, check=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "--extract"], cwd=folder, input=packed, check=True)
    return folder
