"""Merge data-parallel shards into one file for each (tp, pp), as MindSpore itself would have written it.

flags --cli.combine--> Request --conversion.run, a stage for each group--> rank_R/{name}_dp_merged.{ckpt|safetensors}

``convert`` needs none of this: it reads shards in place.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.names import is_split
from ckpt2pt.core.progress import Reporter
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.discover.checkpoint import Discovered
from ckpt2pt.discover.merged import groups_of
from ckpt2pt.discover.mindspore import role_of
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import TargetConflictError, UsageError, counted, printable, ref, size
from ckpt2pt.formats.mindspore.filenames import CheckpointId
from ckpt2pt.formats.mindspore.ranks import index_source
from ckpt2pt.io.paths import is_folder
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import checksums_reported
from ckpt2pt.publish import STATE
from ckpt2pt.run.conversion import Outcome, run_discovered
from ckpt2pt.verification.copies import copied_ranks, remark

log = logging.getLogger("ckpt2pt")

Section = tuple[int, int] | None
"""First ranks of the groups to be merged, from the first up to the last, which is left out; None for all."""
_OLDER = "combined"
"""Where older versions kept the manifests of merged groups, below the folder of records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """What a merge did; ``shards`` are those of each group."""

    outcome: Outcome
    when: CheckpointId
    shards: int

    def document(self) -> Json:
        """For ``--output json``."""
        done = self.outcome.document()
        return {
            "output": str(self.outcome.target.root),
            "epoch": self.when[0],
            "step": self.when[1],
            "ranksMerged": done["ranksConverted"],
            "shardsPerRank": self.shards,
            **{
                key: done[key]
                for key in ("ranksKept", "bytesWritten", "verified", "seconds", "published", "sourceChecksums")
            },
        }

    def sentence(self) -> str:
        """For a person."""
        done = self.outcome
        merged, kept = len(done.converted), len(done.kept)
        did = f"merged {counted(merged, 'rank')} of {counted(self.shards, 'shard')} each ({size(done.bytes_written)}) in {done.seconds:.1f} s"
        if not merged:
            did = "everything was there already"
        elif kept:
            did += f", kept {kept} that were there"
        did += checksums_reported(done.source_checksums)
        if done.target.beside:
            did += "\nthe result that is there stays until the other groups are merged, too"
        return f"epoch {self.when[0]}, step {self.when[1]}: {did}\n{printable(str(done.target.root))}"


def combine(
    request: Request, section: Section, reporter: Reporter, *, stages: Collection[int] | None = None
) -> Combined:
    """Merge the newest step that all ranks have; what an earlier run finished is kept.

    ``stages`` are the numbers of groups to be merged, in the order of their first ranks; None for all.
    """
    layout = groups_of(request.source, request.shard_info or request.source)
    firsts = {number: layout.source_rank(*rank) for number, rank in enumerate(layout.ranks())}
    chosen = [
        number
        for number, first in firsts.items()
        if (section is None or section[0] <= first < section[1]) and (stages is None or number in stages)
    ]
    if not chosen:
        raise UsageError(
            f"{ref('section')} {section} holds the first rank of no group",
            where=request.shard_info or request.source,
            hint=f"first ranks are {sorted(firsts.values())}",
        )
    outcome, found = _run(request, chosen, reporter)
    for text in _copies(request, found, layout, outcome):
        log.warning("%s", text)
    return Combined(outcome=outcome, when=found.files[0, 0].when, shards=len(found.files[0, 0].peers))


def _run(request: Request, stages: Sequence[int], reporter: Reporter) -> tuple[Outcome, Discovered]:
    try:
        return run_discovered(request, stages, reporter)
    except TargetConflictError as error:
        older = request.target / STATE / _OLDER
        if not is_folder(older, ref("target.path")):
            raise
        raise TargetConflictError(
            f"{error.what}; merged files there may be those of an older version of ckpt2pt, whose records in {older.name} cannot "
            "be gone on with",
            where=error.where,
            hint=f"choose another {ref('target.path')}, or move those files away: nothing is replaced",
        ) from error


def _copies(request: Request, found: Discovered, layout: Topology, outcome: Outcome) -> list[str]:
    """A warning for groups of one stage that were merged to the same bits."""
    ranks = list(layout.ranks())
    digests: dict[Rank, Mapping[str, object]] = {}
    for _, number in (*outcome.converted, *outcome.kept) if layout.tensor > 1 else ():
        tensors = cast("Json", (outcome.target.rank_manifest(0, number) or {}).get("tensors", {}))
        digests[ranks[number]] = {n.removeprefix("param:"): crc for n, crc in tensors.items() if n.startswith("param:")}

    def weights(rank: Rank) -> Iterable[TensorRef]:
        file = found.files[0, ranks.index(rank)]
        index = index_source(file, file.ranks)
        return [tensor for name, tensor in index.items() if is_split(name) and role_of(name) == "param"]

    def place(rank: Rank) -> Path:
        return found.files[0, ranks.index(rank)].path

    return [remark(group, place) for group in copied_ranks(digests, weights)]
