"""The plan of a conversion into torch_dist, in the form of any other plan."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt2pt.core.fill import bytes_read
from ckpt2pt.core.params import layer_of
from ckpt2pt.core.slots import source_of
from ckpt2pt.core.topology import Rank
from ckpt2pt.io.records import Json
from ckpt2pt.publish import Target
from ckpt2pt.run.targets.request import DistRequest
from ckpt2pt.run.targets.torch_dist import Found, find
from ckpt2pt.show.preview import Plan, by_tensors


def planned_dist(request: DistRequest, stages: Sequence[int], *, names: bool = False) -> Plan:
    """Plan every worker of the given stages, from headers."""
    found = find(request)
    target = found.target
    ranks = [_rank(found, target, (tp, pp), names=names) for pp in stages for tp in range(found.division.tensor)]
    return by_tensors(found, ranks, found.source.remarks)


def _rank(found: Found, target: Target, rank: Rank, *, names: bool) -> Json:
    tp, pp = rank
    division = found.division
    file, slots = division.file(rank)
    held = dict.fromkeys(slot.key.name for slot in slots.slots)
    chunk: Json = {
        "chunk": 0,
        "key": "",
        "layers": sorted({division.layers.numbers[layer] for name in held if (layer := layer_of(name)) is not None}),
        "noopLayers": [],
        "embedding": pp == 0,
        "head": pp == division.pipeline - 1,
        "parameters": len(held),
        "numel": sum(slot.numel for slot in slots.slots if slot.key.role == "param"),
        "buckets": [],
    }
    if names:
        chunk["names"] = [
            {
                "megatron": part.key,
                "mindspore": str(slot.key),
                "shape": list(part.shape),
                "dtype": f"{source_of(division.index, slot.key, division.where).dtype} -> {part.dtype}",
                "bucketStart": None,
            }
            for part, slot in zip(file.parts, slots.slots, strict=True)
        ]
    return {
        "stage": pp,
        "tp": tp,
        "source": division.where,
        "directory": "",
        "bytesToRead": bytes_read(division.index, [slots], division.where),
        "files": [{"name": file.name, "nbytes": file.lay_out().nbytes}],
        "chunks": [chunk],
        "shards": [],
        "shardInfo": "",
        "ignored": {},
        "comparedCopies": [],
        "done": target.rank_manifest(tp, pp) is not None,
    }
