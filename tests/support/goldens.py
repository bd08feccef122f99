"""Where the golden checkpoints lie: a folder given by hand, the full collection beside the checkout, or the archives committed here."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
COMMITTED = REPOSITORY / "tests" / "golden"
UNPACKED = REPOSITORY / "build" / "golden"


@cache
def golden_root() -> Path:
    """The folder that holds ``megatron06/`` and ``mindspore/``.

    ``$CKPT2PT_GOLDEN`` if set, else ``shared/golden`` beside the checkout if it is there, else the committed
    archives, unpacked once under ``build/``.
    """
    given = os.environ.get("CKPT2PT_GOLDEN")
    if given:
        return Path(given)
    beside = REPOSITORY.parent / "shared" / "golden"
    return beside if beside.is_dir() else unpack_committed()


def golden_sets() -> list[Path]:
    """The folders of the Megatron 0.6 sets that are at hand, in the order of their names."""
    return sorted(folder for folder in (golden_root() / "megatron06").iterdir() if folder.is_dir())


def unpack_committed() -> Path:
    """Unpack the archives of ``tests/golden``; what is there already is not unpacked again.

    The target is named by the content of the archives and appears by rename, so parallel test workers and an
    interrupted run do each other no harm.
    """
    archives = sorted(COMMITTED.rglob("*.tar.xz"))
    digest = hashlib.sha256(b"".join(archive.read_bytes() for archive in archives)).hexdigest()[:12]
    target = UNPACKED / digest
    if target.is_dir():
        return target
    UNPACKED.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=UNPACKED))
    for archive in archives:
        folder = partial / archive.parent.relative_to(COMMITTED)
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            # Python 3.12 warns when no filter is chosen; 3.11.2, Debian's, has none to choose.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(folder)
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial)  # another worker was first
        if not target.is_dir():
            raise
    return target
