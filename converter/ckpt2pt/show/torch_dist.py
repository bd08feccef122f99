"""The plan of a conversion into torch_dist, in the form of any other plan."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt2pt.core.extents import DTYPE_BYTES
from ckpt2pt.core.params import layer_of
from ckpt2pt.core.slots import source_of
from ckpt2pt.core.topology import Rank
from ckpt2pt.io.records import Json
from ckpt2pt.publish import Target
from ckpt2pt.run.targets.request import DistRequest
from ckpt2pt.run.targets.torch_dist import Found, find
from ckpt2pt.show.preview import Plan, with_ranks


def planned_dist(request: DistRequest, stages: Sequence[int], *, names: bool = False) -> Plan:
    """Plan every worker of the given stages, from headers."""
    found = find(request)
    target = found.target
    ranks = [_rank(found, target, (tp, pp), names=names) for pp in stages for tp in range(found.division.tensor)]
    head: Json = {
        "iteration": found.source.state.iteration,
        "because": "the checkpoint",
        "doubts": [],
        "warnings": [*found.source.remarks],
        "fromTemplate": [],
        "consumedSamples": found.source.state.samples,
        "identity": target.identity,
        "target": str(target.folder),
        "options": found.identity_options,
    }
    document = with_ranks(head, ranks, target, request.workers)
    return Plan(document=document, target=target, overwrite=request.overwrite)


def _rank(found: Found, target: Target, rank: Rank, *, names: bool) -> Json:
    tp, pp = rank
    division = found.division
    file, slots = division.file(rank)
    # A weight and its main parameter may be of one tensor, which is read once.
    read = {(source_of(division.index, slot.key, division.where).key, slot.box): slot for slot in slots.slots}
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
        "bytesToRead": sum(slot.numel * DTYPE_BYTES[division.index[key].dtype] for (key, _), slot in read.items()),
        "files": [{"name": file.name, "nbytes": file.lay_out().nbytes}],
        "chunks": [chunk],
        "shards": [],
        "shardInfo": "",
        "ignored": {},
        "comparedCopies": [],
        "done": target.rank_manifest(tp, pp) is not None,
    }
