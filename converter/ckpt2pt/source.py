"""The source as one rank of the result sees it: as it was saved, or as if it had been saved in the layout of the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from ckpt2pt.ckpt.collect import collect
from ckpt2pt.ckpt.ranks import SourceFile, index_source
from ckpt2pt.core.index import Index
from ckpt2pt.mapping.names import NameTable
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.meta import RankMeta
from ckpt2pt.plan.reshard import Resharded, Wanted, reshard
from ckpt2pt.request import Request
from ckpt2pt.tensors import TensorRef


def files_for(rank: Rank, files: Mapping[Rank, SourceFile], request: Request) -> tuple[SourceFile, ...]:
    """The files that a rank of the result is read from: its own, or all where the layout changes."""
    return tuple(files.values()) if request.source_topology else (files[rank],)


def paths_for(rank: Rank, files: Mapping[Rank, SourceFile], request: Request) -> list[Path]:
    """The same, with every shard."""
    return [path for file in files_for(rank, files, request) for path in file.paths]


def read_source(
    request: Request,
    files: Mapping[Rank, SourceFile],
    rank: Rank,
    meta: RankMeta,
    known: Mapping[str, TensorRef] | None = None,
) -> Resharded:
    """The entries of a rank of the result.  ``known`` is the index of its own file, where that has been read already."""
    layout = request.source_layout
    if request.source_topology is None:
        file = files[rank]
        return Resharded(entries=(None if file.peers else known) or index_source(file, layout.group(*rank)))
    table = NameTable(request.rules)
    tensors = _tensors(_Files(files, request))
    wanted = Wanted(topology=request.topology, sizes=meta.sizes, tied=meta.tied, where=str(request.source))
    found = reshard(tensors, rank, wanted, table)
    # What is no tensor of the model is the same on every rank.
    first, group = files[0, 0], layout.group(0, 0)
    entries = index_source(first, group)
    kinds, _ = table.classify_all(entries, where=str(first.path))
    scalars = {name: ref for name, ref in entries.items() if kinds[name].role == "ignored"}
    return replace(found, entries={**found.entries, **scalars})


class _Files:
    """The files of one checkpoint, as a key of a cache."""

    def __init__(self, files: Mapping[Rank, SourceFile], request: Request) -> None:
        self.files, self.request = files, request
        self._key = tuple(sorted(files.items(), key=lambda item: item[0])), request.source_layout, request.source

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Files) and self._key == other._key


@lru_cache(maxsize=1)
def _tensors(found: _Files) -> Index:
    """The global tensors of the source, read once in a process."""
    request = found.request
    return collect(found.files, request.source_layout, NameTable(request.rules), str(request.source))
