"""What a result tells of itself: claim, manifests, report and tracker, each the sum of those before; and its files' digests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from ckpt2pt.core.foldernames import (
    TRACKER,
    any_iteration_of,
    mindformers_iteration_name,
    mindformers_iteration_of,
    tracked_name,
    tracked_number,
)
from ckpt2pt.core.progress import Advance, no_progress
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import InputError, MissingInputError
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.io.checksums import crc32
from ckpt2pt.io.paths import is_folder, is_there, listing, status
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import short
from ckpt2pt.publish import (
    HUGGINGFACE,
    MEGATRON,
    MINDFORMERS,
    MINDSPORE,
    STATE,
    TORCH_DIST,
    Target,
    rank_name,
    read_record,
    read_tracker,
)
from ckpt2pt.publish.kinds import CLAIM, MERGED, REPORT
from ckpt2pt.verification.gather import BLOCK_BYTES, Files, spans
from ckpt2pt.verification.report import Difference, Findings

_SPARSE = 1 << 12
_HINT = "name a result of ckpt2pt, or two checkpoints to compare them"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A result as its records have it: its ranks, and the files that they list."""

    target: Target
    ranks: tuple[Rank, ...]
    files: frozenset[str]


def recorded(path: Path) -> list[Recorded]:
    """The result in a folder: an import, an iteration, or the iteration that a Megatron root's tracker names; merged files of each step.

    Which ranks and stages there have to be is known by the manifests above them, so that one that is missing is missed.
    """
    named = tracked_number(read_tracker(path))
    found = [path] if named is None else [path, path / mindformers_iteration_name(named)]
    folder = next((one for one in found if is_folder(one / STATE, "the path")), None) or iteration_folder(path)
    claims = [*listing(folder / STATE, CLAIM), *sorted(listing(folder / STATE, f"*/{CLAIM}"))]
    if not claims:
        raise MissingInputError("ckpt2pt has left no records there", where=folder, hint=_HINT)
    return [_recorded(folder, claim.parent) for claim in claims]


def _recorded(folder: Path, state: Path) -> Recorded:
    claim = read_record(state / CLAIM)
    if claim is None:
        raise InputError("the claim there was changed, so nobody can tell whose result it is", where=state, hint=_HINT)
    report = read_record(state / "report.json") or {}
    briefs = cast("list[Json]", report.get("stages", []))
    stages = [read_record(found) or {} for found in listing(state, "stage-*.json")]
    ranks: dict[Rank, Json] = {}
    for one in (
        *(rank for stage in (*briefs, *stages) for rank in cast("list[Json]", stage.get("ranks") or [])),
        *(read_record(found) or {} for found in listing(state, "rank-*.json")),
    ):
        if "tp" in one:
            ranks[cast("int", one["tp"]), cast("int", one["pp"])] = one
    _check_extent(ranks, stages, state)
    iteration, merged_files = any_iteration_of(folder.name), is_there(state / MERGED)
    target = Target(
        root=folder if iteration is None else folder.parent,
        iteration=cast("int", report.get("iteration", 0)) if iteration is None else iteration,
        identity=str(claim.get("identity")),
        stages=max(len(briefs), len(stages), 1 + max((pp for _, pp in ranks), default=0)),
        tensor=1 + max((tp for tp, _ in ranks), default=0),
        ranks={rank: str(one["identity"]) for rank, one in ranks.items()}
        if iteration is not None or merged_files
        else {},
        kind=replace(MINDSPORE, state=state.relative_to(folder).as_posix()) if iteration is None else MEGATRON,
    )
    files = frozenset(str(file["path"]) for one in ranks.values() for file in cast("list[Json]", one["files"]))
    if any(name.endswith(".distcp") for name in files):
        target = replace(target, kind=TORCH_DIST)
    elif mindformers_iteration_of(folder.name) is not None:
        target = replace(target, kind=MINDFORMERS)
    elif iteration is None and merged_files:
        target = replace(target, kind=HUGGINGFACE)
    return Recorded(target=target, ranks=tuple(sorted(ranks)), files=files)


def _check_extent(ranks: Collection[Rank], stages: Collection[Json], state: Path) -> None:
    """Refuse rank numbers so far above the records there are that looking for all below them would not end."""
    extent = (1 + max((tp for tp, _ in ranks), default=0)) * (1 + max((pp for _, pp in ranks), default=0))
    if extent > _SPARSE * (len(ranks) + len(stages) + 1):
        raise InputError(
            f"the records name tp {max(tp for tp, _ in ranks)} and pp {max(pp for _, pp in ranks)}, "
            f"and there are {len(ranks)} ranks",
            where=state,
            hint=_HINT,
        )


def published(target: Target, stages: Sequence[int]) -> Iterator[Difference]:
    """Claim, manifests of ranks and stages; report and tracker once all stages are there.  Each is the sum of the one before."""
    state, topology = target.state, range(target.tensor)
    yield from _record(state / "claim.json", lambda found: found.get("identity") == target.identity)
    if "swap" in (read_record(state / "claim.json") or {}):
        problem = "tells of a replacement that is half done: run the command that replaces it again"
        yield Difference(file=f"{STATE}/claim.json", tensor="record", problem=problem)
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
    if all(manifests) and target.kind.tracker:
        named = read_tracker(target.root)
        # A later iteration in the same folder is none of our business, a tracker that leads nowhere is.
        number = tracked_number(named)
        place = tracked_name(named) if number is None else target.kind.folder.format(number)
        if not place or not is_folder(target.root / place):
            yield Difference(
                file=TRACKER, tensor="iteration", problem="does not lead to an iteration",
                expected=str(target.iteration), found=short(named),
            )  # fmt: skip


def merged(target: Target) -> Iterator[Difference]:
    """The files that join those of all ranks, once they are there."""
    if not target.kind.merged or not is_there(target.state / REPORT):
        return
    record = target.state / MERGED
    yield from _record(record, lambda found: found.get("identity") == target.identity)
    yield from digests_of(target, read_record(record) or {})[0]


def _joins(ranks: list[Json | None], stage: Json) -> bool:
    return stage.get("ranks") == ranks


def _record(
    path: Path, ours: Callable[[Json], bool], right: Callable[[Json], bool] | None = None
) -> Iterator[Difference]:
    """What is wrong with a document of ours: it is damaged, of something else, or not the sum of its parts."""
    found, problem = read_record(path), ""
    if found is None:
        problem = "was changed" if is_there(path) else "is not there"
    elif not ours(found):
        problem = "is of another conversion or another source"
    elif right is not None and not right(found):
        problem = "tells something else than the manifests that it joins"
    if problem:
        folder = next(one for one in path.parents if one.name == STATE).parent
        yield Difference(file=path.relative_to(folder).as_posix(), tensor="record", problem=problem)


def extra_files(target: Target, listed: Collection[str]) -> Iterator[Difference]:
    """Checkpoint files that no rank of the conversion has, where nothing else may be."""
    alone = target.kind.alone or target.kind.merged
    found = (path for pattern in target.kind.results for path in listing(target.folder, pattern) if alone)
    for name in sorted(path.relative_to(target.folder).as_posix() for path in found):
        if name not in listed:
            yield Difference(file=name, tensor="file", problem="is unexpected")


def recorded_bytes(target: Target, rank: Rank) -> int:
    """Bytes of a rank's files, as its manifest says."""
    manifest = read_record(target.state / rank_name(*rank)) or {}
    return sum(cast("int", file["nbytes"]) for file in cast("list[Json]", manifest.get("files", [])))


def digest_files(
    target: Target, rank: Rank, advance: Advance = no_progress, known: Mapping[str, int] | None = None
) -> tuple[tuple[Difference, ...], int]:
    """Sizes and CRC-32 of a rank's files against its manifest; and how many bytes they have.

    ``known`` are CRC-32 by path of files that were read already, and are not read again.
    """
    return digests_of(target, read_record(target.state / rank_name(*rank)) or {}, advance, known)


def digests_of(
    target: Target, manifest: Json, advance: Advance = no_progress, known: Mapping[str, int] | None = None
) -> tuple[tuple[Difference, ...], int]:
    """The same of the files that a record lists."""
    findings, total = Findings(), 0
    for file in cast("list[Json]", manifest.get("files", [])):
        name = str(file["path"])
        path, found = target.folder / name, status(target.folder / name)
        if found is None:
            findings.differ(name, "file", "is not there")
            continue
        nbytes = found.st_size
        if nbytes != file["nbytes"]:
            findings.differ(name, "file", "has another size", file["nbytes"], nbytes)
        else:
            crc = known[name] if known and name in known else _crc32(path, nbytes, advance)
            if f"{crc:08x}" != file["crc32"]:
                findings.differ(name, "file", "has another CRC-32", file["crc32"], f"{crc:08x}")
        total += nbytes
    return tuple(findings.differences), total


def _crc32(path: Path, nbytes: int, advance: Advance) -> int:
    block, crc = memoryview(bytearray(BLOCK_BYTES)), 0
    with Files(advance=advance) as files:
        for start, stop in spans(nbytes, 1):
            files.read(str(path), start, block[: stop - start])
            crc = crc32(block[: stop - start], crc)
    return crc
