"""A conversion into weights in ``.safetensors``, from any format: a worker for each file, the last to finish adds the rest.

tensors --the target's write--> files --rank.RankTask--> one .safetensors each
                                files that make a checkpoint of them --publish.merged-->
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.core.fill import moves_of, replicas_of
from ckpt2pt.core.index import Index
from ckpt2pt.core.progress import Advance
from ckpt2pt.core.tensor import Tensor
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import TryAgainError, ref
from ckpt2pt.formats.megatron.loads import Releases
from ckpt2pt.formats.safetensors import ShardFile
from ckpt2pt.io.digests import sha256
from ckpt2pt.io.paths import status
from ckpt2pt.io.records import Json
from ckpt2pt.publish import Kind, Target
from ckpt2pt.publish.merged import publish_merged
from ckpt2pt.run.conversion import Conversion
from ckpt2pt.run.rank import RankTask
from ckpt2pt.run.targets.request import HuggingFaceRequest, MindFormersRequest
from ckpt2pt.run.targets.source import Reading, Source, paths_of, views_of

if TYPE_CHECKING:
    from ckpt2pt.verification.report import Findings, Report


@dataclass(frozen=True)
class Shards(ABC):
    """A source that was read as far as its headers, and the files that its weights become."""

    request: HuggingFaceRequest | MindFormersRequest
    source: Source
    index: Index
    shards: Sequence[ShardFile]

    @property
    @abstractmethod
    def identity_options(self) -> Json:
        """What decides what is written."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """How the folder of the result is laid out."""

    @abstractmethod
    def _files(self) -> Mapping[str, bytes]: ...

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """The files that make a checkpoint of the tensors, in the order in which they appear."""
        return self._files()

    @abstractmethod
    def compare_file(
        self, shard: ShardFile, path: Path, findings: Findings, advance: Callable[[int], None]
    ) -> Mapping[str, int]:
        """Compare a file, final or not, with the source; the CRC-32 of it, by its name."""

    @property
    def releases(self) -> Releases:
        """No release of Megatron-LM loads the result."""
        return {}

    @property
    def facts(self) -> Json:
        """Where what is no tensor is from."""
        return dict(self.source.facts)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know before the result is used."""
        return self.source.remarks

    @property
    def pipeline(self) -> int:
        """Number of stages, which divide the files."""
        return self.request.topology.pipeline

    @property
    def members(self) -> int:
        """The most files of a stage: each is a rank's."""
        return -(-len(self.shards) // self.pipeline)

    def shard(self, rank: Rank) -> ShardFile | None:
        """The file of a rank; the last ones may have none."""
        number = rank[1] * self.members + rank[0]
        return self.shards[number] if number < len(self.shards) else None

    @cached_property
    def target(self) -> Target:
        """The folder that the result goes into."""
        identity = self.source.identity(self.identity_options)
        merged = tuple(name for name in self.kind.merged if name in self.files)
        return Target(
            root=self.request.target,
            iteration=self.source.state.iteration,
            identity=identity,
            ranks={(tp, pp): identity for pp in range(self.pipeline) for tp in range(self.members)},
            stages=self.pipeline,
            tensor=self.members,
            full=False,
            kind=replace(self.kind, merged=merged),
        )

    def listed(self, rank: Rank) -> list[str]:
        """The file of a rank, below the folder of the result."""
        shard = self.shard(rank)
        return [shard.name] if shard else []

    def compare(self, rank: Rank, advance: Advance) -> tuple[Report, Mapping[str, int]]:
        """Compare the file of a rank, which is there, with the source; the CRC-32 of it."""
        from ckpt2pt.verification.report import Findings  # noqa: PLC0415 - numpy, and only when asked for

        shard, folder = self.shard(rank), self.target.folder
        findings, crcs = Findings(), dict[str, int]()
        seen = status(folder / shard.name) if shard else None
        if shard and seen and seen.st_size == shard.lay_out().nbytes:  # else the manifest tells that it was cut
            crcs.update(self.compare_file(shard, folder / shard.name, findings, advance))
        return findings.report(folder, 0), crcs


def prove_file(
    found: Shards, shard: ShardFile | None, partials: Mapping[str, Path], heed: Callable[[], None]
) -> Mapping[str, int]:
    """Compare a file that is to be published, before it is.  Raises :class:`VerificationError` for a difference."""
    from ckpt2pt.verification.report import NOTHING_PUBLISHED, Findings  # noqa: PLC0415 - only when asked for

    if shard is None:
        return {}
    findings, path = Findings(), partials[shard.name]
    crcs = found.compare_file(shard, path, findings, lambda _: heed())
    findings.report(path.parent, 0).raise_differences(hint=NOTHING_PUBLISHED)
    return crcs


def _plan(found: Shards, rank: Rank, target: Target) -> RankTask:
    request, shard, where = found.request, found.shard(rank), found.source.where
    moves = moves_of(shard.index(), [shard.slots()], where) if shard else ()
    return RankTask(
        rank=rank,
        target=target,
        reading=Reading(found.source, _paths(found, rank), partial(prove_file, found, shard)),
        verify=request.verify,
        repair=request.overwrite,
        files=[shard] if shard else [],
        moves=lambda: moves,
        copies=[pair for one in _compared(found, rank) for pair in replicas_of(one)],
        source_bytes=sum(move.nbytes for move in moves),
        facts={"source": where, "shard": digest_of(shard)},
    )


def digest_of(shard: ShardFile | None) -> str:
    """SHA-256 of what a file holds, and where."""
    held = [] if shard is None else [(one.name, one.dtype, one.shape) for one in shard.weights]
    return sha256(repr((shard and shard.name, held)).encode()).hexdigest()


def _merge(found: Shards, target: Target) -> Mapping[str, bytes]:
    """The files that make a checkpoint of those of all workers, which are there as this version of ckpt2pt would write them."""
    for rank in target.ranks:
        if (target.manifest_of(rank) or {}).get("shard") != digest_of(found.shard(rank)):
            raise TryAgainError(
                "a file was written by another version of ckpt2pt, which divides the tensors otherwise",
                where=target.folder,
                hint=f"run all stages with one version, with {ref('target.overwrite')}",
            )
    return found.files


def conversion_of(found: Shards, stages: Sequence[int], how_to_load: str) -> Conversion:
    """What is converted: the given stages of the work."""
    request = found.request
    return Conversion(
        target=found.target,
        pace=request.pace,
        verify=request.verify,
        overwrite=request.overwrite,
        identity_options=found.identity_options,
        facts={"assumed": dict(found.source.state.assumed)},
        inputs={(tp, pp): _inputs(found, (tp, pp)) for pp in stages for tp in range(found.members)},
        conflicts=(),
        warnings=found.remarks,
        how_to_load=how_to_load,
        prepare=partial(_plan, found),
        join=partial(publish_merged, partial(_merge, found), repair=request.overwrite),
    )


def _compared(found: Shards, rank: Rank) -> list[Tensor]:
    """What ranks of the source hold twice, which is compared once, by the first worker."""
    return [] if any(rank) else [one for one in found.source.index.values() if one.replicas]


def _paths(found: Shards, rank: Rank) -> tuple[str, ...]:
    """The files that a rank is read from, and those that it compares."""
    shard = found.shard(rank)
    own = shard.index().values() if shard else ()
    return paths_of((*views_of(own), *views_of(_compared(found, rank))))


def _inputs(found: Shards, rank: Rank) -> list[Json]:
    """The same, as a manifest lists them."""
    return found.source.inputs(_paths(found, rank))
