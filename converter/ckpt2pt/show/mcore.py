"""The plan of a conversion into the torch format of Megatron-LM 0.7 to 0.19, in the form of any other plan."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt2pt.core.fill import bytes_read
from ckpt2pt.core.topology import Rank
from ckpt2pt.io.records import Json
from ckpt2pt.run.targets.mcore import Found, find
from ckpt2pt.run.targets.request import McoreRequest
from ckpt2pt.show.preview import Plan, by_tensors, slots_of


def planned_mcore(request: McoreRequest, stages: Sequence[int], *, names: bool = False) -> Plan:
    """Plan every rank of the given stages, from headers."""
    found = find(request)
    members = range(found.layout.members)
    ranks = [_rank(found, (number, pp), names=names) for pp in stages for number in members]
    remarks = dict.fromkeys(one for pp in stages for one in found.layout.remarks((0, pp)))
    return by_tensors(found, ranks, [*found.remarks, *remarks])


def _rank(found: Found, rank: Rank, *, names: bool) -> Json:
    layout = found.layout
    tp, pp, ep = layout.place(rank)
    files, slots = layout.files(rank)
    chunks = layout.chunks(rank)
    buffers: dict[int, list[Json]] = {vpp: [] for vpp in range(len(chunks))}
    for optimizer in layout.optimizers(chunks) if layout.full else ():
        filled = (vpp for vpp, held in enumerate(optimizer.chunks) if held)
        for vpp, buffer in zip(filled, layout.buffers(rank, optimizer), strict=True):
            buffers[vpp].append({"numel": buffer.numel, "numelUnpadded": buffer.numel})
    return {
        "stage": pp,
        "tp": tp,
        **({"ep": ep} if layout.expert > 1 else {}),
        "source": layout.where,
        "directory": layout.directory(rank),
        "bytesToRead": bytes_read(layout.index, slots, layout.where),
        "files": [{"name": file.name, "nbytes": file.lay_out().nbytes} for file in files],
        "chunks": [
            {
                "chunk": vpp,
                "key": layout.topology.model_key(vpp),
                **slots_of(layout.topology, pp, vpp),
                "parameters": len(held),
                "numel": sum(one.numel for one in held),
                "buckets": buffers[vpp],
                **(
                    {
                        "names": [
                            _name(found, one.registered.name, one.registered.spelled, one.part.shape) for one in held
                        ]
                    }
                    if names
                    else {}
                ),
            }
            for vpp, held in enumerate(chunks)
        ],
        "shards": [],
        "shardInfo": "",
        "ignored": {},
        "comparedCopies": [*dict.fromkeys(f"{kept.name} = {copy.name}" for kept, copy in layout.copies(rank))],
        "done": found.target.rank_manifest(*rank) is not None,
    }


def _name(found: Found, name: str, spelled: str, shape: Sequence[int]) -> Json:
    source = next(tensor for key, tensor in found.layout.index.items() if key.name == name)
    return {
        "megatron": spelled,
        "mindspore": name,
        "shape": list(shape),
        "dtype": f"{source.dtype} -> {found.layout.dtype}",
        "bucketStart": None,
    }
