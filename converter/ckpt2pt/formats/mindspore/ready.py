"""Whether a checkpoint is whole: every rank that is needed, at one epoch and step, and nobody writes to it any more.

MindSpore 2.10 writes ``<stem>.tmp``, renames it and then takes the right to write away (mode 0400); older ones write
under the final name and take the right away last (mindspore/train/serialization.py).  So a final name without that
right is whole; one with it was copied, or is being written, and has to rest for a while.
"""

from __future__ import annotations

import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import Ckpt2ptError, FormatError, InputError, MissingInputError, TimedOutError, aside, ref
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.mindspore.filenames import UNNAMED, CheckpointId, shown, when_of_name
from ckpt2pt.formats.mindspore.ranks import SourceFile, candidates, last_saved, rank_folder
from ckpt2pt.io.inputs import InputFile, read_whole
from ckpt2pt.io.jsontext import parse_json
from ckpt2pt.io.paths import is_folder, listing, status

Kind = Literal["absent", "missing", "unfinished", "broken", "other"]
Choose = Callable[[Mapping[CheckpointId, SourceFile]], CheckpointId | None]
"""From the files of the first rank to the one that is wanted; None when it is not there (yet)."""

_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocker:
    """What is still in the way, of one rank."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What was seen at one moment: the checkpoint that ought to become whole, and what it lacks.

    ``stable_for`` is for how many seconds none of its files has changed, also under temporary names.
    """

    root: Path
    wanted: CheckpointId | None
    blockers: tuple[Blocker, ...]
    stable_for: float = math.inf

    @property
    def ready(self) -> bool:
        """True when nothing is in the way."""
        return not self.blockers

    @property
    def broken(self) -> bool:
        """True when waiting cannot help."""
        return any(blocker.kind == "broken" for blocker in self.blockers)

    @property
    def sentence(self) -> str:
        """``checkpoint 0_12 is incomplete: rank_1 is at 0_10; rank_3 is missing``; the folder is named while none is seen in it."""
        texts = [blocker.text for blocker in self.blockers]
        if any(blocker.kind == "absent" for blocker in self.blockers):
            return "; ".join(texts)
        more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
        which = (
            f" in {self.root}" if self.wanted is None else f" {shown(self.wanted)}" if self.wanted != UNNAMED else ""
        )
        return f"checkpoint{which} is incomplete: {'; '.join(texts[:_SHOWN])}{more}"

    def to_error(self, waited: float | None = None) -> Ckpt2ptError:
        """The error of a wait in vain: 66 when a rank is missing, 75 when it is only still being written, else 65."""
        kinds = {blocker.kind for blocker in self.blockers}
        what = self.sentence if waited is None else f"after {waited:g} s the {self.sentence}"
        if "absent" in kinds:
            hint = f"check {ref('source.path')}: it is the folder that holds rank_0, rank_1, ..."
            return MissingInputError(what, where=self.root, hint=hint)
        if "missing" in kinds:
            hint = (
                f"see that every rank has saved into this folder, check {ref('parallelism')}, "
                f"or wait longer{aside('readiness.timeoutSeconds')}"
            )
            return MissingInputError(what, where=self.root, hint=hint)
        if kinds == {"unfinished"}:
            hint = f"wait longer{aside('readiness.timeoutSeconds')}; remove what a killed save has left"
            return TimedOutError(what, where=self.root, hint=hint)
        hint = (
            f"choose a checkpoint that every rank has saved{aside('source.iteration')}, or remove the files "
            "of the broken save"
        )
        return InputError(what, where=self.root, hint=hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trace:
    """A file as it was seen: when nothing of it has changed ``since`` (monotonic), and whether its index was read."""

    size: int
    mtime_ns: int
    since: float
    indexed: bool = False


class Watcher:
    """Looks at one training output again and again.

    ``settle_seconds`` is how long a file that may be written to must have rested; ``choose`` picks the wanted
    checkpoint, the newest that any rank has or begins to have when it is None.
    """

    def __init__(
        self,
        root: Path,
        topology: Topology,
        *,
        wanted_format: str | None = None,
        settle_seconds: float = 0.0,
        choose: Choose | None = None,
    ) -> None:
        self._root, self._topology, self._format = root, topology, wanted_format
        self._settle, self._choose = settle_seconds, choose
        self._traces: dict[Path, _Trace] = {}

    def is_there(self) -> bool:
        """Whether the training output is there at all."""
        return is_folder(self._root, InputFile.option)

    def steps(self) -> list[CheckpointId]:
        """(epoch, step) of the files under final names that every rank has; oldest first."""
        first, *others = (set(self._files(self._topology.source_rank(*key))) for key in self._topology.ranks())
        return sorted(first.intersection(*others))

    def begun(self) -> list[CheckpointId]:
        """(epoch, step) that some ranks have, or write, and not all of them; oldest first.

        What is older than every step of all ranks is left out: ranks remove their old files one after the other.
        """
        seen, whole = set[CheckpointId](), self.steps()
        for key in self._topology.ranks():
            rank = self._topology.source_rank(*key)
            seen |= self._files(rank).keys() | (_temporary(rank_folder(self._root, rank)).keys() - {UNNAMED})
        return sorted(when for when in seen.difference(whole) if not whole or when > whole[0])

    def look(self, wanted: CheckpointId | None = None) -> Observation:
        """What is there now, of ``wanted`` where it is given.  Raises :class:`InputError` where a rank has two files of one step."""
        if not self.is_there():
            return self._lacks(None, [Blocker(kind="absent", text=f"source folder {self._root} is not there")])
        ranks = [self._topology.source_rank(*key) for key in self._topology.ranks()]
        files = {rank: self._files(rank) for rank in ranks}
        writing = {rank: _temporary(rank_folder(self._root, rank)) for rank in ranks}
        chosen = wanted is not None or self._choose is not None
        if wanted is None and self._choose:
            wanted = self._choose(files[ranks[0]]) if files[ranks[0]] else None
            if wanted is None:
                return self._lacks(
                    None, [Blocker(kind="missing", text=_has(ranks[0], files[ranks[0]], "not that one"))]
                )
        elif wanted is None:
            seen = {when for found in files.values() for when in found}
            wanted = max(seen.union(*writing.values()), default=None)
        peers = {peer for rank in ranks for peer in self._peers(rank, files[rank], wanted)} - set(ranks)
        for rank in sorted(peers):
            files[rank], writing[rank] = self._files(rank), _temporary(rank_folder(self._root, rank))
        found = [o for rank in files if (o := self._obstacle(rank, files[rank], writing[rank], wanted))]
        if not found and not chosen:
            found += self._report(wanted)
        paths = [files[rank][wanted].path for rank in files if wanted in files[rank]]
        paths += [rank_folder(self._root, rank) / there[wanted] for rank, there in writing.items() if wanted in there]
        return replace(self._lacks(wanted, found), stable_for=min(map(self._stable_for, paths), default=math.inf))

    def _lacks(self, wanted: CheckpointId | None, blockers: list[Blocker]) -> Observation:
        return Observation(root=self._root, wanted=wanted, blockers=tuple(blockers))

    def _files(self, rank: int) -> dict[CheckpointId, SourceFile]:
        folder = rank_folder(self._root, rank)
        try:
            return candidates(folder, (self._format, True)) if is_folder(folder, InputFile.option) else {}
        except MissingInputError:
            return {}

    def _peers(self, rank: int, files: Mapping[CheckpointId, SourceFile], wanted: CheckpointId | None) -> Iterator[int]:
        """Ranks that hold the other shards of this rank's optimizer, unless they are merged already."""
        file = files.get(wanted) if wanted else None
        if file and file.merged:
            return
        for path in listing(
            self._root / "opt_shard_info" / f"rank_{rank}", "dist_opt_shard_info*.json", InputFile.option
        ):
            try:
                # The training does not truncate it, so that a longer, older text may stand behind (docs/format-ckpt.md).
                document = parse_json(read_whole(path, InputFile.option), first=True)
            except (MissingInputError, FormatError, ValueError):
                continue
            listed: object = (
                cast("Mapping[str, object]", document).get("dp_rank_list") if isinstance(document, dict) else None
            )
            if isinstance(listed, list):
                yield from (peer for peer in cast("list[object]", listed) if type(peer) is int)

    def _obstacle(
        self,
        rank: int,
        files: Mapping[CheckpointId, SourceFile],
        writing: Mapping[CheckpointId, str],
        wanted: CheckpointId | None,
    ) -> Blocker | None:
        if wanted in writing:
            return Blocker(
                kind="unfinished", text=f"rank_{rank} is being written ({writing[cast('CheckpointId', wanted)]})"
            )
        if wanted is None or not files:
            there = is_folder(rank_folder(self._root, rank), InputFile.option)
            return Blocker(kind="missing", text=f"rank_{rank} {'has none yet' if there else 'is missing'}")
        if wanted not in files:
            return Blocker(kind="other", text=_has(rank, files, ""))
        return self._unfinished(rank, files[wanted].path)

    def _trace(self, path: Path, found: os.stat_result) -> _Trace:
        trace = self._traces.get(path)
        if trace is None or (trace.size, trace.mtime_ns) != (found.st_size, found.st_mtime_ns):
            trace = _Trace(size=found.st_size, mtime_ns=found.st_mtime_ns, since=time.monotonic())
            self._traces[path] = trace
        return trace

    def _stable_for(self, path: Path) -> float:
        """Seconds without a change; 0 for a file that has just gone."""
        found = status(path, InputFile.option)
        if found is None:
            return 0.0
        trace = self._trace(path, found)
        return max(time.monotonic() - trace.since, time.time() - trace.mtime_ns / 1e9)

    def _unfinished(self, rank: int, path: Path) -> Blocker | None:
        found = status(path, InputFile.option)
        if found is None:
            return Blocker(kind="unfinished", text=f"rank_{rank}: {path.name} has gone")
        trace = self._trace(path, found)
        if found.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
            stable_for = self._stable_for(path)
            if stable_for < self._settle:
                text = f"rank_{rank} may still be written ({path.name} changed {stable_for:.0f} s ago)"
                return Blocker(kind="unfinished", text=text)
        if trace.indexed:
            return None
        try:
            index_file(path)
        except FormatError as error:
            return Blocker(kind="broken", text=f"rank_{rank} is broken ({path.name}: {error.what})")
        self._traces[path] = replace(trace, indexed=True)
        return None

    def _report(self, wanted: CheckpointId | None) -> list[Blocker]:
        """What the training itself says it has saved comes after the files, and is what ``convert`` goes by."""
        saved = last_saved(self._root, self._topology)
        if saved in {None, wanted} or wanted == UNNAMED:
            return []
        return [Blocker(kind="other", text=f"meta.json of the ranks still says {shown(saved)}")]


def _temporary(folder: Path) -> dict[CheckpointId, str]:
    """What MindSpore is writing there: (epoch, step) -> name."""
    names = [path.name for path in listing(folder, "*.tmp", InputFile.option)]
    return {when_of_name(re.sub(r"tmp$", "ckpt", name)): name for name in names}


def _has(rank: int, files: Mapping[CheckpointId, SourceFile], otherwise: str) -> str:
    there = ", ".join(shown(when) for when in sorted(files)[-3:])
    return f"rank_{rank} is at {there}{', ' if otherwise else ''}{otherwise}" if there else f"rank_{rank} has none yet"
