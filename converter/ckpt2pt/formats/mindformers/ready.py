"""Which iterations of a MindFormers training are complete, while it goes on.

    rank 0 makes iteration_00000500, then every rank   *-model-*.tmp -> .safetensors, *-opt-*.tmp -> .safetensors   (mode 0400)
    rank 0                                             common.json, metadata.json
    rank 0, after every rank                           latest_checkpointed_iteration.txt

With ``async_save`` the files of the ranks may come after those of rank 0, and the tracker with the next save or never.  So an
iteration is complete when all of its files are there and rest, and nothing else than the tracker tells it sooner.
MindFormers 2.0.0, mindformers/checkpoint/checkpoint.py (``save_checkpoint``, ``AsyncSaveManager``); mindspore 2.10.0,
mindspore/train/serialization.py.
"""

from __future__ import annotations

import math
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt2pt.core.foldernames import TRACKER, mindformers_iteration_name, mindformers_iteration_of, tracked_number
from ckpt2pt.errors import Ckpt2ptError, FormatError, InputError, MissingInputError, TimedOutError, aside, ref
from ckpt2pt.formats.mindformers.folder import COMMON, file_kind
from ckpt2pt.formats.mindformers.read import read_saved
from ckpt2pt.formats.mindspore.filenames import CheckpointId
from ckpt2pt.formats.mindspore.ready import Blocker, Kind, Observation
from ckpt2pt.io.inputs import InputFile
from ckpt2pt.io.paths import is_folder, listing, status
from ckpt2pt.publish import read_tracker

_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_Files = Mapping[str, tuple[int, int, bool]]
"""Size, time of the last change in nanoseconds, and whether it may be written to, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen(Observation):
    """``error`` is what reading it raised."""

    error: Ckpt2ptError | None = None

    def to_error(self, waited: float | None = None) -> Ckpt2ptError:
        """The error of a wait in vain: 66 when a file is missing, 75 when one may still be written, else 65."""
        what = self.sentence if waited is None else f"after {waited:g} s the {self.sentence}"
        if isinstance(self.error, InputError):
            where = self.error.where or self.root
            return InputError(
                what, where=where, hint=f"choose another iteration{aside('source.iteration')}, or remove it"
            )
        if self.error or not is_folder(self.root, InputFile.option):
            hint = f"check {ref('source.path')}, which holds iteration_*, or wait longer{aside('readiness.timeoutSeconds')}"
            return MissingInputError(what, where=self.root, hint=hint)
        hint = f"wait longer{aside('readiness.timeoutSeconds')}, or choose another iteration{aside('source.iteration')}"
        return TimedOutError(what, where=self.root, hint=hint)


class Iterations:
    """Looks at one training output again and again; a checkpoint is known by (-1, iteration).

    ``settle_seconds`` is how long files must have rested that may be written to, or that the tracker does not name yet;
    ``wanted`` is the iteration that counts, the newest that was begun when it is None.
    """

    def __init__(
        self, root: Path, *, weights_alone: bool = False, settle_seconds: float = 0.0, wanted: int | None = None
    ) -> None:
        self._root, self._weights_alone, self._settle, self._wanted = root, weights_alone, settle_seconds, wanted
        self._read: dict[int, tuple[_Files, Ckpt2ptError | None]] = {}

    def is_there(self) -> bool:
        """Whether the training output is there at all."""
        return is_folder(self._root, InputFile.option)

    def steps(self) -> list[CheckpointId]:
        """Iterations with weights that the tracker names or has passed, oldest first."""
        named = self._tracked()[0]
        return [(-1, number) for number in self._numbers() if number <= named]

    def begun(self) -> list[CheckpointId]:
        """Later ones, oldest first.  One that was left by a training that was killed is older than the tracker, and is left out."""
        named, written = self._tracked()
        later = [number for number in self._numbers() if number > named]
        return [(-1, number) for number in later if self._changed(number, self._files(number)) >= written]

    def look(self, wanted: CheckpointId | None = None) -> Observation:
        """What is there now, of ``wanted`` where it is given."""
        if not self.is_there():
            return self._observed(None, "absent", f"source folder {self._root} is not there")
        number = self._wanted if wanted is None else wanted[1]
        if number is None:
            seen = [*self.steps(), *self.begun()]
            number = seen[-1][1] if seen else None
        if number is None or number not in self._numbers():
            missing = "no iteration is there" if number is None else f"{mindformers_iteration_name(number)} is missing"
            return self._observed(None, "missing", missing, MissingInputError(missing, where=self._root, hint=""))
        files = self._files(number)
        rested = max(0.0, time.time() - self._changed(number, files) / 1e9)
        return replace(self._look(number, files, rested), stable_for=rested)

    def _look(self, number: int, files: _Files, rested: float) -> Observation:
        when, named = (-1, number), number <= self._tracked()[0]
        writing = next((name for name in files if name.endswith(".tmp") or name.startswith("tmp")), None)
        if writing:
            return self._observed(when, "unfinished", f"{writing} is being written")
        if COMMON not in files and not named:
            return self._observed(when, "unfinished", f"{COMMON} is not there yet")
        error = self._error(number, files)
        if error:
            broken = named and isinstance(error, FormatError)
            return self._observed(when, "broken" if broken else "missing", f"{error.what} ({error.where})", error)
        open_ones = [name for name, (_, _, writable) in files.items() if writable]
        if rested < self._settle and (open_ones or not named):
            what = f"{open_ones[0]} may still be written" if open_ones else f"{TRACKER} does not name it yet"
            return self._observed(when, "unfinished", f"{what} (the folder changed {rested:.0f} s ago)")
        return self._observed(when)

    def _observed(
        self, when: CheckpointId | None, kind: Kind | None = None, text: str = "", error: Ckpt2ptError | None = None
    ) -> _Seen:
        return _Seen(
            root=self._root, wanted=when, blockers=(Blocker(kind=kind, text=text),) if kind else (), error=error
        )

    def _error(self, number: int, files: _Files) -> Ckpt2ptError | None:
        """Why its headers cannot be read; they are read again when a file has changed."""
        known = self._read.get(number)
        if known is None or known[0] != files:
            error: Ckpt2ptError | None = None
            try:
                read_saved(self._root, number, weights_alone=self._weights_alone)
            except (MissingInputError, InputError) as raised:
                error = raised
            known = self._read[number] = files, error
        return known[1]

    def _numbers(self) -> list[int]:
        found = (mindformers_iteration_of(path.name) for path in listing(self._root, option=InputFile.option))
        return sorted({number for number in found if number is not None})

    def _files(self, number: int) -> _Files:
        found: dict[str, tuple[int, int, bool]] = {}
        for path in listing(self._root / mindformers_iteration_name(number), option=InputFile.option):
            seen = status(path, InputFile.option)
            if seen:
                writable = bool(seen.st_mode & _WRITABLE) and file_kind(path.name) is not None
                found[path.name] = seen.st_size, seen.st_mtime_ns, writable
        return found

    def _changed(self, number: int, files: _Files) -> int:
        """When anything of an iteration changed last, in nanoseconds."""
        folder = status(self._root / mindformers_iteration_name(number), InputFile.option)
        return max([0, *(mtime for _, mtime, _ in files.values()), *([folder.st_mtime_ns] if folder else [])])

    def _tracked(self) -> tuple[float, int]:
        """The iteration that the tracker names, and when that was written; below all where there is none."""
        seen = status(self._root / TRACKER, InputFile.option)
        named = tracked_number(read_tracker(self._root)) if seen else None
        return (-math.inf, 0) if seen is None or named is None else (named, seen.st_mtime_ns)
