"""What is ours: files that sealed records of ours list, as they list them; and the records of one group of files.

claim, temporary files, writing, names, record: in this order.  So whatever has a name is in a record, at any moment, and of
two runs of which one has taken over from the other only one goes on, also where there are no locks: the one writes its
claim and then removes temporary files, the other makes a temporary file and then looks at the claim.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ckpt2pt.errors import TargetConflictError, TryAgainError
from ckpt2pt.io.access import access_error
from ckpt2pt.io.inputs import InputFile
from ckpt2pt.io.paths import status
from ckpt2pt.io.records import Json, seal
from ckpt2pt.publish.files import publish_bytes, read_record


@dataclass(frozen=True, slots=True)
class _Listed:
    """A file as a record lists it; without ``mtime_ns`` only its digest tells it."""

    nbytes: int
    crc32: str
    mtime_ns: int | None


@dataclass(slots=True)
class Holdings:
    """The files below ``folder`` that records list.  A path that is not listed as it stands there is not ours."""

    folder: Path
    listed: Mapping[str, Sequence[_Listed]]
    _seen: dict[tuple[str, int, int], bool] = field(default_factory=dict[tuple[str, int, int], bool])

    @classmethod
    def of(cls, folder: Path, records: Iterable[Path | Json]) -> Holdings:
        """From records, or files that hold them, in the order in which they are to be read."""
        found: dict[str, list[_Listed]] = {}
        for record in records:
            document = read_record(record) if isinstance(record, Path) else record
            for name, one in _entries(document or {}):
                found.setdefault(name, []).append(one)
        return cls(folder, found)

    def at(self, folder: Path) -> Holdings:
        """The same files after their folder was renamed."""
        return Holdings(folder, self.listed, self._seen)

    def is_ours(self, name: str) -> bool:
        """Whether what stands there is what was written: by size and time, else by its digest."""
        found = status(self.folder / name, follow=False)
        if found is None or not stat.S_ISREG(found.st_mode):
            return False
        same = [one for one in self.listed.get(name, ()) if one.nbytes == found.st_size]
        if not same or any(one.mtime_ns == found.st_mtime_ns for one in same):
            return bool(same)
        key = name, found.st_size, found.st_mtime_ns
        if key not in self._seen:
            with InputFile(self.folder / name) as file:
                self._seen[key] = f"{file.crc32(0, file.size):08x}" in {one.crc32 for one in same}
        return self._seen[key]

    def entries(self, name: str) -> list[Json]:
        """What is listed of a file and fits what stands there, or all that is listed where nothing fits."""
        found = status(self.folder / name, follow=False)
        if found is None:
            return []
        known = self.listed.get(name, ())
        fits = [one for one in known if (one.nbytes, one.mtime_ns) == (found.st_size, found.st_mtime_ns)]
        return [
            {"path": name, "nbytes": one.nbytes, "crc32": one.crc32, "mtimeNs": one.mtime_ns}
            for one in dict.fromkeys(fits or known)
        ]


def _entries(record: Json) -> Iterable[tuple[str, _Listed]]:
    files = record.get("files")
    for file in cast("list[object]", files) if isinstance(files, list) else ():
        if not isinstance(file, dict):
            continue
        entry = cast("Json", file)
        path, nbytes, crc, mtime = (entry.get(key) for key in ("path", "nbytes", "crc32", "mtimeNs"))
        if isinstance(path, str) and isinstance(nbytes, int) and isinstance(crc, str):
            yield path, _Listed(nbytes, crc, mtime if isinstance(mtime, int) else None)


def not_ours(path: Path, hint: str) -> TargetConflictError:
    """The error for a file that would be replaced or removed and that no record lists as it is."""
    return TargetConflictError(
        f"{path.name} is there, which ckpt2pt did not write, or which was changed since", where=path, hint=hint
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The records of files that appear together below ``folder``.

    ``identity`` is that of the ``claim`` while nobody has taken over; ``writing`` lists names before they appear,
    ``record`` when all of them are there.  With ``repair`` a name that the records list is replaced whatever stands there.
    """

    folder: Path
    claim: Path
    identity: str
    writing: Path
    record: Path
    hint: str
    repair: bool = False

    @classmethod
    def of_group(cls, folder: Path, record: Path, identity: str, *, hint: str, repair: bool = False) -> Ledger:
        """The ledger of a group with a claim of its own, which lies beside its ``record`` as all the rest."""
        claim, writing = record.with_suffix(".claim.json"), record.with_suffix(".writing.json")
        return cls(
            folder=folder, claim=claim, identity=identity, writing=writing, record=record, hint=hint, repair=repair
        )

    def fence(self) -> None:
        """Raise when somebody else has taken over."""
        claim = read_record(self.claim) or {}
        if claim.get("identity") != self.identity:
            raise taken_over(self.folder, str(claim.get("host") or "which has finished or was removed"))

    def announce(self, files: Sequence[Mapping[str, object]]) -> None:
        """Say which names are about to appear; refuse those where something stands that is not ours."""
        held = self.refuse([str(file["path"]) for file in files])
        # What stands there is still listed if the run is killed before it is replaced.
        known = [entry for file in files for entry in held.entries(str(file["path"]))]
        document = {"identity": self.identity, "files": [*files, *known]}
        publish_bytes(self.writing, seal(document), fence=self.fence)

    def refuse(self, names: Iterable[str]) -> Holdings:
        """Refuse names where something stands that is not ours; touches nothing."""
        held = Holdings.of(self.folder, [self.writing, self.record])
        for name in names:
            there = status(self.folder / name, follow=False)
            if there is None or (self.repair and name in held.listed and not stat.S_ISDIR(there.st_mode)):
                continue
            if not held.is_ours(name):
                raise not_ours(self.folder / name, self.hint)
        return held

    def publish(self, facts: Mapping[str, object]) -> None:
        """Say that the files are there."""
        publish_bytes(self.record, seal(facts), fence=self.fence)
        self.end_writing()

    def end_writing(self) -> None:
        """Remove the record of what was about to appear: all of it is in the other one."""
        try:
            with suppress(FileNotFoundError):
                self.writing.unlink()
        except OSError as error:
            raise access_error(error, self.writing, "removing") from error


def taken_over(folder: Path, who: str) -> TryAgainError:
    """The error of a worker that has lost its folder."""
    return TryAgainError(
        f"another run took the folder over while this one was at work ({who}), so nothing more is written",
        where=folder,
        hint="run the same command again, if both were not meant for the same place",
    )


def file_entry(path: Path, folder: Path, crc32: int) -> Json:
    """How a record lists a file."""
    found = os.stat(path)
    return {
        "path": str(path.relative_to(folder)),
        "nbytes": found.st_size,
        "crc32": f"{crc32:08x}",
        "mtimeNs": found.st_mtime_ns,
    }
