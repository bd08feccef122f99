"""The source as one rank of the result sees it: as it was saved, or as if it had been saved in the layout of the result.

    rank_R/*.ckpt of (tp, pp) -> {entry: TensorRef} --names--> (role, canonical name) --core.index--> tensors
    tensors + layout of the result --core.reshard--> those of (tp, pp) there

Every layer carries its global number in its name, so that neither the layers nor their stages have to be known.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar, cast

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.index import Collector, Index, Local
from ckpt2pt.core.names import SHARD, NameTable, Rules, is_tied_head, prefix_remark, without_pipeline_suffix
from ckpt2pt.core.params import EMBEDDING, HEAD, canonical_name
from ckpt2pt.core.reshard import RankTensors, Wanted, reshard
from ckpt2pt.core.tensor import Key, Tensor, local_tensor
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.errors import CoverageError, InputError, UnmappedNameError, aside
from ckpt2pt.formats.mindspore import index_file, prove_sources
from ckpt2pt.formats.mindspore.ranks import SourceFile, index_source
from ckpt2pt.io.checksums import Piece

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
    none: Collection[Path] = (),
) -> dict[str, int]:
    """Compare the files that a rank was read from with their own checksums; those that it took nothing of are others' work.

    ``none`` are files that are known to state none, and are not opened again.
    """
    paths = paths_for(rank, files, request)
    if request.source_topology:
        paths = [path for path in paths if read.get(str(path))]
    found = prove_sources((path for path in paths if path not in none), read, every_byte=every_byte)
    return found | {"none": found["none"] + sum(path in none for path in paths)}


def read_source(
    request: Layouts,
    files: Mapping[Rank, SourceFile],
    identity: str,
    rank: Rank,
    *,
    sizes: Mapping[str, int | bool],
    tied: bool,
    header: Callable[[Path], Mapping[str, TensorRef]] = index_file,
) -> RankTensors:
    """What a rank of the result holds where the layout changes.

    ``identity`` is that of the files' contents; ``header`` indexes a file.
    """
    layout, table = request.source_layout, NameTable(request.rules)

    def read(rank: Rank, file: SourceFile) -> Mapping[str, TensorRef]:
        return index_source(file, layout.group(*rank), header)

    tensors, scalars = kept(identity, partial(collect, files, layout, table, str(request.source), read))
    wanted = Wanted(
        topology=request.topology,
        source_tensor=layout.tensor,
        sizes=sizes,
        tied=tied,
        where=str(request.source),
    )
    return replace(reshard(tensors, rank, wanted, table), others=scalars)


def held_in(
    entries: Mapping[str, TensorRef],
    table: NameTable,
    where: str,
    *,
    full: bool = True,
    first_stage: Mapping[str, TensorRef] | None = None,
) -> RankTensors:
    """What the file of one rank holds.  A tensor that no table knows has the name that the file gives it.

    A last stage without a copy of its own of the tied embeddings has that of the ``first_stage``, where these are given: both
    ends hold the same values.  Raises :class:`InputError` for shards, :class:`CoverageError` for two entries of one tensor.
    """
    shards = [name for name in entries if "_bucket_" in name and SHARD.fullmatch(name)]
    if shards:
        raise InputError(
            f"the file holds {len(shards)} data-parallel shards ({shards[0]}, ...) instead of named parameters",
            where=where,
            hint="the first rank holds named parameters: convert a checkpoint whose ranks were all saved alike"
            + aside("source.iteration"),
        )
    known, prefix = table.classify_all(entries, where=where)
    index: dict[Key, Tensor] = {}
    spelled: dict[Key, str] = {}
    others: dict[str, TensorRef] = {}
    canonical: dict[str, str] = {}
    for entry, ref in entries.items():
        role, name = known[entry]
        if role == "ignored":
            others[entry] = ref
            continue
        if name not in canonical:
            canonical[name] = _canonical(name, table)
        key = Key(role, canonical[name])
        if key in index:
            bare = without_pipeline_suffix(name)
            if bare == without_pipeline_suffix(known[spelled[key]].name):
                raise CoverageError(
                    f"{spelled[key]} and {entry} are the same {role} of {bare}",
                    where=where,
                    hint=f"remove one of the two, or list it under ignore in a rule file{aside('model.rules')}",
                )
            key = Key(role, bare)
        index[key], spelled[key] = local_tensor(key, ref.dtype, ref.shape, ref.extents), entry
    if first_stage is not None:
        first = held_in(first_stage, table, where)
        for key, tensor in first.index.items():
            own = (key, key._replace(name=HEAD))
            if key.name == EMBEDDING and (full or key.role == "param") and index.keys().isdisjoint(own):
                index[key], spelled[key] = tensor, first.name(key)
    remarks = (prefix_remark(prefix),) if prefix else ()
    return RankTensors(index=index, name=spelled.__getitem__, others=others, remarks=remarks)


def _canonical(name: str, table: NameTable) -> str:
    name = without_pipeline_suffix(name)
    try:
        return EMBEDDING if is_tied_head(name) else canonical_name(table.to_megatron(name))
    except UnmappedNameError:
        return name


def collect(
    files: Mapping[Rank, SourceFile],
    layout: Topology,
    table: NameTable,
    where: str,
    read: Callable[[Rank, SourceFile], Mapping[str, TensorRef]],
) -> tuple[Index, Mapping[str, TensorRef]]:
    """Read the headers of all ranks' files: the tensors, and of the first rank what is none, which is the same on every rank.

    ``read`` gives the entries of a rank.
    """
    collector, others = Collector(layout.tensor, where), dict[str, TensorRef]()
    for rank, file in files.items():
        scalars = collect_entries(collector, rank[0], read(rank, file), table, str(file.path))
        if rank == (0, 0):
            others = scalars
    return collector.index(), others


def collect_entries(
    collector: Collector,
    tp: int,
    entries: Mapping[str, TensorRef],
    table: NameTable,
    where: str,
    wanted: Callable[[Key], bool] = lambda _: True,
) -> dict[str, TensorRef]:
    """Add what a rank's file holds of the ``wanted`` tensors; returns the entries that are no tensors of the model."""
    others: dict[str, TensorRef] = {}
    known, _ = table.classify_all(entries, where=where)
    for entry, ref in entries.items():
        what = known[entry]
        if what.role == "ignored":
            others[entry] = ref
            continue
        name = without_pipeline_suffix(what.name)
        canonical = EMBEDDING if is_tied_head(name) else canonical_name(table.to_megatron(name))
        key = Key(what.role, canonical)
        if wanted(key):
            collector.add(key.role, key.name, tp, Local(ref.dtype, ref.shape, 0, ref.extents))
    return others


def kept(identity: str, read: Callable[[], T], purpose: str = "") -> T:
    """What the headers of a whole source say, read once in a process for each purpose; ``identity`` changes with any of its files."""
    known, found = _KEPT.get(purpose, ("", None))
    if known != identity:
        _KEPT.pop(purpose, None)  # before the next is read
        found = read()
        _KEPT[purpose] = identity, found
    return cast("T", found)


_KEPT: dict[str, tuple[str, object]] = {}
