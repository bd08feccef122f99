"""Data-parallel shards as the source of merged files: the groups of ranks that ``opt_shard_info`` describes.

opt_shard_info/* -> groups of ranks -> the newest step that all ranks have -> files of each group

Groups are numbered in the order of their first ranks, and each is a stage of its own: they are merged in any order, by several
runs at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ckpt2pt.core.foldernames import model_rank_of, model_ranks, parallel_sizes, rank_name, rank_of, ranks_of
from ckpt2pt.core.reshard import RankTensors
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.core.training_step import TrainingStep, agree, name_conflict
from ckpt2pt.discover.checkpoint import Discovered, Found, RankSource
from ckpt2pt.discover.request import MindSporeFiles, Request
from ckpt2pt.discover.training import Headers, prove_read
from ckpt2pt.errors import InputError, MissingInputError, ref
from ckpt2pt.formats.folders import layout_of
from ckpt2pt.formats.mindspore.filenames import UNNAMED, CheckpointId, check_rank
from ckpt2pt.formats.mindspore.ranks import (
    SourceFile,
    choose,
    extra_files,
    find_groups,
    find_sources,
    index_source,
    last_saved,
    names_of,
)
from ckpt2pt.formats.mindspore.shards import read_info
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.io.paths import listing
from ckpt2pt.publish import MINDSPORE, STATE
from ckpt2pt.publish.kinds import Kind

__all__ = ["find", "prove_read", "read", "stated"]

log = logging.getLogger("ckpt2pt")

_INFO = "dist_opt_shard_info*.json"


def find(request: Request, keep: Collection[Rank]) -> Found:
    """The files of every group at the newest step that all ranks have; nothing may be there that nothing describes."""
    strategy = request.shard_info or request.source
    topology, headers = described_topology(strategy), Headers(())
    found = find_sources(request.source, topology, wanted_format=request.source_format, merged=False)
    found = find_groups(
        request.source,
        topology,
        found,
        sharded=headers.has_shards,
        info=strategy,
        wanted_format=request.source_format,
    )
    when = choose(found, last_saved(request.source, topology))
    files = found[when]
    if not all(file.info for file in files.values()):
        raise InputError(
            "the files hold named parameters and no shards: there is nothing to merge",
            where=next(iter(files.values())).path,
            hint="convert them as they are (ckpt2pt convert)",
        )
    refuse_undescribed(request.source, strategy, when, names_of(topology))
    facts = {path: headers.facts(path) for file in files.values() for path in file.paths}
    agree(facts, request.source)
    path, stated = next(iter(facts.items()))
    misnamed = name_conflict(None if when == UNNAMED else when, stated)
    if misnamed:
        log.warning("%s is %s: the merged file keeps the name, and convert goes by what the file holds", path, misnamed)
    groups = {
        (0, number): replace(files[rank], ranks=topology.group(*rank)) for number, rank in enumerate(topology.ranks())
    }
    step = TrainingStep(iteration=max(when[1], 0), samples=None, iteration_source="the name of the file")
    return Found(groups, step, {}, headers.prove_unchanged)


def read(request: Request, chosen: Discovered, rank: Rank, meta: RankMeta) -> RankSource:
    """The tensors that the shards of a group make up."""
    file = chosen.files[rank]
    return RankSource(RankTensors(others=index_source(file, file.ranks)), Statement())


def stated(request: Request, chosen: Discovered, rank: Rank) -> Statement:
    """Nothing: entries are merged as they are."""
    return Statement()


def target_kind(file: SourceFile, source: Path) -> Kind:
    """How merged files of one step lie in a folder, which may be the shards' own and hold those of other steps."""
    place, rank = file.path.parent, rank_of(file.path.parent.name)
    epoch, step = file.when
    if rank is None:
        name = f"{place.parent.relative_to(source)}/mp_rank_*/*_dp_merged.*".removeprefix("./")
    else:
        name = f"rank_*/*{file.path.stem.rpartition(rank_name(rank))[2]}_dp_merged.*"
    of_step = "merged" if file.when == UNNAMED else f"merged-{epoch}_{step}"
    return replace(MINDSPORE, results=(name,), state=f"{STATE}/{of_step}")


def merged_names(source: Path, file: SourceFile, wanted: MindSporeFiles) -> list[str]:
    """The names of a group's merged files: that of its first shard, or of each of them."""
    paths = file.peers if wanted.copies else file.peers[:1]
    return [f"{path.parent.relative_to(source)}/{path.stem}_dp_merged.{wanted.format}" for path in paths]


# ------------------------------------------------------------------------------------------------- what is described


def groups_of(source: Path, strategy: Path) -> Topology:
    """The groups of a training by their descriptions; their number is that of its (tp, pp)."""
    if any(map(model_rank_of, descriptions(strategy))):  # whose degrees do not tell what is missing
        refuse_undescribed(source, strategy, None, set())
    return described_topology(strategy)


def refuse_undescribed(source: Path, strategy: Path, when: CheckpointId | None, described: set[str]) -> None:
    """Refuse folders of shards that nothing describes: part of the model would be left out."""
    found = extra_files(source, when, described.union(descriptions(strategy)))
    if found:
        raise MissingInputError(
            f"{len(found)} folders of {ref('source.path')} hold shards that nothing describes: {', '.join(found[:8])}",
            where=strategy,
            hint="copy the whole opt_shard_info folder of the training, or move what another run has left away",
        )


def descriptions(strategy: Path) -> dict[str, Path]:
    """By the names of their folders, ``rank_R`` or ``mp_rank_T_P``; refused where a file's own name says another rank."""
    infos = {path.parent.name: path for path in listing(strategy, f"*/{_INFO}", ref("source.optShardInfoPath"))}
    for path in infos.values():
        check_rank(path)
    if not infos:
        raise MissingInputError(
            f"no */{_INFO} there",
            where=strategy,
            hint=f"point {ref('source.optShardInfoPath')} at the opt_shard_info folder of the training",
            field="source.optShardInfoPath",
        )
    return infos


def described_topology(strategy: Path) -> Topology:
    """Degrees from the folders that hold descriptions, and the first one's list of ranks."""
    infos = descriptions(strategy)
    data = len(read_info(next(iter(infos.values()))).ranks)
    ranks, models = ranks_of(infos), model_ranks(path.parent for path in infos.values())
    layout: Topology | None
    if models:
        tensor, pipeline = parallel_sizes(models)
        layout = Topology(num_layers=pipeline, tensor=tensor, pipeline=pipeline)
    else:
        layout = layout_of(ranks)
    if layout is not None:
        made = replace(layout, data=data)
        wanted = len(models) or [made.source_rank(*rank) for rank in made.ranks()]
        if wanted in (ranks, made.tensor * made.pipeline):
            return made
    raise InputError(
        f"descriptions are there for {', '.join(list(infos)[:8])}, the first of {data} ranks: "
        "they are not the first ranks of equal groups",
        where=strategy,
        hint="copy the whole opt_shard_info folder of the training, and nothing else into it",
    )
