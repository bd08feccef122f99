"""One cluster for all who test at the same time: the last to leave takes it down."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.cluster import LEFT_RUNNING, OF_THE_SUITE, Cluster

KUBECONFIG = "CKPT2PT_KUBECONFIG"
"""Names the kubeconfig of a cluster to use as it is."""


def given_kubeconfig() -> Path | None:
    """The kubeconfig of a cluster that is not ours to manage; ``None`` if none is named, or one of ours."""
    given = os.environ.get(KUBECONFIG)
    ours = {Cluster(index).kubeconfig for index in (LEFT_RUNNING, OF_THE_SUITE)}
    return Path(given) if given and Path(given) not in ours else None


@contextmanager
def suite_cluster() -> Iterator[Cluster]:
    """The cluster that ``make cluster`` left, else one that is started now and stopped by its last user."""
    left = Cluster(LEFT_RUNNING)
    if left.is_running:
        left.wait_ready()
        yield left
        return
    own = Cluster(OF_THE_SUITE)
    with _lock("users") as users:
        try:
            with _lock("change") as change:
                fcntl.flock(change, fcntl.LOCK_EX)
                fcntl.flock(users, fcntl.LOCK_SH)
                own.up()
            yield own
        finally:
            take_down_unused(users)


def take_down_unused(users: int | None = None) -> bool:
    """End the suite's cluster unless somebody else uses it; whether it was ended."""
    with _lock("users") as other, _lock("change") as change:
        fcntl.flock(change, fcntl.LOCK_EX)
        try:
            fcntl.flock(other if users is None else users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        Cluster(OF_THE_SUITE).down()
        return True


@contextmanager
def _lock(name: str) -> Iterator[int]:
    """A file to lock; its locks end with the process, however that ends."""
    file = os.open(Path(tempfile.gettempdir()) / f"ckpt2pt-cluster.{name}", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        yield file
    finally:
        os.close(file)
