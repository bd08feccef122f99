"""Prove a result: against its manifests (digest) or against its source, element by element (full).

digest   sizes and CRC-32 of all files, as the manifests say
full     a second, independent reading of every slice, bucket, weight and key (``examine``)
both     claim, manifests, report and tracker (``manifests``); with nothing but a folder they are all that is asked
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

from ckpt2pt.core.foldernames import iterations
from ckpt2pt.core.index import Collector, Index
from ckpt2pt.core.progress import SILENCE, Advance, Portion, Reporter, no_progress
from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover import Discovered, discover, meta_of, only_growing, target_of
from ckpt2pt.discover.checkpoint import kind_of
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import Ckpt2ptError, InputError, MissingInputError, UsageError, ref
from ckpt2pt.formats.megatron.headers import MegatronRank, read_files
from ckpt2pt.formats.megatron.read import collect_rank
from ckpt2pt.formats.mindspore import states_checksum
from ckpt2pt.formats.mindspore.source import paths_for
from ckpt2pt.formats.ptmeta.metadata import RankMeta, data_parallel_size
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.io.checksums import Piece
from ckpt2pt.io.inputs import InputFile
from ckpt2pt.io.paths import is_folder, listing, status
from ckpt2pt.publish import STATE, Target
from ckpt2pt.verification.copies import copies_of
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.leaves import Leaves, TensorLeaf, open_pt
from ckpt2pt.verification.manifests import digest_files, extra_files, merged, published, recorded, recorded_bytes
from ckpt2pt.verification.report import NOTHING_PUBLISHED, Difference, Findings, Report
from ckpt2pt.verification.source import held_for
from ckpt2pt.verification.structure import MODEL_FILE, OPTIM_FILE, Chunk, Structure, chunks_of, others
from ckpt2pt.verification.tensors import Place, TensorComparison

Reader = Literal["own", "torch"]


def verify_rank(
    request: Request,
    chosen: Discovered,
    rank: Rank,
    folder: Path,
    *,
    reader: Reader = "own",
    advance: Advance = no_progress,
) -> Report:
    """Compare one rank's files in the iteration's ``folder`` with the source and the metadata, all of them.

    Raises :class:`FormatError` for a source that differs from the checksum that it states of itself.
    """
    results = {name: folder / request.topology.directory(*rank) / name for name in _names(request)}
    return _verify_files(request, chosen, rank, results, folder, reader=reader, advance=advance)[0]


def prove_partials(
    request: Request, chosen: Discovered, rank: Rank, partials: Mapping[str, Path], *, heed: Callable[[], None]
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
    chosen: Discovered,
    rank: Rank,
    results: Mapping[str, Path],
    folder: Path,
    *,
    reader: Reader = "own",
    advance: Advance = no_progress,
) -> tuple[Report, Mapping[str, Sequence[Piece]]]:
    archives = request.from_megatron
    sources = [path for path in paths_for(rank, chosen.files, request) if archives or states_checksum(path)]
    findings = Findings(request.topology.directory(*rank))
    with Files([*sources, *results.values()], advance) as files:
        _compare(request, chosen, rank, results, findings, files, reader)
        _check_crcs(results, findings, files, advance)
    read = {path: sorted(pieces) for path, pieces in files.pieces.items()}
    checksums = kind_of(request).prove_read(request, chosen, rank, read, every_byte=True)
    return findings.report(folder, files.nbytes, checksums), read


@only_growing()
def _compare(
    request: Request,
    chosen: Discovered,
    rank: Rank,
    results: Mapping[str, Path],
    findings: Findings,
    files: Files,
    reader: Reader,
) -> None:
    """The structure of the files first, then the elements of their tensors."""
    allow, pp = request.rules.pickle_globals, rank[1]
    meta = meta_of(request, rank)
    held, statement = held_for(request, chosen, rank, meta)
    divisor = request.target_data or data_parallel_size(meta.template)
    chunks = chunks_of(meta, request.topology, pp, divisor, findings)
    structure = Structure(chunks, findings, files)
    read = _opener(reader, allow)
    leaves = {name: _opened(name, path, findings, read) for name, path in results.items()}
    refused = Findings(findings.directory)
    stored = _stored(results, refused, allow) if all(leaves.values()) else None
    if model := leaves[MODEL_FILE]:
        template, samples = read(Path(meta.template.path)), request.reference_samples
        structure.check_model(model)
        known = len(findings.differences)
        structure.check_rest(others(template, chosen.training_step, statement, reference_samples=samples), model)
        if (
            stored and len(findings.differences) == known
        ):  # else what was changed has been reported, and the rest is as it should be
            for rule in replace(meta, template=stored.template).unmet(
                request.topology, full=request.full, checkpoint=True
            ):
                findings.differ(MODEL_FILE, rule.key, f"{rule.problem}: Megatron-LM 0.6 cannot load it")
    if optim := leaves.get(OPTIM_FILE):
        structure.check_optimizer(optim)
    result: Index = _index(request, pp, stored, chunks, meta, refused) if stored else {}
    if not findings.differences:  # else the structure tells more of what a reader cannot read
        findings.differences += refused.differences
    places = {key: place for chunk in chunks for key, place in chunk.places(held.roles)}
    TensorComparison(held, rank, result, places, findings, files).run()
    if reader == "torch":
        again = Findings(findings.directory, findings.differences)  # which does not count the tensors twice
        _check_torch(leaves, results, result, places, again, allow)


def _opened(name: str, path: Path, findings: Findings, read: Callable[[Path], Leaves]) -> Leaves:
    """A result's leaves; a file that cannot be read is a difference and not an error."""
    try:
        return read(path)
    except (InputError, MissingInputError) as error:
        findings.differ(name, "file", _first_line(error))
        return {}


def _opener(reader: Reader, allow: Collection[str]) -> Callable[[Path], Leaves]:
    if reader == "own":
        return partial(open_pt, allow=allow)
    from ckpt2pt.verification.torch_reader import open_with_torch  # noqa: PLC0415 - torch only when asked for

    return lambda path: open_with_torch(path, allow=allow, weights_only=path.name == OPTIM_FILE)


def _check_torch(
    loaded: Mapping[str, Leaves],
    results: Mapping[str, Path],
    result: Index,
    places: Mapping[Key, Place],
    findings: Findings,
    allow: Collection[str],
) -> None:
    """That what was compared with the source lies at the keys that loaders look for, and that torch loads just that."""
    own = {name: open_pt(results[name], allow=allow) for name, leaves in loaded.items() if leaves}
    for key in result.keys() & places.keys():
        place, views = places[key], result[key].views
        leaf = own[place.file].get(place.leaf)
        if isinstance(leaf, TensorLeaf) and any(view.storage != leaf.extents for view in views if view.numel):
            findings.differ(place.file, place.leaf, "is not where the tensor lies that was compared")
    with Files() as files:
        for name, leaves in own.items():
            ours, theirs = (
                {path: leaf for path, leaf in each.items() if isinstance(leaf, TensorLeaf)}
                for each in (leaves, loaded[name])
            )
            Structure((), findings, files).check_leaves(name, ours, theirs)


def _stored(results: Mapping[str, Path], refused: Findings, allow: tuple[str, ...]) -> MegatronRank | None:
    """What the reader of Megatron's checkpoints finds in a rank's files."""
    try:
        return read_files(results[MODEL_FILE], results.get(OPTIM_FILE), allow=allow)
    except (InputError, MissingInputError) as error:
        refused.differ(MODEL_FILE, "file", _first_line(error))
        return None


def _index(
    request: Request, pp: int, stored: MegatronRank, chunks: Sequence[Chunk], meta: RankMeta, refused: Findings
) -> Index:
    """The tensors of a rank's files; none where its buckets have other sizes, as the structure tells."""
    sizes = [[(bucket.numel, bucket.numel_unpadded) for bucket in buffer] for buffer in stored.buffers or ()]
    if request.full and sizes != [[*chunk.buckets] for chunk in chunks if chunk.buckets]:
        return {}
    buffers = {chunk.vpp: (chunk.buffer,) for chunk in meta.chunks if chunk.buffer and request.full}
    collector = Collector(1, str(stored.folder))
    try:
        collect_rank(collector, (0, pp), stored, request.topology, [buffers.get(vpp, ()) for vpp in range(len(chunks))])
        return collector.index(partial=True)
    except InputError as error:
        refused.differ(MODEL_FILE, "file", _first_line(error))
        return {}


def _check_crcs(results: Mapping[str, Path], findings: Findings, files: Files, advance: Advance) -> None:
    """Records whose checksums are wrong are reported first; what was compared is not read again."""
    earlier, findings.differences = findings.differences, []
    unreadable = {one.file for one in earlier if one.tensor == "file"}
    for name, path in results.items():
        if f"{findings.directory}/{name}" in unreadable:
            continue
        try:
            Archive.open(path).verify_crcs(sorted(files.pieces.get(str(path), ())), advance)
        except InputError as error:
            findings.differ(name, "file", _first_line(error))
    findings.differences += earlier


def _first_line(error: Ckpt2ptError) -> str:
    return error.what.splitlines()[0]


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
    chosen, topology = discover(request), request.topology
    target = target_of(request, chosen)
    check_there(target)
    ranks = [(tp, pp) for pp in stages for tp in range(topology.tensor)]
    if request.files:
        return _verify_mindspore(request, chosen, target, ranks, stages, level, reader, reporter)
    names = _names(request)
    if level == "digest":
        reports = digests(target, ranks, reporter)
    else:
        totals = _to_read(request, chosen, target, ranks, names)
        reports = reports_of(
            totals,
            target.iteration,
            reporter,
            lambda rank, advance: verify_rank(request, chosen, rank, target.folder, reader=reader, advance=advance),
        )
    listed = {f"{topology.directory(*rank)}/{name}" for rank in topology.ranks() for name in names}
    report = joined(target, level, [*published(target, stages), *extra_files(target, listed)], reports)
    return replace(report, warnings=tuple(one for pp in stages for one in copies_of(request, chosen, target, pp)))


def _verify_mindspore(
    request: Request,
    chosen: Discovered,
    target: Target,
    ranks: Sequence[Rank],
    stages: Sequence[int],
    level: Literal["digest", "full"],
    reader: Reader,
    reporter: Reporter,
) -> Report:
    from ckpt2pt.verification.imported import verify_import_of_rank  # noqa: PLC0415 - which imports this one

    if reader != "own":
        raise UsageError(
            f"{ref('reader')} is torch, and torch reads no file of MindSpore",
            where=ref("spec"),
            hint=f"leave {ref('reader')} out",
            field="reader",
        )
    if level == "digest":
        reports = digests(target, ranks, reporter)
    else:
        totals = {rank: recorded_bytes(target, rank) for rank in ranks}
        compare = partial(verify_import_of_rank, request, chosen, target)
        reports = reports_of(totals, target.iteration, reporter, compare)
    return joined(target, level, [*published(target, stages)], reports)


def check_there(target: Target) -> None:
    """Refuse to verify what is not there."""
    if not is_folder(target.folder, target.kind.option):
        raise MissingInputError(
            f"there is no result of iteration {target.iteration}",
            where=target.folder,
            hint=f"convert first, or point {ref('target.path')} at the result",
            field="target.path",
        )


def _to_read(
    request: Request, chosen: Discovered, target: Target, ranks: Sequence[Rank], names: Sequence[str]
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
    results = recorded(path)
    width = max(result.target.tensor for result in results)
    held = {  # merged files of several steps have ranks of the same numbers
        (number * width + tp, pp): (result.target, (tp, pp))
        for number, result in enumerate(results)
        for tp, pp in result.ranks
    }
    home = results[0].target
    reports = _digests(held, home.iteration, reporter)
    found: list[Difference] = []
    warnings: list[str] = []
    for target, files in ((result.target, result.files) for result in results):
        stages = range(target.stages)
        found += [*published(target, stages), *merged(target), *extra_files(target, files | {*target.kind.merged})]
        warnings += (one for pp in stages for one in _noted(target, pp))
    if not home.kind.alone:
        warnings += (
            f"{folder.name} is a result of its own, which was not verified: give its folder"
            for folder in iterations(listing(home.folder))
            if is_folder(folder / STATE)
        )
    return replace(joined(home, "digest", found, reports), warnings=tuple(warnings))


def _noted(target: Target, pp: int) -> list[str]:
    """What the conversion warned of."""
    noted = (target.stage_manifest(pp) or {}).get("warnings")
    return [str(one) for one in cast("list[object]", noted)] if isinstance(noted, list) else []


def digests(target: Target, ranks: Sequence[Rank], reporter: Reporter) -> list[Report]:
    """Every file of these ranks, by the size and the CRC-32 in its manifest."""
    return _digests({rank: (target, rank) for rank in ranks}, target.iteration, reporter)


def _digests(held: Mapping[Rank, tuple[Target, Rank]], iteration: int, reporter: Reporter) -> list[Report]:
    def check(key: Rank, advance: Advance) -> Report:
        target, rank = held[key]
        differences, nbytes = digest_files(target, rank, advance)
        return Report(
            folder=str(target.folder), level="digest", differences=differences, checked_tensors=0, checked_bytes=nbytes
        )

    totals = {key: recorded_bytes(target, rank) for key, (target, rank) in held.items()}
    return reports_of(totals, iteration, reporter, check)


def reports_of(
    totals: Mapping[Rank, int], iteration: int, reporter: Reporter, check: Callable[[Rank, Advance], Report]
) -> list[Report]:
    """Check rank after rank, and report how far it is."""
    reports: list[Report] = []
    reporter.begin(totals, iteration)
    for rank, total in totals.items():
        portion = Portion(reporter, rank, total)
        reports.append(check(rank, portion.advance))
        portion.end()
    return reports


def _size(paths: Iterable[Path]) -> int:
    return sum(found.st_size for found in map(status, paths) if found)


def joined(target: Target, level: str, found: Sequence[Difference], reports: Sequence[Report]) -> Report:
    """One report of all ranks, and of what was ``found`` of them together."""
    return Report(
        folder=str(target.folder),
        level=level,
        differences=(*found, *(difference for report in reports for difference in report.differences)),
        checked_tensors=sum(report.checked_tensors for report in reports),
        checked_bytes=sum(report.checked_bytes for report in reports),
        ranks=len(reports),
        source_checksums=sum((Counter(report.source_checksums) for report in reports), Counter[str]()),
    )
