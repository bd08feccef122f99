"""The files of a MindSpore checkpoint, rank by rank -> global tensors.

    rank_R/*.ckpt of (tp, pp) -> {entry: TensorRef} --names--> (role, canonical name) --core.index--> tensors

Every layer carries its global number in its name, so that neither the layers nor their stages have to be known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from ckpt2pt.ckpt.ranks import SourceFile, index_source
from ckpt2pt.core.index import Collector, Index, Local
from ckpt2pt.core.params import EMBEDDING, canonical_name
from ckpt2pt.core.tensor import Role
from ckpt2pt.mapping.names import NameTable, is_tied_head, without_pipeline_suffix
from ckpt2pt.mapping.topology import Rank, Topology


def collect(files: Mapping[Rank, SourceFile], layout: Topology, table: NameTable, where: str) -> Index:
    """Read the headers of all ranks' files."""
    collector = Collector(layout.tensor, where)
    for (tp, pp), file in files.items():
        index = index_source(file, layout.group(tp, pp))
        known, _ = table.classify_all(index, where=str(file.path))
        for entry, ref in index.items():
            what = known[entry]
            if what.role == "ignored":
                continue
            name = without_pipeline_suffix(what.name)
            canonical = EMBEDDING if is_tied_head(name) else canonical_name(table.to_megatron(name))
            collector.add(cast("Role", what.role), canonical, tp, Local(ref.dtype, ref.shape, 0, ref.extents))
    return collector.index()
