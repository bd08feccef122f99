"""Prove a result: against its manifests (digest) or against its source, element by element (full).

digest   sizes and CRC-32 of all files, as the manifests say
full     a second, independent reading of every slice, bucket, weight and key (``examine``)
both     manifests of every stage, and the tracker once all stages are there
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

from ckpt2pt.checksums import crc32
from ckpt2pt.errors import MissingInputError, VerificationError
from ckpt2pt.folders import iteration_name, read_tracker
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.publish import STATE, TRACKER, Target, rank_name, read_record
from ckpt2pt.records import Json
from ckpt2pt.request import Request
from ckpt2pt.survey import Survey, survey, target_of
from ckpt2pt.text import short, size, table
from ckpt2pt.verify.examine import MODEL_FILE, OPTIM_FILE, Difference, Examination, Opener
from ckpt2pt.verify.leaves import BLOCK_BYTES, Files, open_pt, spans

Reader = Literal["own", "torch"]
_NAMED_IN_ERROR = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was compared, and every difference."""

    folder: str
    level: str
    differences: tuple[Difference, ...]
    checked_tensors: int
    checked_bytes: int
    ranks: int = 1

    def document(self) -> Json:
        """For ``--output json``."""
        return {
            "folder": self.folder,
            "level": self.level,
            "equal": not self.differences,
            "ranks": self.ranks,
            "checkedTensors": self.checked_tensors,
            "checkedBytes": self.checked_bytes,
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
        }

    def render(self) -> str:
        """A table of the differences and one sentence."""
        rows = [
            (d.file, d.tensor, d.problem, "" if d.index is None else d.index, d.expected, d.found)
            for d in self.differences
        ]
        what = {
            "digest": "sizes and CRC-32 of all files",
            "full": f"{self.checked_tensors} tensors and every other key",
        }
        verdict = f"{len(rows)} differences" if rows else "no difference"
        lines = table(("file", "tensor or key", "problem", "element", "expected", "found"), rows)
        done = f"{self.folder}: {self.ranks} ranks, {what[self.level]}, {size(self.checked_bytes)} read: {verdict}"
        return "\n".join([*lines, *([""] if lines else []), done])

    def raise_differences(self) -> None:
        """Raise :class:`VerificationError` naming the first few; nothing when there are none."""
        if not self.differences:
            return
        shown = "\n  ".join(map(str, self.differences[:_NAMED_IN_ERROR]))
        more = len(self.differences) - _NAMED_IN_ERROR
        raise VerificationError(
            f"{len(self.differences)} differences between the result and its source:\n  {shown}"
            + (f"\n  and {more} more" if more > 0 else ""),
            where=self.folder,
            mend="remove the files that differ and convert again; "
            "if the source or the options changed since, with --overwrite (spec.target.overwrite)",
        )


def verify_rank(request: Request, chosen: Survey, rank: Rank, folder: Path, *, reader: Reader = "own") -> Report:
    """Compare one rank's files in the iteration's ``folder`` with the source and the metadata, all of them."""
    with Files() as files:
        found = Examination(request, chosen, rank, folder, _opener(request, reader), files)
        found.run()
    return Report(
        folder=str(folder),
        level="full",
        differences=tuple(found.differences),
        checked_tensors=found.tensors,
        checked_bytes=found.nbytes,
    )


def verify_target(
    request: Request, stages: Sequence[int], *, level: Literal["digest", "full"], reader: Reader = "own"
) -> Report:
    """Verify the given stages of the checkpoint that the request chooses, where the request puts it."""
    chosen, topology = survey(request), request.topology
    target = target_of(request, chosen)
    if not target.folder.is_dir():
        raise MissingInputError(
            f"there is no result of iteration {target.iteration}",
            where=target.folder,
            mend="convert first, or point spec.target.path (--megatron-path) at the result",
        )
    ranks = [(tp, pp) for pp in stages for tp in range(topology.tensor)]
    reports = [
        _digest_rank(target, rank)
        if level == "digest"
        else verify_rank(request, chosen, rank, target.folder, reader=reader)
        for rank in ranks
    ]
    surplus = _surplus(target.folder, {topology.directory(*rank) for rank in topology.ranks()}, full=request.full)
    differences = [
        *_published(target, stages),
        *(difference for report in reports for difference in report.differences),
        *surplus,
    ]
    return Report(
        folder=str(target.folder),
        level=level,
        differences=tuple(differences),
        checked_tensors=sum(report.checked_tensors for report in reports),
        checked_bytes=sum(report.checked_bytes for report in reports),
        ranks=len(ranks),
    )


def _published(target: Target, stages: Sequence[int]) -> Iterator[Difference]:
    """Claim, manifests of ranks and stages; report and tracker once all stages are there.  Each is the sum of the one before."""
    state, topology = target.state, range(target.tensor)
    yield from _record(state / "claim.json", lambda found: found.get("identity") == target.identity)
    manifests = [read_record(state / f"stage-{pp:03d}.json") for pp in range(target.stages)]
    for pp in stages:
        ranks = [read_record(state / rank_name(tp, pp)) for tp in topology]
        stage = state / f"stage-{pp:03d}.json"
        yield from _record(stage, partial(target.is_of_stage, pp), partial(_joins, ranks))
        for tp in topology:
            yield from _record(state / rank_name(tp, pp), partial(target.is_of_rank, (tp, pp)))
    if all(manifests):
        whole = target.report([manifest for manifest in manifests if manifest])
        ours = target.identity
        yield from _record(
            state / "report.json", lambda found: found.get("identity") == ours, lambda found: found == whole
        )
        named = read_tracker(target.root)
        # A later iteration in the same folder is none of our business, a tracker that leads nowhere is.
        if not named or not (target.root / iteration_name(named)).is_dir():
            yield Difference(
                file=TRACKER, tensor="iteration", problem="does not lead to an iteration",
                expected=str(target.iteration), found=short(named),
            )  # fmt: skip


def _joins(ranks: list[Json | None], stage: Json) -> bool:
    return stage.get("ranks") == ranks


def _record(
    path: Path, ours: Callable[[Json], bool], right: Callable[[Json], bool] | None = None
) -> Iterator[Difference]:
    """What is wrong with a document of ours: it is damaged, of something else, or not the sum of its parts."""
    found, problem = read_record(path), ""
    if found is None:
        problem = "was changed" if path.exists() else "is not there"
    elif not ours(found):
        problem = "is of another conversion or another source"
    elif right is not None and not right(found):
        problem = "tells something else than the manifests that it joins"
    if problem:
        yield Difference(file=f"{STATE}/{path.name}", tensor="record", problem=problem)


def _surplus(folder: Path, ranks: Collection[str], *, full: bool) -> Iterator[Difference]:
    """Checkpoint files of ranks that the conversion does not have, and others in the folders of those that it has."""
    ours = {f"{rank}/{name}" for rank in ranks for name in (MODEL_FILE, *((OPTIM_FILE,) if full else ()))}
    for path in sorted(folder.glob("*/*.pt")):
        name = path.relative_to(folder).as_posix()
        if name not in ours:
            yield Difference(file=name, tensor="file", problem="is there, and should not be")


def _digest_rank(target: Target, rank: Rank) -> Report:
    """Sizes and CRC-32 of a rank's files against its manifest."""
    manifest = read_record(target.state / rank_name(*rank)) or {}
    differences: list[Difference] = []
    total = 0
    for file in cast("list[Json]", manifest.get("files", [])):
        path = str(file["path"])
        try:
            nbytes = (target.folder / path).stat().st_size
        except OSError:
            differences.append(Difference(file=path, tensor="file", problem="is not there"))
            continue
        if nbytes != file["nbytes"]:
            differences.append(
                Difference(
                    file=path,
                    tensor="file",
                    problem="has another size",
                    expected=str(file["nbytes"]),
                    found=str(nbytes),
                )
            )
        elif (crc := f"{_crc32(target.folder / path, nbytes):08x}") != file["crc32"]:
            differences.append(
                Difference(
                    file=path, tensor="file", problem="has another CRC-32", expected=str(file["crc32"]), found=crc
                )
            )
        total += nbytes
    return Report(
        folder=str(target.folder),
        level="digest",
        differences=tuple(differences),
        checked_tensors=0,
        checked_bytes=total,
    )


def _crc32(path: Path, nbytes: int) -> int:
    block, crc = memoryview(bytearray(BLOCK_BYTES)), 0
    with Files() as files:
        for start, stop in spans(nbytes, 1):
            files.read(str(path), start, block[: stop - start])
            crc = crc32(block[: stop - start], crc)
    return crc


def _opener(request: Request, reader: Reader) -> Opener:
    allow = request.rules.pickle_globals
    if reader == "own":
        return partial(open_pt, allow=allow)
    from ckpt2pt.verify.torch_reader import open_with_torch  # noqa: PLC0415 - torch only when asked for

    return lambda path: open_with_torch(path, allow=allow, weights_only=path.name == OPTIM_FILE)
