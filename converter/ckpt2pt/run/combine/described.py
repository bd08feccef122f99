"""What ``opt_shard_info`` tells before any shard is read: which groups of ranks there are, and so the degrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckpt2pt.core.foldernames import model_ranks, parallel_sizes, ranks_of
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import InputError, MissingInputError, ref
from ckpt2pt.formats.folders import layout_of
from ckpt2pt.formats.mindspore.filenames import check_rank
from ckpt2pt.formats.mindspore.shards import read_info
from ckpt2pt.io.paths import listing

_INFO = "dist_opt_shard_info*.json"


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
