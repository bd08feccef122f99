"""Which ranks of a MindSpore training output are tensor parallel, which pipeline parallel, and which are copies.

iter_*/mp_rank_01_003/   the names of the folders tell
rank_R/                  a pt_meta beside the ranks tells, or the files do: ranks of one stage hold parameters of the
                         same names, and all of them are tensor parallel where each holds other weights
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.foldernames import is_iteration, is_rank, iterations, model_ranks, parallel_sizes, ranks_of
from ckpt2pt.core.names import NameTable, Rules, is_split
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.errors import TopologyError, UsageError, refs
from ckpt2pt.formats.checkpoint import OPTION, agreed
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.mindspore.filenames import CheckpointId
from ckpt2pt.formats.mindspore.ranks import (
    SHARD_INFO,
    SUFFIXES,
    SourceFile,
    candidates,
    extra_files,
    names_of,
    rank_folder,
)
from ckpt2pt.formats.mindspore.shards import has_shards, read_info
from ckpt2pt.formats.ptmeta.metadata import read_stated
from ckpt2pt.io.files import OpenFiles, read_at
from ckpt2pt.io.paths import listing

_MEMBER = re.compile(rf".*model_optim_rng_(\d{{3}})\.(?:{'|'.join(SUFFIXES)})")
_SAMPLED, _SAMPLE_BYTES = 3, 4096

Weights = Mapping[str, TensorRef]
Files = Mapping[Rank, SourceFile]
Header = Callable[[Path], Weights]
"""Reads the header of a file; who opens a checkpoint keeps what was read, as files may lie on network storage."""


def find_layout(
    path: Path,
    tensor: int | None,
    pipeline: int | None,
    table: NameTable,
    header: Header = index_file,
    *,
    trust_metadata: bool = True,
) -> Topology:
    """The degrees of a training output; the layers do not matter here, so that each stage counts one.

    Without ``trust_metadata`` a pt_meta beside the ranks does not count: it may be that of another layout.
    Raises :class:`TopologyError` where ``tensor`` or ``pipeline`` contradicts what is there, :class:`UsageError` where they
    are not given and nothing tells them.
    """
    ranks = ranks_of(entry.name for entry in listing(path, option=OPTION))
    if not ranks:
        return _by_folders(path, tensor, pipeline)
    asked = (tensor, pipeline)
    if trust_metadata and (stated := read_stated(path / "pt_meta")):
        tensor, pipeline = agreed(asked, (stated.tensor, stated.pipeline), path / "pt_meta")
    elif tensor is None or pipeline is None:
        tensor, pipeline = agreed(asked, (1, 1) if ranks == [0] else _by_files(path, ranks, table, header), path)
    return _topology(tensor, pipeline, _group_size(ranks, tensor, pipeline))


def source_layout(
    path: Path, sizes: tuple[int | None, int | None, int | None, int | None], target: Topology, rules: Rules
) -> Topology:
    """The degrees of a training output that is converted into another layout; of ``sizes`` (tensor, pipeline, data, context) what is given.

    While nothing is there, as where somebody waits for it, what is not given is the target's, and 1 for data and context.
    """
    tensor, pipeline, data, context = sizes
    if any(is_rank(entry.name) or is_iteration(entry.name) for entry in listing(path, option=OPTION)):
        found = find_layout(path, tensor, pipeline, NameTable(rules), trust_metadata=False)
    else:
        found = _topology(tensor or target.tensor, pipeline or target.pipeline)
    return replace(found, data=data or max(1, found.data // (context or 1)), context=context or 1)


def _topology(tensor: int, pipeline: int, data: int = 1) -> Topology:
    return Topology(num_layers=max(1, pipeline), tensor=tensor, pipeline=pipeline, data=data)


def _by_folders(path: Path, tensor: int | None, pipeline: int | None) -> Topology:
    """V2: ``mp_rank_TT_PPP``, with a file for each member of the data-parallel group where they hold shards."""
    places = (path, *iterations(listing(path, option=OPTION)))
    folders = [model_ranks(listing(place, option=OPTION)) for place in places]
    tensor, pipeline = agreed((tensor, pipeline), parallel_sizes(rank for found in folders for rank in found), path)
    files = (file.name for found in folders for folder in found.values() for file in listing(folder, option=OPTION))
    members = (int(match[1]) for name in files if (match := _MEMBER.fullmatch(name)))
    return _topology(tensor, pipeline, 1 + max(members, default=0))


def _by_files(path: Path, ranks: list[int], table: NameTable, header: Header) -> tuple[int, int]:
    """Tensor and pipeline parallel size by the parameters of each rank, where each rank has weights of its own."""
    found = [candidates(rank_folder(path, rank), (None, True)) for rank in ranks]
    common = set(found[0]).intersection(*found[1:])
    why = "their files do not tell it either" if common else "they have no checkpoint in common"
    if common:
        weights = [weights_of(files[max(common)].path, table, header) for files in found]
        if not any(weights) and (described := _by_descriptions(path)):
            return described
        stages = [list(members) for _, members in groupby(weights, key=frozenset)]
        if all(weights) and len({len(stage) for stage in stages}) == 1:
            if all(len(set(map(_sample, stage))) == len(stage) for stage in stages):
                return len(stages[0]), len(stages)
            why = "some of them hold the same weights"
    raise UsageError(
        f"{len(ranks)} rank folders, nothing says which of them are tensor parallel and which pipeline parallel, and {why}",
        where=path,
        hint=f"give the parallel sizes of the training: {refs('parallelism.tensor', 'parallelism.pipeline')}",
    )


def _by_descriptions(path: Path) -> tuple[int, int] | None:
    """The same by the descriptions of data-parallel shards, which name the ranks of each group; None without them."""
    files = listing(path / SHARD_INFO, "rank_*/dist_opt_shard_info*.json", OPTION)
    groups = {info.ranks: frozenset(info.places) for info in map(read_info, files)}
    stages = [len(list(members)) for _, members in groupby(groups[ranks] for ranks in sorted(groups))]
    return (stages[0], len(stages)) if len(set(stages)) == 1 else None


def _group_size(ranks: list[int], tensor: int, pipeline: int) -> int:
    """The size of the data x context parallel group: the first rank of each group has a folder, or all of them have."""
    if min(tensor, pipeline) < 1:
        return 1
    count = ranks[-1] + 1
    apart = (count - tensor) // (tensor * (pipeline - 1)) if pipeline > 1 else 1
    if apart > 1:
        alone = _topology(tensor, pipeline, apart)
        if ranks == sorted(alone.source_rank(*rank) for rank in alone.ranks()):
            return apart
    return -(-count // (tensor * pipeline))


def check_ranks(
    path: Path, when: CheckpointId, files: Files, layout: Topology, table: NameTable, header: Header = index_file
) -> tuple[str, ...]:
    """Refuse degrees under which a part of the checkpoint would be left out: :class:`TopologyError`.

    Every folder with a file of it has its place, and ranks of the first data-parallel group hold the same weights.  Gives a
    warning for tensor-parallel ranks that do: they may be copies, and the tensor parallel size too large.
    """
    v1 = bool(ranks_of(entry.name for entry in listing(path, option=OPTION)))
    left_out = extra_files(path, when if v1 else None, names_of(layout))
    degrees = f"with tensor parallel size {layout.tensor} and pipeline parallel size {layout.pipeline}"
    hint = "give the parallel sizes of the training that wrote it"
    if left_out:
        raise TopologyError(
            f"{', '.join(left_out[:6])} hold parts of the checkpoint too, which have no place {degrees}",
            where=path,
            hint=hint,
        )
    weights = {rank: weights_of(file.path, table, header) for rank, file in files.items()}
    first = weights[0, 0]
    for rank in layout.group(0, 0)[1:] if v1 and first else ():
        folder = rank_folder(path, rank)
        there = candidates(folder, (None, True)) if listing(folder, option=OPTION) else {}
        other = weights_of(there[when].path, table, header) if when in there else first
        if other.keys() != first.keys() or _sample(other) != _sample(first):
            raise TopologyError(
                f"{degrees} rank_{rank} is a data-parallel copy of rank_0, and it holds other "
                + ("weights" if other.keys() == first.keys() else "parameters"),
                where=path,
                hint=hint,
            )
    return tuple(_copies({rank: _sample(held) for rank, held in weights.items()}, files, path))


def _copies(samples: Mapping[Rank, bytes], files: Files, path: Path) -> Iterator[str]:
    seen: dict[tuple[int, bytes], Rank] = {}
    for rank, sample in samples.items():
        other = seen.setdefault((rank[1], sample), rank)
        if sample and other != rank:
            one, two = (files[each].path.relative_to(path) for each in (other, rank))
            yield (
                f"{one} and {two} hold the same in the weights that were sampled: one may be a copy of the other, or the "
                "tensor parallel size be smaller"
            )


def weights_of(file: Path, table: NameTable, header: Header = index_file) -> Weights:
    """The parameters of a MindSpore file by name; none where it holds shards of them."""
    index = header(file)
    if has_shards(index):
        return {}
    known, _ = table.classify_all(index, where=str(file))
    return {known[entry].name: ref for entry, ref in index.items() if known[entry].role == "param"}


def _sample(weights: Weights) -> bytes:
    """The beginnings of a few weights of which each tensor-parallel rank holds another part.

    Constant ones are left out: zeros of a new model are the same on all ranks.
    """
    found = b""
    with OpenFiles() as files:
        for name in sorted(name for name in weights if is_split(name))[:_SAMPLED]:
            for path, offset, nbytes in weights[name].extents[:1]:
                data = bytearray(min(nbytes, _SAMPLE_BYTES))
                read_at(files.get(path)[0], memoryview(data), offset, path)
                found += data if data[4:] != data[:-4] else b""
    return found
