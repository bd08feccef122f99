"""The plan of a repair of what MSAdapter wrote, in the form of any other plan."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt2pt.core.topology import Rank
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import conflicting
from ckpt2pt.run.targets.repair import Found, find
from ckpt2pt.run.targets.request import RepairRequest
from ckpt2pt.show.preview import Plan, with_ranks


def planned_repair(request: RepairRequest, stages: Sequence[int]) -> Plan:
    """Plan every rank of the given stages, from headers."""
    found = find(request)
    target = found.target
    head: Json = {
        "iteration": found.source.iteration,
        "because": "the checkpoint",
        **conflicting(),
        "warnings": [*found.remarks],
        "fromTemplate": [],
        "consumedSamples": "as many",
        "identity": target.identity,
        "target": str(target.folder),
        "options": found.identity_options,
    }
    ranks = [_rank(found, (number, pp)) for pp in stages for number in range(target.tensor)]
    return Plan(document=with_ranks(head, ranks, target, request.workers), target=target, overwrite=request.overwrite)


def _rank(found: Found, rank: Rank) -> Json:
    tp, pp, ep = found.place(rank)
    files = found.files(rank)
    return {
        "stage": pp,
        "tp": tp,
        **({"ep": ep} if found.source.sizes[2] > 1 else {}),
        "source": str(found.source.ranks[tp, pp, ep]),
        "directory": found.directory(rank),
        "bytesToRead": sum(move.nbytes for file in files for move in file.moves),
        "files": [{"name": file.payload.name, "nbytes": file.payload.lay_out().nbytes} for file in files],
        "chunks": [],
        "shards": [],
        "shardInfo": "",
        "ignored": {},
        "comparedCopies": [],
        "done": found.target.rank_manifest(*rank) is not None,
    }
