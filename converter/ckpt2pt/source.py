"""The source as one rank of the result sees it: as it was saved, or as if it had been saved in the layout of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from ckpt2pt.checksums import Piece
from ckpt2pt.ckpt import prove_sources
from ckpt2pt.ckpt.collect import collect
from ckpt2pt.ckpt.ranks import SourceFile, index_source
from ckpt2pt.mapping.names import NameTable
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.meta import RankMeta
from ckpt2pt.plan.reshard import Resharded, Wanted, reshard
from ckpt2pt.request import Request
from ckpt2pt.tensors import TensorRef

T = TypeVar("T")


def files_for(rank: Rank, files: Mapping[Rank, SourceFile], request: Request) -> tuple[SourceFile, ...]:
    """The files that a rank of the result is read from: its own, or all where the layout changes."""
    return tuple(files.values()) if request.source_topology else (files[rank],)


def paths_for(rank: Rank, files: Mapping[Rank, SourceFile], request: Request) -> list[Path]:
    """The same, with every shard."""
    return [path for file in files_for(rank, files, request) for path in file.paths]


def prove_read(
    rank: Rank,
    files: Mapping[Rank, SourceFile],
    request: Request,
    read: Mapping[str, Sequence[Piece]],
    *,
    every_byte: bool,
) -> dict[str, int]:
    """Compare the files that a rank was read from with their own checksums; those that it took nothing of are others' work."""
    paths = paths_for(rank, files, request)
    if request.source_topology:
        paths = [path for path in paths if read.get(str(path))]
    return prove_sources(paths, read, every_byte=every_byte)


def read_source(
    request: Request,
    files: Mapping[Rank, SourceFile],
    identity: str,
    rank: Rank,
    meta: RankMeta,
    known: Mapping[str, TensorRef] | None = None,
) -> Resharded:
    """The entries of a rank of the result.

    ``identity`` is that of the files' contents; ``known`` the index of the rank's own file, where that has been read already.
    """
    layout = request.source_layout
    if request.source_topology is None:
        file = files[rank]
        return Resharded(entries=(None if file.peers else known) or index_source(file, layout.group(*rank)))
    table = NameTable(request.rules)
    tensors = kept(identity, partial(collect, files, layout, table, str(request.source)))
    wanted = Wanted(
        topology=request.topology,
        source_tensor=layout.tensor,
        sizes=meta.sizes,
        tied=meta.tied,
        where=str(request.source),
    )
    found = reshard(tensors, rank, wanted, table)
    # What is no tensor of the model is the same on every rank.
    first, group = files[0, 0], layout.group(0, 0)
    entries = index_source(first, group)
    kinds, _ = table.classify_all(entries, where=str(first.path))
    scalars = {name: ref for name, ref in entries.items() if kinds[name].role == "ignored"}
    return replace(found, entries={**found.entries, **scalars})


def kept(identity: str, read: Callable[[], T]) -> T:
    """What the headers of a whole source say, read once in a process; ``identity`` changes with any of its files."""
    if identity not in _KEPT:
        _KEPT.clear()
        _KEPT[identity] = read()
    return cast("T", _KEPT[identity])


_KEPT: dict[str, object] = {}
