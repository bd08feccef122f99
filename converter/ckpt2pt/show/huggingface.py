"""The plan of a conversion into weights for Hugging Face transformers, in the form of any other plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ckpt2pt.core.fill import bytes_read
from ckpt2pt.core.params import EMBEDDING, HEAD, layer_of
from ckpt2pt.core.topology import Rank
from ckpt2pt.formats.huggingface.names import rows_of
from ckpt2pt.io.records import Json
from ckpt2pt.run.targets.huggingface import Found, find
from ckpt2pt.run.targets.request import HuggingFaceRequest
from ckpt2pt.show.preview import Plan, by_tensors


def planned_huggingface(request: HuggingFaceRequest, stages: Sequence[int], *, names: bool = False) -> Plan:
    """Plan every file of the given stages, from headers."""
    found = find(request)
    own = {
        row.own: name
        for name in dict.fromkeys(key.name for key in found.index)
        for row in rows_of(found.model.family, name)
    }
    ranks = [(tp, pp) for pp in stages for tp in range(found.members)]
    planned = [_rank(found, rank, own, names=names) for rank in ranks if found.shard(rank)]
    return by_tensors(found, planned, found.remarks)


def _rank(found: Found, rank: Rank, own: Mapping[str, str], *, names: bool) -> Json:
    """``own`` are the names of the result, and of which parameter each is."""
    tp, pp = rank
    shard = found.shard(rank)
    assert shard is not None
    held = [(own[weight.name], weight) for weight in shard.weights if weight.name in own]
    sources = dict.fromkeys(name for name, _ in held)
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
        chunk["names"] = [
            {
                "megatron": weight.name,
                "mindspore": name,
                "shape": list(weight.shape),
                "dtype": f"{weight.tensor.dtype if weight.tensor else 'zeros'} -> {weight.dtype}",
                "bucketStart": None,
            }
            for name, weight in held
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
