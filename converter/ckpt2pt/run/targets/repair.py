"""A conversion of what MSAdapter wrote into the same files of torch: bytes are copied, containers and types are written anew.

source --formats.repaired--> files of each rank, moves of whole storages --rank.RankTask--> mp_rank_TT[_PPP][_EEE]/*.pt
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.core.progress import Advance
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.checkpoint import prove_same, stat_of
from ckpt2pt.discover.request import digest
from ckpt2pt.engine.write import ReadPieces
from ckpt2pt.errors import UsageError, ref
from ckpt2pt.formats.folders import keep_apart
from ckpt2pt.formats.repaired import Place, Repairable, Repaired, repaired
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.io.records import Json
from ckpt2pt.publish import MEGATRON, Target
from ckpt2pt.run.conversion import Conversion
from ckpt2pt.run.rank import RankTask
from ckpt2pt.run.targets.request import RepairRequest

if TYPE_CHECKING:
    from ckpt2pt.verification.report import Report


@dataclass(frozen=True)
class Found:
    """A source of which the folders are known; ``stats`` are size and time of the last change of each file."""

    request: RepairRequest
    source: Repairable
    stats: Mapping[str, Mapping[str, int]]

    @property
    def identity_options(self) -> Json:
        """What decides what is written."""
        tensor, pipeline, expert = self.source.sizes
        sizes = {"tensor": tensor, "pipeline": pipeline, "virtualPipeline": 1}
        return {"mode": "Full", "format": "Torch", **sizes, **({"expert": expert} if expert > 1 else {})}

    @cached_property
    def target(self) -> Target:
        """The folder that the result goes into."""
        tensor, pipeline, expert = self.source.sizes
        identity = digest([self.identity_options, self.source.iteration, sorted(map(str, self.inputs(self.stats)))])
        ranks = [(number, pp) for pp in range(pipeline) for number in range(tensor * expert)]
        return Target(
            root=self.request.target,
            iteration=self.source.iteration,
            identity=identity,
            ranks=dict.fromkeys(ranks, identity),
            stages=pipeline,
            tensor=tensor * expert,
            kind=MEGATRON,
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know before the result is used."""
        remark = (
            f"random generators: those of torch are as at the start of a run with seed {self.source.seed}, as MindSpore's are of "
            "another form; those of Python and numpy are the source's"
        )
        return (remark,) if self.source.generators else ()

    def place(self, rank: Rank) -> Place:
        """(tp, pp, ep) of a rank of the result: those of the first experts, then those of the next."""
        ep, tp = divmod(rank[0], self.source.sizes[0])
        return tp, rank[1], ep

    def paths(self, rank: Rank) -> list[Path]:
        """The files of a rank of the source."""
        return self.source.files(self.place(rank))

    def directory(self, rank: Rank) -> str:
        """The folder of a rank, by the name that it has in the source."""
        return self.source.ranks[self.place(rank)].name

    def listed(self, rank: Rank) -> list[str]:
        """The files of a rank, below the folder of the result."""
        return [f"{self.directory(rank)}/{path.name}" for path in self.paths(rank)]

    def inputs(self, paths: Iterable[str]) -> list[Json]:
        """Files of the source, as a manifest lists them."""
        root = f"{self.source.folder}/"
        return [{"source": path.removeprefix(root), **self.stats[path]} for path in paths]

    def files(self, rank: Rank) -> list[Repaired]:
        """The files of a rank as they will be, from headers."""
        allow = self.request.rules.pickle_globals
        return [repaired(path, self.place(rank), self.source, allow) for path in self.paths(rank)]

    def compare(self, rank: Rank, advance: Advance) -> tuple[Report, Mapping[str, int]]:
        """Compare the files of a rank, which are there, with the source; the CRC-32 of each."""
        directory = self.directory(rank)
        results = {path.name: self.target.folder / directory / path.name for path in self.paths(rank)}
        report, crcs = self.compare_files(rank, results, advance, directory)
        return report, {f"{directory}/{name}": crc for name, crc in crcs.items()}

    def compare_files(
        self, rank: Rank, results: Mapping[str, Path], advance: Advance, directory: str = ""
    ) -> tuple[Report, Mapping[str, int]]:
        """The same of files of any place, by name."""
        from ckpt2pt.verification.repair import compare_repaired  # noqa: PLC0415 - numpy, and only when asked for

        sources = {path.name: path for path in self.paths(rank)}
        return compare_repaired(sources, results, advance, directory, allow=self.request.rules.pickle_globals)


def find(request: RepairRequest) -> Found:
    """Find the ranks of the source.  Nothing is written."""
    source = request.source_found()
    _check_agrees(request, source)
    paths = [path for place in source.ranks for path in source.files(place)]
    found = Found(request, source, {str(path): stat_of(path) for path in paths})
    keep_apart(found.target, {request.source: ref("source.path")})
    return found


def _check_agrees(request: RepairRequest, source: Repairable) -> None:
    """Refuse what is said of a source that keeps what it holds: metadata, and another number of layers than its own."""
    given = {"metadata.path": request.metadata, "model.noopLayers": request.noop}
    for field in (field for field, value in given.items() if value):
        raise UsageError(
            f"{ref(field)} is given, and decides nothing of files that keep what they hold",
            where=source.folder,
            hint="leave it out",
            field=field,
        )
    if request.num_layers not in {None, source.layers}:
        raise UsageError(
            f"{ref('model.numLayers')} is {request.num_layers}, and the arguments of the source say {source.layers}",
            where=source.folder,
            hint=f"leave it out, or give {source.layers}",
            field="model.numLayers",
        )


@dataclass(frozen=True, slots=True)
class _Reading:
    """The source of one rank."""

    found: Found
    rank: Rank

    def prove_unchanged(self) -> None:
        prove_same({path: self.found.stats[str(path)] for path in self.found.paths(self.rank)})

    def prove_read(self, read: ReadPieces) -> Mapping[str, int]:
        """By the CRC-32 that an archive has of each record."""
        proved = self.found.request.verify != "none"
        for path, pieces in read.items() if proved else ():
            Archive.prove_read(Path(path), pieces)
        return {"verified": len(read) if proved else 0, "notChecked": 0 if proved else len(read), "none": 0}

    def prove_result(self, partials: Mapping[str, Path], heed: Callable[[], None]) -> Mapping[str, int]:
        from ckpt2pt.verification.report import NOTHING_PUBLISHED  # noqa: PLC0415 - numpy, and only when asked for

        report, crcs = self.found.compare_files(self.rank, partials, lambda _: heed())
        report.raise_differences(hint=NOTHING_PUBLISHED)
        return crcs


def _plan(found: Found, rank: Rank, target: Target) -> RankTask:
    files = found.files(rank)
    moves = [move for file in files for move in file.moves]
    return RankTask(
        rank=rank,
        target=target,
        reading=_Reading(found, rank),
        verify=found.request.verify,
        repair=found.request.overwrite,
        directory=found.directory(rank),
        files=[file.payload for file in files],
        moves=lambda: moves,
        source_bytes=sum(move.nbytes for move in moves),
        facts={"source": str(found.source.ranks[found.place(rank)])},
    )


def conversion_of(request: RepairRequest, stages: Sequence[int]) -> Conversion:
    """What is converted: the given stages of the source."""
    found = find(request)
    members = range(found.target.tensor)
    return Conversion(
        target=found.target,
        pace=request.pace,
        verify=request.verify,
        overwrite=request.overwrite,
        identity_options=found.identity_options,
        facts={},
        inputs={(n, pp): found.inputs(map(str, found.paths((n, pp)))) for pp in stages for n in members},
        conflicts=(),
        warnings=found.remarks,
        how_to_load=", as MindSpeed-LLM has it (0.8, since MindSpeed-Core-MS r0.4.0 0.12)",
        prepare=partial(_plan, found),
    )
