"""What describes the ranks of the result: ``pt_meta``, or a Megatron checkpoint itself where that is the source."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.request import Request
from ckpt2pt.formats.megatron.legacy import check_layers
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.ptmeta.metadata import (
    METADATA,
    RankMeta,
    answering,
    assumed,
    check,
    metadata_files,
    param_map_files,
    read_arguments,
    read_rank_meta,
    read_stated,
    require,
)
from ckpt2pt.io.inputs import sha256


def check_metadata(request: Request) -> None:
    """Refuse metadata that is not there, or of another layout."""
    if request.files or request.metadata is None:
        return
    require(request.metadata, source=request.source, target=request.target)
    if stated := read_stated(request.metadata, allow=request.rules.pickle_globals):
        check(request.topology, stated)
        with answers(request):
            check_layers(meta_of(request, (0, 0)).chunks, request.topology, pp=0, where=str(request.metadata))


def meta_of(request: Request, rank: Rank) -> RankMeta:
    """All of one rank."""
    if request.metadata is None:
        return _own(request).own_meta(request, rank)
    return read_rank_meta(
        request.metadata,
        request.topology,
        tp=rank[0],
        pp=rank[1],
        target_data=request.target_data,
        allow=request.rules.pickle_globals,
    )


def template_of(request: Request, rank: Rank) -> Template:
    """What is no tensor of the model."""
    if request.metadata is None:
        return meta_of(request, rank).template
    return read_arguments(request.metadata, rank, allow=request.rules.pickle_globals)


def inputs_of_metadata(request: Request, rank: Rank) -> list[dict[str, object]]:
    """The small files of metadata by content; none where the source itself is what is read."""
    if request.metadata is None:
        return []
    if request.files:
        return _inputs_beside(request, request.metadata, rank)
    described = metadata_files(request.metadata, tp=rank[0], pp=rank[1])
    return [{"metadata": path.name, "sha256": sha256(path, METADATA)} for path in sorted(described)]


def _inputs_beside(request: Request, folder: Path, rank: Rank) -> list[dict[str, object]]:
    """The same for a MindSpore result: param maps of Megatron's ranks, or the arguments of the model."""
    layout = request.source_topology
    if request.source_format == "megatron":
        ranks = [rank] if layout is None else layout.ranks()
        files = [path for one in ranks for path in param_map_files(folder, *one)] if request.full else []
    else:
        files = [] if layout is None else [metadata_files(folder, tp=0, pp=0)[0]]
    return [{"metadata": path.name, "sha256": sha256(path, METADATA)} for path in files]


def assumptions(request: Request) -> dict[str, object]:
    """What the metadata rests on besides what was read."""
    if request.metadata is None:
        return _own(request).own_assumptions(request)
    return assumed(request.metadata)


class _Describing(Protocol):
    """A kind of Megatron source, which is its own metadata."""

    def own_meta(self, request: Request, rank: Rank) -> RankMeta:
        """What it says, or what follows, for a rank of the result."""
        ...

    def own_assumptions(self, request: Request) -> dict[str, object]:
        """What that rests on besides the source."""
        ...


def _own(request: Request) -> _Describing:
    if request.source_format == "torch_dist":
        from ckpt2pt.discover import distributed  # noqa: PLC0415 - each kind loads what it needs

        return distributed
    from ckpt2pt.discover import stored  # noqa: PLC0415

    return stored


def answers(request: Request) -> AbstractContextManager[None]:
    """Errors about the layout say what ``pt_meta`` states of it."""
    return nullcontext() if request.metadata is None else answering(request.metadata, request.rules.pickle_globals)
