"""The plan of a MindSpore result, in the form of any other plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckpt2pt.core.names import NameTable, local_layer
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.discover import Discovered, discover, target_of
from ckpt2pt.discover.mindspore import MindSporeRank, prepare_mindspore, unmet_by
from ckpt2pt.discover.request import Request
from ckpt2pt.formats.megatron.resume import warning
from ckpt2pt.formats.mindspore.entries import Entry
from ckpt2pt.io.records import Json
from ckpt2pt.publish import Target
from ckpt2pt.show.preview import Plan, head_of, slots_of, with_ranks


def planned_mindspore(request: Request, stages: Sequence[int], *, names: bool = False) -> Plan:
    """Plan every rank of the given stages of the result, from headers and a few elements of each parameter."""
    wanted = [(tp, pp) for pp in stages for tp in range(request.topology.tensor)]
    chosen = discover(request, keep=wanted)
    target = target_of(request, chosen)
    ranks: list[Json] = []
    warnings = dict.fromkeys(warning(unmet_by(request, stages), full=request.full))
    for rank in wanted:
        prepared = prepare_mindspore(request, chosen, rank)
        warnings |= dict.fromkeys(prepared.remarks)
        ranks.append(_rank(request, chosen, target, rank, prepared, names=names))
    head = head_of(request, chosen, target, wanted[0], [*warnings], ())
    return Plan(document=with_ranks(head, ranks, target, request.workers), target=target, overwrite=request.overwrite)


def _rank(
    request: Request, chosen: Discovered, target: Target, rank: Rank, prepared: MindSporeRank, *, names: bool
) -> Json:
    tp, pp = rank
    folder, _, name = prepared.files[0].name.rpartition("/")
    alone = len(prepared.files) == 1
    layout, read = request.topology, chosen.read_for(rank, request)
    return {
        "stage": pp,
        "tp": tp,
        "source": str(chosen.origin(rank, request)),
        "directory": folder if alone else "",
        "bytesToRead": prepared.source_bytes,
        "files": [{"name": name if alone else file.name, "nbytes": file.lay_out().nbytes} for file in prepared.files],
        "metadata": [{"name": name, "nbytes": len(content)} for name, content in prepared.metadata.items()],
        "chunks": [_chunk(request, pp, vpp, prepared, names=names) for vpp in range(layout.virtual)],
        "shards": [str(path) for file in read for path in file.peers],
        "shardInfo": str(read[0].info or ""),
        "ignored": {},
        "comparedCopies": [*dict.fromkeys(f"{kept.name} = {copy.name}" for kept, copy in prepared.copies)],
        "evidence": prepared.evidence,
        "done": target.rank_manifest(tp, pp) is not None,
    }


def _chunk(request: Request, pp: int, vpp: int, prepared: MindSporeRank, *, names: bool) -> Json:
    """What of a rank is of one model chunk; MindSpore's file holds all of them."""
    layout, table, megatron = request.topology, NameTable(request.rules), request.from_megatron
    kinds, _ = table.classify_all((entry.name for entry in prepared.entries), where=str(request.source))
    held = [
        (entry, prepared.index[entry.source.key].dtype)
        for entry in prepared.entries
        if not isinstance(entry.source, bytes) and kinds[entry.name].role != "ignored"
    ]
    role = held[0][0].role if held else ""  # each parameter once, whatever is taken of it
    mine = [each for each in held if each[0].role == role and _is_of_chunk(each[0].name, layout, pp, vpp)]
    document: Json = {
        "chunk": vpp,
        "key": "",
        **slots_of(layout, pp, vpp),
        "parameters": len(mine),
        "numel": sum(math.prod(entry.shape) for entry, _ in mine),
        "buckets": [],
    }
    if names:
        document["names"] = [
            {
                "megatron": _megatron_name(entry, layout.slots(pp, vpp), table) if megatron else entry.name,
                "mindspore": entry.name,
                "shape": list(entry.shape),
                "dtype": f"{dtype} -> {entry.dtype}",
                "bucketStart": None,
            }
            for entry, dtype in mine
        ]
    return document


def _megatron_name(entry: Entry, slots: range, table: NameTable) -> str:
    """What Megatron calls the parameter, which counts the layers of each chunk from 0."""
    name = table.to_megatron(entry.name.removeprefix(f"{entry.role}."))
    layer = local_layer(name)
    return name if layer is None else name.replace(f".{layer}.", f".{slots.index(layer)}.", 1)


def _is_of_chunk(name: str, layout: Topology, pp: int, vpp: int) -> bool:
    layer = local_layer(name)  # which is global in MindSpore's names
    if layer is not None:
        return layer in layout.slots(pp, vpp)
    begins = ".embedding." in name and pp == 0
    return layout.holds_embedding(pp, vpp) if begins else layout.holds_head(pp, vpp)
