"""What killed runs left beside a result: older ones that were being removed, and replacements that were never completed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ckpt2pt.errors import TryAgainError
from ckpt2pt.io.paths import listing
from ckpt2pt.publish.files import STATE, read_record
from ckpt2pt.publish.kinds import CLAIM
from ckpt2pt.publish.locks import locked
from ckpt2pt.publish.retire import REMOVED, remove_ours, retire
from ckpt2pt.publish.swap import NEW, OLD


@contextmanager
def nobody_at_work(state: Path) -> Generator[bool]:
    """Hold every stage that a run has begun here, so that none is at it; False where the file system cannot prove it."""
    with ExitStack() as locks:
        held = [
            locks.enter_context(locked(path, "converting a stage of what is to be replaced"))
            for path in listing(state, "stage-*.lock")
        ]
        yield all(lock.proved for lock in held)


def sweep_leftovers(near: Sequence[Path], mine: Path, *, replacing: bool) -> None:
    """Remove them; call with the claim's lock held.  ``mine`` stays while this run is ``replacing`` a result by it.

    What somebody is at work in stays, and a run that replaces a result has to wait for it.
    """
    for path in near:
        if path.suffix == REMOVED:
            remove_ours(path)
        elif path.suffix == OLD or (path.suffix == NEW and not _holds_a_replacement(path)):
            retire(path)  # an older result, whose exchange was killed before this
        elif path.suffix == NEW and not (replacing and path == mine):
            try:
                with nobody_at_work(path / STATE) as proved:
                    if replacing or proved:
                        retire(path)
            except TryAgainError:
                if replacing:
                    raise


def _holds_a_replacement(path: Path) -> bool:
    """Whether the folder holds what its name says, and not the result that was exchanged for it."""
    claim = read_record(path / STATE / CLAIM) or {}
    return str(claim.get("identity")).startswith(path.stem.rpartition(".")[2])
