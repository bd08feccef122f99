"""Prove a result: against its manifests (digest) or against its source, element by element (full).

digest   sizes and CRC-32 of all files, as the manifests say
full     a second, independent reading of every slice, bucket, weight and key (``examine``)
both     claim, manifests, report and tracker (``manifests``); with nothing but a folder they are all that is asked
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

from ckpt2pt.checksums import Piece
from ckpt2pt.ckpt import states_checksum
from ckpt2pt.ckpt.source import paths_for, prove_read
from ckpt2pt.errors import MissingInputError, Spell, UsageError, VerificationError, aside, printable, ref
from ckpt2pt.inputs import InputFile
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.publish import Target
from ckpt2pt.records import Json
from ckpt2pt.request import SILENCE, Advance, Portion, Reporter, Request, unheard
from ckpt2pt.survey import Survey, survey, target_of
from ckpt2pt.system.paths import is_folder, status
from ckpt2pt.text import counted, size, table, warned
from ckpt2pt.verify.copies import copies_of
from ckpt2pt.verify.examine import MODEL_FILE, OPTIM_FILE, Difference, Examination, Opener
from ckpt2pt.verify.leaves import Files, open_pt
from ckpt2pt.verify.manifests import digest_files, published, recorded, recorded_bytes, surplus

Reader = Literal["own", "torch"]
_NAMED_IN_ERROR = 5
_HINT = (
    "remove the files that differ and convert again; "
    f"if the source or the options changed since, let it replace this result{aside('target.overwrite')}"
)
NOTHING_PUBLISHED = "nothing was published: run the same command again; if it differs again, report it with this text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was compared, and every difference."""

    folder: str
    level: str
    differences: tuple[Difference, ...]
    checked_tensors: int
    checked_bytes: int
    ranks: int = 1
    source_checksums: Mapping[str, int] = field(default_factory=dict[str, int])
    warnings: tuple[str, ...] = ()

    def document(self) -> Json:
        """For ``--output json``."""
        return {
            "folder": self.folder,
            "level": self.level,
            "equal": not self.differences,
            "ranks": self.ranks,
            "checkedTensors": self.checked_tensors,
            "checkedBytes": self.checked_bytes,
            "sourceChecksums": dict(self.source_checksums),
            "differences": [
                {
                    "file": d.file,
                    "tensor": d.tensor,
                    "problem": d.problem,
                    "count": d.count,
                    "index": d.index,
                    "expected": d.expected,
                    "found": d.found,
                }
                for d in self.differences
            ],
            "warnings": list(self.warnings),
        }

    def render(self) -> str:
        """A table of the differences and one sentence."""
        rows = [
            (d.file, d.tensor, d.problem, "" if d.index is None else d.index, d.expected, d.found)
            for d in self.differences
        ]
        what = {
            "digest": "sizes and CRC-32 of all files",
            "full": f"{self.checked_tensors:,} tensors and every other key",
        }
        verdict = f"{counted(len(rows), 'difference')}" if rows else "no difference"
        lines = table(("file", "tensor or key", "problem", "element", "expected", "found"), rows)
        verified = self.source_checksums.get("verified", 0)
        what["full"] += f", the checksums of {verified} source files" if verified else ""
        done = (
            f"{printable(str(self.folder))}: {counted(self.ranks, 'rank')}, {what[self.level]}, "
            f"{size(self.checked_bytes)} read: {verdict}"
        )
        return "\n".join([*lines, *([""] if lines else []), *warned(self.warnings), done])

    def raise_differences(self, spell: Spell = str, *, hint: str = _HINT) -> None:
        """Raise :class:`VerificationError` naming the first few; nothing when there are none.  ``spell`` names options."""
        if not self.differences:
            return
        shown = "\n  ".join(map(str, self.differences[:_NAMED_IN_ERROR]))
        more = len(self.differences) - _NAMED_IN_ERROR
        error = VerificationError(
            f"{len(self.differences)} differences between the result and its source:\n  {shown}"
            + (f"\n  and {more} more" if more > 0 else ""),
            where=self.folder,
            hint=hint,
        )
        raise error.spelled(spell)


def verify_rank(
    request: Request,
    chosen: Survey,
    rank: Rank,
    folder: Path,
    *,
    reader: Reader = "own",
    advance: Advance = unheard,
) -> Report:
    """Compare one rank's files in the iteration's ``folder`` with the source and the metadata, all of them.

    Raises :class:`FormatError` for a source that differs from the checksum that it states of itself.
    """
    results = {name: folder / request.topology.directory(*rank) / name for name in _names(request)}
    return _verify_files(request, chosen, rank, results, folder, reader=reader, advance=advance)[0]


def prove_partials(
    request: Request, chosen: Survey, rank: Rank, partials: Mapping[str, Path], *, heed: Callable[[], None]
) -> Mapping[str, int]:
    """The same for files that are to be published, by name, before any of them is; returns the CRC-32 of each.

    ``heed`` is called after every block, and may raise.  Raises :class:`VerificationError` for a difference.
    """
    folder = next(iter(partials.values())).parent
    report, read = _verify_files(request, chosen, rank, partials, folder, advance=lambda _: heed())
    report.raise_differences(hint=NOTHING_PUBLISHED)
    return crcs_of(partials, read)


def crcs_of(results: Mapping[str, Path], read: Mapping[str, Sequence[Piece]]) -> dict[str, int]:
    """CRC-32 of whole files; what was ``read`` of them, by path and sorted, is not read again."""
    found: dict[str, int] = {}
    for name, path in results.items():
        with InputFile(path) as file:
            found[name] = file.crc32(0, file.size, read=read.get(str(path), ()))
    return found


def _verify_files(
    request: Request,
    chosen: Survey,
    rank: Rank,
    results: Mapping[str, Path],
    folder: Path,
    *,
    reader: Reader = "own",
    advance: Advance = unheard,
) -> tuple[Report, Mapping[str, Sequence[Piece]]]:
    if request.source_format == "megatron":
        raise UsageError(
            "the source is a Megatron checkpoint, whose result is not compared here yet",
            where=request.source,
            hint="compare the two: ckpt2pt verify SOURCE RESULT",
        )
    sources = [path for path in paths_for(rank, chosen.files, request) if states_checksum(path)]
    with Files([*sources, *results.values()], advance) as files:
        found = Examination(request, chosen, rank, results, _opener(request, reader), files, advance)
        found.run()
    read = {path: sorted(pieces) for path, pieces in files.pieces.items()}
    checksums = prove_read(rank, chosen.files, request, read, every_byte=True)
    report = Report(
        folder=str(folder),
        level="full",
        differences=tuple(found.differences),
        checked_tensors=found.tensors,
        checked_bytes=found.nbytes,
        source_checksums=checksums,
    )
    return report, read


def _names(request: Request) -> tuple[str, ...]:
    return (MODEL_FILE, OPTIM_FILE) if request.full else (MODEL_FILE,)


def verify_target(
    request: Request,
    stages: Sequence[int],
    *,
    level: Literal["digest", "full"],
    reader: Reader = "own",
    reporter: Reporter = SILENCE,
) -> Report:
    """Verify the given stages of the checkpoint that the request chooses, where the request puts it."""
    chosen, topology = survey(request), request.topology
    target = target_of(request, chosen)
    if not is_folder(target.folder, target.kind.option):
        raise MissingInputError(
            f"there is no result of iteration {target.iteration}",
            where=target.folder,
            hint=f"convert first, or point {ref('target.path')} at the result",
        )
    ranks = [(tp, pp) for pp in stages for tp in range(topology.tensor)]
    names = _names(request)
    if level == "digest":
        reports = _digests(target, ranks, reporter)
    else:
        totals = _to_read(request, chosen, target, ranks, names)
        reports = _reports(
            totals,
            target.iteration,
            reporter,
            lambda rank, advance: verify_rank(request, chosen, rank, target.folder, reader=reader, advance=advance),
        )
    listed = {f"{topology.directory(*rank)}/{name}" for rank in topology.ranks() for name in names}
    report = _joined(target, level, [*published(target, stages), *surplus(target, listed)], reports)
    return replace(report, warnings=tuple(one for pp in stages for one in copies_of(request, chosen, target, pp)))


def _to_read(
    request: Request, chosen: Survey, target: Target, ranks: Sequence[Rank], names: Sequence[str]
) -> dict[Rank, int]:
    """About what a full verification of each rank reads; a source that several ranks share is shared among them."""
    sources = {rank: paths_for(rank, chosen.files, request) for rank in ranks}
    readers = Counter(path for paths in sources.values() for path in paths)

    def nbytes(rank: Rank) -> int:
        results = [target.folder / request.topology.directory(*rank) / name for name in names]
        return sum(_size([path]) // readers[path] for path in sources[rank]) + _size(results)

    return {rank: nbytes(rank) for rank in ranks}


def verify_records(path: Path, *, reporter: Reporter = SILENCE) -> Report:
    """Prove a result by its own records, where neither source nor options are at hand: nothing is missing, changed or added."""
    result = recorded(path)
    reports = _digests(result.target, result.ranks, reporter)
    found = [*published(result.target, range(result.target.stages)), *surplus(result.target, result.files)]
    warnings = tuple(one for pp in range(result.target.stages) for one in _noted(result.target, pp))
    return replace(_joined(result.target, "digest", found, reports), warnings=warnings)


def _noted(target: Target, pp: int) -> list[str]:
    """What the conversion warned of."""
    noted = (target.stage_manifest(pp) or {}).get("warnings")
    return [str(one) for one in cast("list[object]", noted)] if isinstance(noted, list) else []


def _digests(target: Target, ranks: Sequence[Rank], reporter: Reporter) -> list[Report]:
    def check(rank: Rank, advance: Advance) -> Report:
        differences, nbytes = digest_files(target, rank, advance)
        return Report(
            folder=str(target.folder), level="digest", differences=differences, checked_tensors=0, checked_bytes=nbytes
        )

    return _reports({rank: recorded_bytes(target, rank) for rank in ranks}, target.iteration, reporter, check)


def _reports(
    totals: Mapping[Rank, int], iteration: int, reporter: Reporter, check: Callable[[Rank, Advance], Report]
) -> list[Report]:
    """Check rank after rank, and tell how far it is."""
    reports: list[Report] = []
    reporter.begin(totals, iteration)
    for rank, total in totals.items():
        portion = Portion(reporter, rank, total)
        reports.append(check(rank, portion.advance))
        portion.end()
    return reports


def _size(paths: Iterable[Path]) -> int:
    return sum(found.st_size for found in map(status, paths) if found)


def _joined(target: Target, level: str, found: Sequence[Difference], reports: Sequence[Report]) -> Report:
    return Report(
        folder=str(target.folder),
        level=level,
        differences=(*found, *(difference for report in reports for difference in report.differences)),
        checked_tensors=sum(report.checked_tensors for report in reports),
        checked_bytes=sum(report.checked_bytes for report in reports),
        ranks=len(reports),
        source_checksums=sum((Counter(report.source_checksums) for report in reports), Counter[str]()),
    )


def _opener(request: Request, reader: Reader) -> Opener:
    allow = request.rules.pickle_globals
    if reader == "own":
        return partial(open_pt, allow=allow)
    from ckpt2pt.verify.torch_reader import open_with_torch  # noqa: PLC0415 - torch only when asked for

    return lambda path: open_with_torch(path, allow=allow, weights_only=path.name == OPTIM_FILE)
