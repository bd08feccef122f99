"""The plan of an import, in the form of any other plan."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.names import local_layer, prefix_remark
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.formats.megatron.resume import warning
from ckpt2pt.formats.mindspore.entries import Entry
from ckpt2pt.formats.mindspore.imported import payload_bytes
from ckpt2pt.io.records import Json
from ckpt2pt.publish import Target
from ckpt2pt.run.back.discover import BackPrepared, BackSurvey, prepare_back, survey_back
from ckpt2pt.run.back.request import BackRequest
from ckpt2pt.run.back.run import keep_import_apart, meta_folder, target_back
from ckpt2pt.show.preview import Plan, slots_of, with_ranks


def planned_import(request: BackRequest, stages: Sequence[int], *, names: bool = False) -> Plan:
    """Plan every rank of the given stages of the result, from headers and a few elements of each parameter."""
    found = survey_back(request)
    target = target_back(request, found)
    keep_import_apart(request, found, target)
    ranks: list[Json] = []
    warnings = dict.fromkeys(warning(found.unmet, full=request.full))
    for rank in ((tp, pp) for pp in stages for tp in range(found.layout.tensor)):
        prepared = prepare_back(request, found, rank)
        warnings |= dict.fromkeys([prefix_remark(prepared.prefix)] if prepared.prefix else [])
        ranks.append(_rank(request, found, target, rank, prepared, names=names))
    head: Json = {
        "iteration": found.iteration,
        "because": "the checkpoint",
        "doubts": [],
        "warnings": [*warnings],
        "fromTemplate": [],
        "consumedSamples": found.samples,
        "identity": found.identity,
        "target": str(target.folder),
        "options": request.identity_options(found.layout),
    }
    document = with_ranks(head, ranks, target, request.workers)
    return Plan(document=document, target=target, overwrite=request.overwrite)


def _rank(
    request: BackRequest, found: BackSurvey, target: Target, rank: Rank, prepared: BackPrepared, *, names: bool
) -> Json:
    tp, pp = rank
    folder, _, name = prepared.files[0].name.rpartition("/")
    alone = len(prepared.files) == 1
    return {
        "stage": pp,
        "tp": tp,
        "source": str(found.origin(rank)),
        "directory": folder if alone else "",
        "bytesToRead": payload_bytes(prepared.entries),
        "files": [{"name": name if alone else file.name, "nbytes": file.lay_out().nbytes} for file in prepared.files],
        "metadata": [
            {"name": f"{meta_folder(found)}/{name}", "nbytes": len(content)}
            for name, content in prepared.metadata.items()
        ],
        "chunks": [_chunk(found.layout, pp, vpp, prepared.entries, names=names) for vpp in range(found.layout.virtual)],
        "shards": [],
        "shardInfo": "",
        "ignored": {},
        "comparedCopies": [*dict.fromkeys(f"{kept.name} = {copy.name}" for kept, copy in prepared.copies)],
        "evidence": prepared.evidence,
        "done": target.rank_manifest(tp, pp) is not None,
    }


def _chunk(layout: Topology, pp: int, vpp: int, entries: Sequence[Entry], *, names: bool) -> Json:
    """What of a rank is of one model chunk; MindSpore's file holds all of them."""
    held = [(entry, entry.source) for entry in entries if isinstance(entry.source, TensorRef)]
    role = held[0][0].role if held else ""  # each parameter once, whatever is taken of it
    mine = [each for each in held if each[0].role == role and _is_of_chunk(each[0].name, layout, pp, vpp)]
    document: Json = {
        "chunk": vpp,
        "key": "",
        **slots_of(layout, pp, vpp),
        "parameters": len(mine),
        "numel": sum(source.numel for _, source in mine),
        "buckets": [],
    }
    if names:
        document["names"] = [
            {
                "megatron": source.name,
                "mindspore": entry.name,
                "shape": list(entry.shape),
                "dtype": f"{source.dtype} -> {entry.dtype}",
                "bucketStart": None,
            }
            for entry, source in mine
        ]
    return document


def _is_of_chunk(name: str, layout: Topology, pp: int, vpp: int) -> bool:
    layer = local_layer(name)  # which is global in MindSpore's names
    if layer is not None:
        return layer in layout.slots(pp, vpp)
    begins = ".embedding." in name and pp == 0
    return layout.holds_embedding(pp, vpp) if begins else layout.holds_head(pp, vpp)
