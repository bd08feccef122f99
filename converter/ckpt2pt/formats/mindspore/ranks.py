"""(tp, pp) -> the file to convert, or the files of a whole data-parallel group.  Refuses none, refuses two, and never
looks at mtime.

    V1   rank_{R}/{prefix}_rank_{R}-{epoch}_{step}.{ckpt|safetensors}, meta.json        MindSpeed-Core-MS feature-0.1
    V2   iter_{it}/mp_rank_{tp}[_{pp}]/[{prefix}_]model_optim_rng[_{k}].ckpt, tracker   MindSpeed-Core-MS br_master
    both opt_shard_info/{the same folder}/dist_opt_shard_info*.json                     where there are shards

Which of the two it is, is known by what is there (feature-0.1 83d0ef1 and br_master 07c5198, mindspeed_ms/training).
Converted checkpoints hold ``rank_{R}/network.ckpt``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.foldernames import (
    TRACKER,
    iteration_of,
    iterations,
    model_ranks,
    rank_name,
    rank_of,
    ranks_of,
    tracked_name,
)
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import InputError, MissingInputError, ref, refs
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.mindspore.filenames import UNNAMED, CheckpointId, check_rank, is_passed_by, when_of_name
from ckpt2pt.formats.mindspore.shards import check_ranks, join_shards, read_info
from ckpt2pt.io.inputs import InputFile, read_head
from ckpt2pt.io.jsontext import parse_json
from ckpt2pt.io.paths import is_folder, is_there, listing

_MAX_META_BYTES = 1 << 16
SUFFIXES = ("ckpt", "safetensors")
_listing = partial(listing, option=InputFile.option)
_is_folder, _is_there = (partial(look, option=InputFile.option) for look in (is_folder, is_there))
_MODEL = re.compile(r"(?:.*_)?model_optim_rng(?:_(?P<member>\d{3}))?(?P<merged>_dp_merged)?\.(?:ckpt|safetensors)")
SHARD_INFO = "opt_shard_info"

Key = tuple[int, int]
"""(tp, pp)"""
Wanted = tuple[str | None, bool]
"""(format or None for either, whether files merged from shards count)"""
_Member = tuple[int, int, int]
"""(tp, pp, place in the data x context group)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One candidate; with ``peers`` a group of them that is read as one.

    ``peers`` are the files of the data x context group in ascending order of their ranks, this one first, and ``info``
    describes the shards in them.  ``beside`` are other files of the same rank.
    """

    path: Path
    when: CheckpointId
    merged: bool
    peers: tuple[Path, ...] = ()
    info: Path | None = None
    beside: tuple[Path, ...] = ()
    ranks: tuple[int, ...] = ()
    """The global ranks of the group, where somebody has to know them."""

    @property
    def named(self) -> CheckpointId | None:
        """(epoch, step) of the name, None when the name does not say."""
        return None if self.when == UNNAMED else self.when

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every checkpoint file that is read."""
        return (self.peers or (self.path,)) + self.beside


def rank_folder(root: Path, rank: int) -> Path:
    """``root/rank_R``."""
    return root / rank_name(rank)


def find_sources(
    root: Path, topology: Topology, *, wanted_format: str | None = None, merged: bool = True
) -> dict[CheckpointId, dict[Key, SourceFile]]:
    """Every checkpoint that is there in all (tp, pp): (epoch, step) -> (tp, pp) -> file.  Newest last.

    ``wanted_format`` is ``ckpt``, ``safetensors`` or None for either; without ``merged`` what was merged from shards is
    left out, and so it is while only some ranks have it: their shards are whole.  Raises :class:`MissingInputError` for
    missing folders and files, :class:`InputError` when ranks disagree or a rank has two files of one step.
    """
    members = [(tp, pp, 0) for tp, pp in topology.ranks()]
    found = _complete(root, topology, members, (wanted_format, merged))
    if any(len({file.merged for file in files.values()}) > 1 for files in found.values()):
        with suppress(InputError, MissingInputError):  # nothing but the mixture is there
            alike = {when: files for when, files in found.items() if len({f.merged for f in files.values()}) == 1}
            found = _complete(root, topology, members, (wanted_format, False)) | alike
            found = {when: found[when] for when in sorted(found)}
    return {when: {(tp, pp): file for (tp, pp, _), file in files.items()} for when, files in found.items()}


def find_groups(
    root: Path,
    topology: Topology,
    found: Mapping[CheckpointId, Mapping[Key, SourceFile]],
    *,
    sharded: Callable[[Path], bool],
    info: Path | None = None,
    wanted_format: str | None = None,
) -> dict[CheckpointId, dict[Key, SourceFile]]:
    """Give every checkpoint whose files hold shards its groups; one that lacks a rank of them is left out.

    ``sharded`` looks into a file; ``info`` is the folder of the shard descriptions (None: ``opt_shard_info`` beside the
    ranks).  Raises :class:`InputError` when no checkpoint is left, :class:`MissingInputError` when a description is missing.
    """
    if info is not None and not _is_folder(info):
        raise MissingInputError(
            "the folder of shard descriptions is not there",
            where=info,
            hint=f"check {ref('source.optShardInfoPath')}, or leave it out",
            field="source.optShardInfoPath",
        )
    shards = {when for when, files in found.items() if sharded(next(iter(files.values())).path)}
    if not shards:
        return {when: dict(files) for when, files in found.items()}
    count = topology.data * topology.context
    members = [(tp, pp, number) for tp, pp in topology.ranks() for number in range(count)]
    try:
        complete = _complete(root, topology, members, (wanted_format, False))
    except InputError:
        if shards == set(found):
            raise
        complete = {}
    kept = {when: dict(files) for when, files in found.items() if when not in shards or when in complete}
    if not kept:
        raise InputError(
            "no checkpoint with shards is there in all data-parallel ranks; those of all ranks are of steps "
            + _some(sorted(complete), "{0[0]}_{0[1]}"),
            where=root,
            hint="wait until every rank has saved, or remove what a broken save has left",
        )
    folder = info or _info_folder(root)
    for when in shards & kept.keys():
        for tp, pp in kept[when]:
            peers = tuple(complete[when][tp, pp, number].path for number in range(count))
            file = _info_file(folder, topology, (tp, pp))
            if (tp, pp) == (0, 0):  # a wrong degree is reported as such, and not as a file missing further on
                check_ranks(read_info(file), topology.group(tp, pp))
            kept[when][tp, pp] = replace(kept[when][tp, pp], peers=peers, info=file)
    return kept


def extra_files(root: Path, when: CheckpointId | None, wanted: Iterable[str]) -> list[str]:
    """Folders of ranks, or of V2's models, that hold files of a checkpoint and are not ``wanted``: names, by number.

    Without ``when`` V2's newest iteration counts, and no folders of ranks.
    For ``combine``, which takes the degrees from descriptions.  ``convert`` is given them, and what a larger run has left
    beside its ranks is not looked at.
    """
    iterations = _iterations(root)
    if when is None and not iterations:
        return []
    when = max(iterations) if when is None else when
    there = _listing(iterations.get(when, root))
    named = model_ranks(there).values() if iterations else [path for path in there if rank_of(path.name) is not None]
    folders = [path for path in named if _is_folder(path)]
    other = {path.name for path in folders}.difference(wanted)
    return [
        path.name
        for path in sorted(folders, key=lambda path: (len(path.name), path.name))
        if path.name in other and any(_is_shard(file.name, None if iterations else when) for file in _listing(path))
    ]


def _is_shard(name: str, when: CheckpointId | None) -> bool:
    fits = when is None or when_of_name(name) == when
    return fits and name.endswith(SUFFIXES) and "_dp_merged" not in name and not is_passed_by(name)


def names_of(topology: Topology) -> set[str]:
    """Every folder of every rank, in both layouts."""
    models = {topology.directory(*key) for key in topology.ranks()}
    return models | {rank_name(rank) for key in topology.ranks() for rank in topology.group(*key)}


def index_source(
    file: SourceFile, ranks: Sequence[int], header: Callable[[Path], Mapping[str, TensorRef]] = index_file
) -> Mapping[str, TensorRef]:
    """The tensors of one (tp, pp), whose group are ``ranks``; shards are joined in place.  ``header`` indexes a file."""
    if file.info is None:
        return header(file.path)
    info = read_info(file.info)
    check_ranks(info, ranks)
    return join_shards(file.peers, info)


def _complete(
    root: Path, topology: Topology, members: Sequence[_Member], wanted: Wanted
) -> dict[CheckpointId, dict[_Member, SourceFile]]:
    """The checkpoints that all of ``members`` have."""
    if not _is_folder(root):
        raise MissingInputError(
            "the source folder is not there",
            where=root,
            hint=f"point {ref('source.path')} at the training output",
            field="source.path",
        )
    iterations = _iterations(root)
    if iterations:
        by_member = _by_model_rank(root, iterations, topology, members, wanted)
    else:
        by_member = _by_rank(root, topology, members, wanted)
    first, *others = (set(found) for found in by_member.values())
    common = first.intersection(*others)
    if not common:
        raise InputError(
            "no checkpoint is complete on all ranks: "
            + "; ".join(
                f"{_label(topology, member, v2=bool(iterations))} has {_some(sorted(found), '{0[0]}_{0[1]}')}"
                for member, found in _telling(by_member)
            ),
            where=root,
            hint="wait until every rank has saved, or remove what a broken save has left",
        )
    if UNNAMED in common and len(common) > 1 and not iterations:
        files = next(iter(by_member.values()))
        raise InputError(
            f"files with and without a step in their name: {', '.join(files[when].path.name for when in sorted(common)[:6])}",
            where=files[UNNAMED].path.parent,
            hint="leave one kind in the rank folders, or move the other away",
        )
    return {when: {member: found[when] for member, found in by_member.items()} for when in sorted(common)}


def _telling(
    by_member: Mapping[_Member, Mapping[CheckpointId, SourceFile]], limit: int = 6
) -> list[tuple[_Member, Mapping[CheckpointId, SourceFile]]]:
    """A few members, the first of each different set of steps before others."""
    seen: dict[frozenset[CheckpointId], _Member] = {}
    for member, found in by_member.items():
        seen.setdefault(frozenset(found), member)
    order = [*seen.values(), *(member for member in by_member if member not in seen.values())]
    return [(member, by_member[member]) for member in sorted(order[:limit], key=list(by_member).index)]


def _label(topology: Topology, member: _Member, *, v2: bool) -> str:
    tp, pp, number = member
    if v2:
        return topology.directory(tp, pp) + (f" member {number}" if number else "")
    return rank_name(topology.group(tp, pp)[number])


# ---------------------------------------------------------------------------------------------------- V1: rank folders


def _by_rank(
    root: Path, topology: Topology, members: Sequence[_Member], wanted: Wanted
) -> dict[_Member, dict[CheckpointId, SourceFile]]:
    ranks = {member: topology.group(member[0], member[1])[member[2]] for member in members}
    missing = sorted(rank for rank in ranks.values() if not _is_folder(rank_folder(root, rank)))
    if missing:
        there = ranks_of(path.name for path in _listing(root))
        raise MissingInputError(
            f"{len(missing)} of {len(ranks)} rank folders are missing: {_some(missing, 'rank_{}')}"
            f" (there are {_some(there, 'rank_{}')})",
            where=root,
            hint=f"check {ref('parallelism')} of the training that wrote it, and {ref('source.path')}",
        )
    return {member: candidates(rank_folder(root, rank), wanted) for member, rank in ranks.items()}


def last_saved(root: Path, topology: Topology) -> CheckpointId | None:
    """The last save that every rank reports: V2's tracker, or V1's ``meta.json`` if all of them have one; else None.

    The training opens both without truncating them, so a shorter rewrite leaves the tail of the older one.
    """
    if _iterations(root):
        return _tracked(root)
    seen: list[CheckpointId] = []
    for key in topology.ranks():
        path = rank_folder(root, topology.source_rank(*key)) / "meta.json"
        try:
            document = parse_json(_small(path), first=True)
        except ValueError:
            return None
        if not isinstance(document, dict):
            return None
        meta = cast("Mapping[str, object]", document)
        epoch, step = meta.get("last_epoch"), meta.get("last_step")
        if type(epoch) is not int or type(step) is not int:
            return None
        seen.append((epoch, step))
    return min(seen)


def choose(found: Iterable[CheckpointId], named: CheckpointId | None) -> CheckpointId:
    """The newest checkpoint by what the training reports, else by epoch and step."""
    whens = sorted(found)
    return named if named in whens else whens[-1]


def candidates(folder: Path, wanted: Wanted) -> dict[CheckpointId, SourceFile]:
    """The checkpoints of one rank folder; raises :class:`MissingInputError` for none, :class:`InputError` for two of one step."""
    found: dict[CheckpointId, SourceFile] = {}
    for path in _listing(folder):
        suffix = path.suffix[1:]
        if suffix not in SUFFIXES or (wanted[0] and suffix != wanted[0]) or is_passed_by(path.name):
            continue
        if "_dp_merged" in path.name and not wanted[1]:
            continue
        check_rank(path)
        _take(found, SourceFile(path=path, when=when_of_name(path.name), merged="_dp_merged" in path.name))
    if not found:
        raise MissingInputError(
            f"no {wanted[0] or 'ckpt or safetensors'} file",
            where=folder,
            hint=f"check {refs('source.path', 'source.format')}",
        )
    return found


def _take(found: dict[CheckpointId, SourceFile], file: SourceFile) -> None:
    """Keep a candidate; a merged file goes before shards of the same step, and two alike are one too many."""
    rival = found.get(file.when)
    if rival is None or (file.merged and not rival.merged):
        found[file.when] = file
    elif file.merged == rival.merged:
        raise InputError(
            f"two files of one step: {rival.path.name} and {file.path.name}",
            where=file.path.parent,
            hint=f"choose with {ref('source.format')}, or move one of them away",
        )


# ----------------------------------------------------------------------------------------------- V2: iteration folders


def _iterations(root: Path) -> dict[CheckpointId, Path]:
    """Folders of iterations in ``root``, or ``root`` itself when it is one; empty for any other layout.

    Megatron's own results look the same, but hold no checkpoint file of MindSpore.
    """
    found: dict[CheckpointId, Path] = {}
    for folder in (root, *iterations(_listing(root))) if _is_folder(root) else ():
        if folder == root or _is_folder(folder):
            places = (path for path in model_ranks(_listing(folder)).values() if _is_folder(path))
            if any(path.suffix[1:] in SUFFIXES for place in places for path in _listing(place)):
                found[_when(folder.name)] = folder
    return found


def _by_model_rank(
    root: Path,
    iterations: Mapping[CheckpointId, Path],
    topology: Topology,
    members: Sequence[_Member],
    wanted: Wanted,
) -> dict[_Member, dict[CheckpointId, SourceFile]]:
    found: dict[_Member, dict[CheckpointId, SourceFile]] = {member: {} for member in members}
    for when, folder in iterations.items():
        for tp, pp in dict.fromkeys((tp, pp) for tp, pp, _ in members):  # a folder holds the files of a whole group
            place = folder / topology.directory(tp, pp)
            for path in _listing(place) if _is_folder(place) else ():
                name = _MODEL.fullmatch(path.name)
                files = found.get((tp, pp, int(name["member"] or 0))) if name else None
                if (
                    name
                    and files is not None
                    and wanted[0] in {None, path.suffix[1:]}
                    and (wanted[1] or not name["merged"])
                ):
                    check_rank(path)
                    _take(files, SourceFile(path=path, when=when, merged=bool(name["merged"])))
    missing = [member for member, files in found.items() if not files]
    if missing:
        newest = iterations[max(iterations)]
        there = sorted(path.name for path in model_ranks(_listing(newest)).values())
        raise MissingInputError(
            f"{len(missing)} of {len(members)} model files are in no iteration, first that of "
            f"{_label(topology, missing[0], v2=True)} (there are {', '.join(there[:8]) or 'none'})",
            where=newest,
            hint=f"check {ref('parallelism')} of the training that wrote it, and {ref('source.format')}",
        )
    return found


def _tracked(root: Path) -> CheckpointId | None:
    try:
        named = tracked_name(_small(root / TRACKER).decode(), overwritten=True)
    except UnicodeDecodeError:
        return None
    return _when(named) if named else None


def _when(name: str) -> CheckpointId:
    """Of a folder: V2 counts no epochs, and ``release`` has no step."""
    iteration = iteration_of(name)
    return UNNAMED if iteration is None else (0, iteration)


def _small(path: Path) -> bytes:
    """The beginning of a small file of the training; empty where there is none."""
    return read_head(path, InputFile.option, _MAX_META_BYTES) if _is_there(path) else b""


# ------------------------------------------------------------------------------------------- descriptions of the shards


def _info_folder(root: Path) -> Path:
    """``opt_shard_info`` beside the ranks or the iterations."""
    above = [root, root.parent] if root in _iterations(root).values() else [root]
    return next((folder / SHARD_INFO for folder in above if _is_folder(folder / SHARD_INFO)), root / SHARD_INFO)


def _info_file(folder: Path, topology: Topology, key: Key) -> Path:
    """The description of one group: its first rank's, whichever layout wrote it."""
    places = [rank_name(rank) for rank in topology.group(*key)] + [topology.directory(*key)]
    for place in places:
        found = _listing(folder / place, "dist_opt_shard_info*.json")
        if len(found) > 1:
            raise InputError(
                f"two descriptions of one group's shards: {found[0].name} and {found[1].name}",
                where=folder / place,
                hint="leave the one of the run that wrote the shards",
            )
        if found:
            check_rank(found[0])
            return found[0]
    raise MissingInputError(
        f"the ranks hold data-parallel shards, and nothing describes them: no {places[0]}/dist_opt_shard_info*.json",
        where=folder,
        hint=f"point {ref('source.optShardInfoPath')} at the opt_shard_info folder of the training",
        field="source.optShardInfoPath",
    )


def _some(items: Sequence[int] | Sequence[CheckpointId], form: str) -> str:
    shown = ", ".join(form.format(item) for item in items[:8])
    return (shown or "none") + (f" and {len(items) - 8} more" if len(items) > 8 else "")
