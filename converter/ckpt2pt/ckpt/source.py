"""The source as one rank of the result sees it: as it was saved, or as if it had been saved in the layout of the result.

    rank_R/*.ckpt of (tp, pp) -> {entry: TensorRef} --names--> (role, canonical name) --core.index--> tensors
    tensors + layout of the result --plan.reshard--> {entry: TensorRef} of (tp, pp) there

Every layer carries its global number in its name, so that neither the layers nor their stages have to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, cast

from ckpt2pt.checksums import Piece
from ckpt2pt.ckpt import prove_sources
from ckpt2pt.ckpt.ranks import SourceFile, index_source
from ckpt2pt.core.index import Collector, Index, Local
from ckpt2pt.core.params import EMBEDDING, canonical_name
from ckpt2pt.core.tensor import Role
from ckpt2pt.mapping.names import NameTable, Rules, is_tied_head, without_pipeline_suffix
from ckpt2pt.mapping.topology import Rank, Topology
from ckpt2pt.plan.reshard import Resharded, Wanted, reshard
from ckpt2pt.tensors import TensorRef

T = TypeVar("T")


class Layouts(Protocol):
    """What is asked for, as far as it matters here; ``source_topology`` is None where both sides are laid out alike."""

    @property
    def source(self) -> Path:
        """The folder of the ranks."""
        ...

    @property
    def topology(self) -> Topology:
        """The layout of the result."""
        ...

    @property
    def source_topology(self) -> Topology | None:
        """The layout of the source where it is another one."""
        ...

    @property
    def source_layout(self) -> Topology:
        """How the source is laid out."""
        ...

    @property
    def rules(self) -> Rules:
        """Names of the user's own."""
        ...


def files_for(rank: Rank, files: Mapping[Rank, SourceFile], request: Layouts) -> tuple[SourceFile, ...]:
    """The files that a rank of the result is read from: its own, or all where the layout changes."""
    return tuple(files.values()) if request.source_topology else (files[rank],)


def paths_for(rank: Rank, files: Mapping[Rank, SourceFile], request: Layouts) -> list[Path]:
    """The same, with every shard."""
    return [path for file in files_for(rank, files, request) for path in file.paths]


def prove_read(
    rank: Rank,
    files: Mapping[Rank, SourceFile],
    request: Layouts,
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
    request: Layouts,
    files: Mapping[Rank, SourceFile],
    identity: str,
    rank: Rank,
    *,
    sizes: Mapping[str, int | bool],
    tied: bool,
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
        sizes=sizes,
        tied=tied,
        where=str(request.source),
    )
    found = reshard(tensors, rank, wanted, table)
    # What is no tensor of the model is the same on every rank.
    first, group = files[0, 0], layout.group(0, 0)
    entries = index_source(first, group)
    kinds, _ = table.classify_all(entries, where=str(first.path))
    scalars = {name: ref for name, ref in entries.items() if kinds[name].role == "ignored"}
    return replace(found, entries={**found.entries, **scalars})


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


def kept(identity: str, read: Callable[[], T]) -> T:
    """What the headers of a whole source say, read once in a process; ``identity`` changes with any of its files."""
    if identity not in _KEPT:
        _KEPT.clear()
        _KEPT[identity] = read()
    return cast("T", _KEPT[identity])


_KEPT: dict[str, object] = {}
