"""The plan of a conversion into weights for Hugging Face transformers or for MindFormers, in the form of any other plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ckpt2pt.core.fill import bytes_read
from ckpt2pt.core.params import EMBEDDING, HEAD, layer_of
from ckpt2pt.core.topology import Rank
from ckpt2pt.formats.huggingface.names import rows_of
from ckpt2pt.io.records import Json
from ckpt2pt.run.targets.huggingface import find
from ckpt2pt.run.targets.mindformers import find_weights
from ckpt2pt.run.targets.request import HuggingFaceRequest, MindFormersRequest
from ckpt2pt.run.targets.shards import Shards
from ckpt2pt.show.preview import Plan, by_tensors


def planned_huggingface(request: HuggingFaceRequest, stages: Sequence[int], *, names: bool = False) -> Plan:
    """Plan every file of the given stages, from headers."""
    found = find(request)
    own = {
        row.own: (name,)
        for name in dict.fromkeys(key.name for key in found.index)
        for row in rows_of(found.model.family, name)
    }
    return _planned(found, stages, own, names=names)


def planned_mindformers(request: MindFormersRequest, stages: Sequence[int], *, names: bool = False) -> Plan:
    """Plan every file of the given stages, from headers."""
    found = find_weights(request)
    layouts = found.expected.layouts
    own = {name: tuple(fused.name for fused in layouts.of(name)) for name in layouts.shapes}
    return _planned(found, stages, own, names=names)


def _planned(found: Shards, stages: Sequence[int], own: Mapping[str, tuple[str, ...]], *, names: bool) -> Plan:
    """``own`` are the names of the result, and the parameters that each is made of."""
    ranks = [(tp, pp) for pp in stages for tp in range(found.members)]
    planned = [_rank(found, rank, own, names=names) for rank in ranks if found.shard(rank)]
    return by_tensors(found, planned, found.remarks)


def _rank(found: Shards, rank: Rank, own: Mapping[str, tuple[str, ...]], *, names: bool) -> Json:
    tp, pp = rank
    shard = found.shard(rank)
    assert shard is not None
    held = [(own[weight.name], weight) for weight in shard.weights if weight.name in own]
    sources = dict.fromkeys(name for each, _ in held for name in each)
    chunk: Json = {
        "chunk": 0,
        "key": "",
        "layers": sorted({layer for name in sources if (layer := layer_of(name)) is not None}),
        "noopLayers": [],
        "embedding": EMBEDDING in sources,
        "head": HEAD in sources,
        "parameters": len(shard.weights),
        "numel": sum(math.prod(weight.shape) for weight in shard.weights),
        "buckets": [],
    }
    if names:
        tensors = {part.key.name: part.dtype for part in shard.index().values()}
        chunk["names"] = [
            {
                "megatron": weight.name,
                "mindspore": each[0] + (f" and {len(each) - 1} more" if len(each) > 1 else ""),
                "shape": list(weight.shape),
                "dtype": f"{_type_of(weight.name, tensors)} -> {weight.dtype}",
                "bucketStart": None,
            }
            for each, weight in held
        ]
    return {
        "stage": pp,
        "tp": tp,
        "source": found.source.where,
        "directory": "",
        "bytesToRead": bytes_read(shard.index(), [shard.slots()], found.source.where),
        "files": [{"name": shard.name, "nbytes": shard.lay_out().nbytes}],
        "metadata": [{"name": name, "nbytes": len(content)} for name, content in found.files.items()]
        if rank == (0, 0)
        else [],
        "chunks": [chunk],
        "shards": [],
        "shardInfo": "",
        "ignored": {},
        "comparedCopies": [],
        "done": found.target.rank_manifest(tp, pp) is not None,
    }


def _type_of(name: str, tensors: Mapping[str, str]) -> str:
    """The type of what a tensor is made of, by the names of its parts."""
    return tensors.get(name) or tensors.get(f"{name}[0]") or "zeros"
