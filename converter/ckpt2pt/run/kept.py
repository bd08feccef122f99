"""What an earlier run made of a rank, and whether it stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.request import Verify
from ckpt2pt.engine.readback import is_whole
from ckpt2pt.io.records import Json
from ckpt2pt.publish import Target
from ckpt2pt.publish.unchanged import changed_file, not_as_written

PROOFS: Mapping[str, int] = {"none": 0, "digest": 1, "full": 2}
"""How thoroughly a rank was verified, in this order."""


def is_kept(target: Target, rank: Rank, verify: Verify, *, overwrite: bool, reread: bool) -> bool:
    """Whether what an earlier run made of a rank stays: it was verified as thoroughly as is asked for now, and is as it was written.

    That is known by size and time of each file, and by its bytes where the time is another one.  Every byte is read where
    that is asked for (``reread``), and where a result in its place is replaced, which keeps what is right to the last bit.
    Raises :class:`VerificationError` for other bytes in a file that nothing else tells of.
    """
    manifest = target.rank_manifest(*rank)
    if manifest is None or PROOFS.get(str(manifest.get("verified")), -1) < PROOFS[verify]:
        return False
    replaces = overwrite and not target.beside
    if not replaces and changed_file(target, manifest):
        return False  # planned again, which refuses to replace it
    if not (replaces or reread):
        return True
    damaged = next((name for name, crc in _listed(manifest) if not is_whole(target.folder / name, crc)), "")
    if damaged and not replaces:
        raise not_as_written(target, damaged, rank)
    return not damaged


def _listed(manifest: Json) -> list[tuple[str, int]]:
    return [(str(file["path"]), int(str(file["crc32"]), 16)) for file in cast("list[Json]", manifest["files"])]
