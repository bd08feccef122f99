"""(tp, pp) -> rank folder -> the one file to convert.  Refuses none, refuses two, and never looks at mtime.

The layout is that of MindSpeed-Core-MS feature-0.1 (mindspeed_ms/training/utils.py): ``rank_R/`` with
``{prefix}_rank_{R}-{epoch}_{step}.{ckpt|safetensors}`` and ``meta.json``; converted ones hold ``network.ckpt``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ckpt2pt.errors import FileAccessError, InputError, MissingInputError
from ckpt2pt.mapping.topology import Topology

SUFFIXES = ("ckpt", "safetensors")
_NAMED = re.compile(r".*-(?P<epoch>\d{1,12})_(?P<step>\d{1,12})(?P<merged>_dp_merged)?\.(?:ckpt|safetensors)")
_GLOBAL = re.compile(r".*_rank_\d+_(?P<step>\d{1,12})(?P<merged>_dp_merged)?\.(?:ckpt|safetensors)")
_SKIPPED = re.compile(r"\..*|.*_best_rank_\d+-.*|.*_breakpoint\.ckpt|.*\.tmp|stratey\d+\.ckpt|strategy\d+\.ckpt")

When = tuple[int, int]
"""(epoch, step) as in a file's name; files without one share ``UNNAMED``."""
UNNAMED: When = (-1, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One candidate in a rank folder."""

    path: Path
    when: When
    merged: bool

    @property
    def named(self) -> When | None:
        """(epoch, step) of the name, None when the name does not say."""
        return None if self.when == UNNAMED else self.when


def rank_folder(root: Path, rank: int) -> Path:
    """``root/rank_R``."""
    return root / f"rank_{rank}"


def find_sources(
    root: Path, topology: Topology, *, wanted_format: str | None = None
) -> dict[When, dict[tuple[int, int], SourceFile]]:
    """Every checkpoint that is there in all ranks: (epoch, step) -> (tp, pp) -> file.  Newest last.

    ``wanted_format`` is ``ckpt``, ``safetensors`` or None for either.  Raises :class:`MissingInputError` for missing
    folders and files, :class:`InputError` when ranks disagree or a rank has two files of one step.
    """
    if not root.is_dir():
        raise MissingInputError(
            "the source folder is not there",
            where=root,
            mend="point spec.source.path (--ms-path) at the training output",
        )
    ranks = {key: topology.source_rank(*key) for key in topology.ranks()}
    missing = [rank for rank in ranks.values() if not rank_folder(root, rank).is_dir()]
    if missing:
        there = sorted(int(p.name[5:]) for p in _listing(root) if re.fullmatch(r"rank_\d+", p.name))
        raise MissingInputError(
            f"{len(missing)} of {len(ranks)} rank folders are missing: {_some(missing, 'rank_{}')}"
            f" (there are {_some(there, 'rank_{}')})",
            where=root,
            mend="check spec.parallelism: tensor, pipeline, data and context (--tp-size --pp-size --dp-size --cp-size) of "
            "the training that wrote it, and spec.source.path (--ms-path)",
        )
    by_rank = {key: candidates(rank_folder(root, rank), wanted_format) for key, rank in ranks.items()}
    first, *others = (set(found) for found in by_rank.values())
    common = first.intersection(*others)
    if not common:
        raise InputError(
            "no checkpoint is there in all ranks: "
            + "; ".join(
                f"rank_{ranks[key]} has {_some(sorted(found), '{0[0]}_{0[1]}')}"
                for key, found in list(by_rank.items())[:6]
            ),
            where=root,
            mend="wait until every rank has saved, or remove what a broken save has left",
        )
    if UNNAMED in common and len(common) > 1:
        both = [str(by_rank[next(iter(by_rank))][when].path.name) for when in sorted(common)]
        raise InputError(
            f"files with and without a step in their name: {', '.join(both[:6])}",
            where=rank_folder(root, next(iter(ranks.values()))),
            mend="leave one kind in the rank folders, or move the other away",
        )
    return {when: {key: found[when] for key, found in by_rank.items()} for when in sorted(common)}


def last_saved(root: Path, topology: Topology) -> When | None:
    """The last save that every rank reports in ``meta.json``, None unless all do.

    The training opens meta.json without truncating it, so a shorter rewrite leaves the tail of the older one.
    """
    seen: list[When] = []
    for key in topology.ranks():
        path = rank_folder(root, topology.source_rank(*key)) / "meta.json"
        try:
            text = path.read_text(encoding="utf-8")[:65536]
            document: object = json.JSONDecoder().raw_decode(text.lstrip())[0]
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(document, dict):
            return None
        meta = cast("Mapping[str, object]", document)
        epoch, step = meta.get("last_epoch"), meta.get("last_step")
        if type(epoch) is not int or type(step) is not int:
            return None
        seen.append((epoch, step))
    return min(seen)


def choose(found: Iterable[When], reported: When | None) -> When:
    """The newest checkpoint by what the training reports, else by epoch and step."""
    whens = sorted(found)
    return reported if reported in whens else whens[-1]


def when_of_name(name: str) -> When:
    """(epoch, step) as a file's name tells them, ``UNNAMED`` if it does not."""
    found = _NAMED.fullmatch(name) or _GLOBAL.fullmatch(name)
    return (int(found.groupdict().get("epoch") or 0), int(found["step"])) if found else UNNAMED


def candidates(folder: Path, wanted_format: str | None) -> dict[When, SourceFile]:
    """The checkpoints of one rank folder; raises :class:`MissingInputError` for none, :class:`InputError` for two of one step."""
    found: dict[When, SourceFile] = {}
    for path in _listing(folder):
        suffix = path.suffix[1:]
        if suffix not in SUFFIXES or (wanted_format and suffix != wanted_format) or _SKIPPED.fullmatch(path.name):
            continue
        when = when_of_name(path.name)
        file = SourceFile(path=path, when=when, merged="_dp_merged" in path.name)
        rival = found.get(when)
        if rival is None or (file.merged and not rival.merged):
            found[when] = file
        elif file.merged == rival.merged:
            raise InputError(
                f"two files of one step: {rival.path.name} and {path.name}",
                where=folder,
                mend="choose with spec.source.format (--src-model-format), or move one of them away",
            )
    if not found:
        raise MissingInputError(
            f"no {wanted_format or 'ckpt or safetensors'} file",
            where=folder,
            mend="check spec.source.path (--ms-path) and spec.source.format (--src-model-format)",
        )
    return found


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise FileAccessError(
            f"the folder cannot be listed: {error.strerror}",
            where=folder,
            mend="give this user read and search permission",
        ) from error


def _some(items: list[int] | list[When], form: str) -> str:
    shown = ", ".join(form.format(item) for item in items[:8])
    return (shown or "none") + (f" and {len(items) - 8} more" if len(items) > 8 else "")
