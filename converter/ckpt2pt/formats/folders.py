"""Folders of checkpoints: the iteration that counts, the files below it, and which file of one folder is which of another's."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ckpt2pt.core.foldernames import TRACKER, iteration_name, iterations, tracked_name
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import InputError, MissingInputError, TargetConflictError, UsageError, ref
from ckpt2pt.io.paths import is_folder, is_there, listing, status
from ckpt2pt.io.text import short
from ckpt2pt.publish import Target, rank_name, read_record, read_tracker
from ckpt2pt.publish.ledger import not_ours
from ckpt2pt.publish.unchanged import changed_file

SUFFIXES = frozenset({".pt", ".ckpt", ".safetensors", ".bin"})
COVERED = "a full conversion of the same source is there, and holds the parameters that are asked for"


def keep_apart(target: Target, read: Mapping[Path | None, str]) -> None:
    """Refuse a result in the place of what it is made from: the same folder, or what is read inside the result's own.

    ``read`` names the options of folders.  Links and mounts give one folder many paths, so the folders are compared.
    """
    for path, option in read.items():
        if path is None or not is_there(path, option):
            continue
        above = (path, *path.resolve().parents) if target.kind.alone else (path,)
        if _is(path, target.root) or any(_is(place, target.folder) for place in above):
            raise UsageError(
                f"the result would take the place of {option}",
                where=f"{target.folder} and {path}",
                hint=f"choose another {target.kind.option}",
            )


def covered(target: Target) -> str:
    """How a full conversion of the same source that is there, and complete, was verified at least; empty without one.

    Raises :class:`TargetConflictError` when one was begun and is not complete: parameters alone would take its place.
    """
    claim = read_record(target.state / "claim.json") or {}
    if target.full or claim.get("full") is not True or not target.base or claim.get("base") != target.base:
        return ""
    names = (rank_name(tp, pp) for pp in range(target.stages) for tp in range(target.tensor))
    ranks = [read_record(target.state / name) for name in names]
    if read_record(target.state / "report.json") and all(rank and target.has_files(rank) for rank in ranks):
        for rank in ranks:
            name = changed_file(target, rank or {})
            if name:
                raise not_ours(target.folder / name, f"run the full conversion again with {target.kind.replace}")
        found = {str(rank.get("verified")) for rank in ranks if rank}
        return next((level for level in ("none", "digest", "full") if level in found), "none")
    raise TargetConflictError(
        f"a full conversion of the same source was begun there by {claim.get('host')}, and is not complete",
        where=target.folder,
        hint=f"finish it: run the full conversion again; or choose another {target.kind.option}",
    )


def _is(one: Path, other: Path) -> bool:
    found, against = status(one), status(other)
    return found is not None and against is not None and os.path.samestat(found, against)


def layout_of(ranks: Sequence[int]) -> Topology | None:
    """Degrees under which exactly these ranks are the representatives: ``0 1 4 5`` is a run of 2, every 4."""
    run = next((n for n, rank in enumerate(ranks) if rank != n), len(ranks))
    if not run or len(ranks) % run:
        return None
    every = ranks[run] if len(ranks) > run else run
    if every % run:
        return None
    stages = len(ranks) // run
    layout = Topology(num_layers=stages, tensor=run, pipeline=stages, data=every // run)
    return layout if sorted(layout.source_rank(*rank) for rank in layout.ranks()) == list(ranks) else None


def pairs(left: Path, right: Path) -> Iterator[tuple[str, Path | None, Path | None]]:
    """Files that belong together, by their place; a file without a partner is paired with None."""
    for path in (left, right):
        if not is_there(path, "the path"):
            raise MissingInputError("the file or folder is not there", where=path, hint="check the two paths")
    folders = [is_folder(path, "the path") for path in (left, right)]
    if folders[0] != folders[1]:
        raise UsageError(
            "one is a folder, the other a file", where=f"{left} and {right}", hint="give two files or two folders"
        )
    if not folders[0]:
        yield (left.name, left, right)
        return
    one, other = checkpoint_files(iteration_folder(left)), checkpoint_files(iteration_folder(right))
    if not one and not other:
        raise MissingInputError(
            "neither folder holds a .pt, .ckpt or .safetensors file",
            where=f"{left} and {right}",
            hint="name the folders that hold the checkpoints",
        )
    _rename(one, other)
    _rename(other, one)
    for name in sorted(one.keys() | other.keys()):
        yield name, one.get(name), other.get(name)


def source_folder(path: Path, iteration: int | None) -> Path:
    """The folder of an iteration, by default of the one that the tracker names."""
    return iteration_folder(path) if iteration is None else of_iteration(path, iteration)


def iteration_folder(folder: Path) -> Path:
    """The iteration that a Megatron root's tracker names, or its only one; any other folder itself."""
    named = read_tracker(folder)
    if tracked_name(named):
        return folder / tracked_name(named)
    if named:
        raise InputError(
            f"the tracker says {short(named)}, which is neither an iteration nor release",
            where=folder / TRACKER,
            hint="write the number of an iteration that is there into it, or name the folder of the iteration itself",
        )
    found = [path for path in iterations(listing(folder, option="the path")) if is_folder(path)]
    if len(found) > 1:
        raise InputError(
            f"{len(found)} iterations and no {TRACKER}",
            where=folder,
            hint=f"name one of them, such as {found[-1]}",
        )
    return found[0] if found else folder


def of_iteration(root: Path, iteration: int) -> Path:
    """The folder of one iteration below a Megatron root, or the folder itself where that is the iteration's."""
    name = iteration_name(iteration)
    found = root if root.name == name else root / name
    if not is_folder(found, ref("source.path")):
        raise MissingInputError(
            f"there is no iteration {iteration}",
            where=found,
            hint=f"leave {ref('source.iteration')} out for the one that the tracker names",
            field="source.iteration",
        )
    return found


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Checkpoint files by their place below ``folder``; names with a dot in front are unfinished or not ours."""
    found: dict[str, Path] = {}
    for path in listing(folder, option="the path"):
        seen = None if path.name.startswith(".") else status(path, "the path")
        if seen is None:
            continue
        if stat.S_ISDIR(seen.st_mode) and not path.is_symlink():
            found |= {f"{path.name}/{name}": inner for name, inner in checkpoint_files(path).items()}
        elif path.suffix in SUFFIXES and stat.S_ISREG(seen.st_mode):
            found[path.name] = path
    return found


def _rename(one: dict[str, Path], other: Mapping[str, Path]) -> None:
    """Give files of ``one`` the place they have in ``other``, where it is clear.

    ``mp_rank_00_000`` is ``mp_rank_00``: the reference writes the suffix with one stage too.  The only file of a rank
    folder is that of the other side, whatever it is called.
    """
    for place in [place for place in one if place not in other]:
        folder, _, name = place.rpartition("/")
        plain = f"{folder.removesuffix('_000')}/{name}"
        rivals = [p for p in one if p.rpartition("/")[0] == folder]
        partners = [p for p in other if p.rpartition("/")[0] == folder and p not in one]
        if folder.endswith("_000") and plain in other and plain not in one:
            one[plain] = one.pop(place)
        elif not place.endswith(".pt") and len(rivals) == len(partners) == 1:
            one[partners[0]] = one.pop(place)
