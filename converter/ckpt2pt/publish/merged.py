"""Files that join those of all ranks into one checkpoint: written when every rank is there, before report and tracker.

__0_0.distcp ... __N_0.distcp   complete, as their manifests say   -->   common.pt, metadata.json, .metadata   -->   merged.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import TryAgainError, VerificationError
from ckpt2pt.io.checksums import crc32
from ckpt2pt.io.records import Json
from ckpt2pt.publish.files import publish_bytes, read_small, sweep_partials
from ckpt2pt.publish.kinds import CLAIM, MERGED, WRITING_MERGED
from ckpt2pt.publish.ledger import Holdings, Ledger
from ckpt2pt.publish.target import Target

Merge = Callable[[Target], Mapping[str, bytes]]
"""Makes the files, in the order in which they are to appear; the last one makes a checkpoint of the others."""


def publish_merged(merge: Merge, target: Target, *, repair: bool) -> None:
    """Prove that the files of all ranks are as they were written, and write those that join them.

    Call with the claim's lock held: of two that finish at once, the second finds what the first wrote.  Raises
    :class:`VerificationError` for a file that was changed since.
    """
    _prove_unchanged(target)
    files = merge(target)
    ledger = _ledger(target, repair=repair)
    for folder, names in ((target.folder, files), (target.state, (WRITING_MERGED, MERGED))):
        for name in names:
            sweep_partials(folder, name)
    entries: list[Json] = [
        {"path": name, "nbytes": len(content), "crc32": f"{crc32(content, 0):08x}"} for name, content in files.items()
    ]
    ledger.announce(entries)
    for name, content in files.items():
        if read_small(target.folder / name, len(content)) != content:
            publish_bytes(target.folder / name, content, fence=ledger.fence)
    ledger.publish({"identity": target.identity, "files": entries})


def refuse_lost(target: Target) -> None:
    """Raise :class:`TryAgainError` for a rank whose manifest lists a file that is gone or was cut: nobody would write it again."""
    for rank in _ranks(target):
        manifest = target.manifest_of(rank)
        if manifest and not target.has_files(manifest):
            raise TryAgainError(
                f"the files of tp {rank[0]} pp {rank[1]} were complete, and one of them was removed or cut since",
                where=target.folder,
                hint=f"convert stage {rank[1]} again with {target.kind.replace}, and keep other programs out of this folder",
            )


def _prove_unchanged(target: Target) -> None:
    for rank in _ranks(target):
        manifest = target.manifest_of(rank) or {}
        held = Holdings.of(target.folder, [manifest])
        for file in cast("list[Json]", manifest.get("files", [])):
            if not held.is_ours(str(file["path"])):
                raise VerificationError(
                    "the file is not as it was written, though its size is right",
                    where=target.folder / str(file["path"]),
                    hint=f"convert stage {rank[1]} again with {target.kind.replace}, and keep other programs out of this folder",
                )


def _ranks(target: Target) -> Iterator[Rank]:
    return ((tp, pp) for pp in range(target.stages) for tp in range(target.tensor))


def _ledger(target: Target, *, repair: bool) -> Ledger:
    return Ledger(
        folder=target.folder,
        claim=target.state / CLAIM,
        identity=target.identity,
        writing=target.state / WRITING_MERGED,
        record=target.state / MERGED,
        hint=f"move it away, or replace it with {target.kind.replace}",
        repair=repair,
    )
