"""Files that join those of all ranks into one checkpoint: written when every rank is there, before report and tracker.

__0_0.distcp ... __N_0.distcp   complete, as their manifests say   -->   common.pt, metadata.json, .metadata   -->   merged.json
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ckpt2pt.io.checksums import crc32
from ckpt2pt.io.records import Json
from ckpt2pt.publish.files import publish_bytes, read_small, sweep_partials
from ckpt2pt.publish.kinds import CLAIM, MERGED, WRITING_MERGED
from ckpt2pt.publish.ledger import Ledger
from ckpt2pt.publish.target import Target

Merge = Callable[[Target], Mapping[str, bytes]]
"""Makes the files, in the order in which they are to appear; the last one makes a checkpoint of the others."""


def publish_merged(merge: Merge, target: Target, *, repair: bool) -> None:
    """Write the files that join those of all ranks, which are as they were written.

    Call with the claim's lock held: of two that finish at once, the second finds what the first wrote.
    """
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
