"""Differences: how they are collected, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ckpt2pt.errors import Spell, VerificationError, aside, counted, printable, size
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import table, warned
from ckpt2pt.verification.elements import Differing

_NAMED_IN_ERROR = 5
_HINT = (
    "remove the files that differ and convert again; "
    f"if the source or the options changed since, let it replace this result{aside('target.overwrite')}"
)
NOTHING_PUBLISHED = "nothing was published: run the same command again; if it differs again, report it with this text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not as it must be; ``index`` counts elements of the tensor in C order."""

    file: str
    tensor: str
    problem: str
    count: int = 1
    index: int | None = None
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        where = "" if self.index is None else f", first at element {self.index}"
        both = f": expected {self.expected}, found {self.found}" if self.expected or self.found else ""
        return printable(f"{self.file}: {self.tensor}: {self.problem}{where}{both}")


@dataclass(slots=True)
class Findings:
    """The differences of one rank while they are looked for, and how many tensors were compared.

    Names of files are below ``directory``.
    """

    directory: str = ""
    differences: list[Difference] = field(default_factory=list[Difference])
    tensors: int = 0

    def differ(self, file: str, tensor: str, problem: str, expected: object = "", found: object = "") -> None:
        """Add what is not a matter of elements."""
        name = f"{self.directory}/{file}".strip("/")
        self.differences.append(
            Difference(file=name, tensor=tensor, problem=problem, expected=str(expected), found=str(found))
        )

    def report(self, folder: Path, nbytes: int, source_checksums: Mapping[str, int] | None = None) -> Report:
        """All of it, at level ``full``."""
        return Report(
            folder=str(folder),
            level="full",
            differences=tuple(self.differences),
            checked_tensors=self.tensors,
            checked_bytes=nbytes,
            source_checksums=source_checksums or {},
        )

    def settle(self, file: str, tensor: str, tally: Differing, problem: str) -> None:
        """Add the elements that differ, if there are any."""
        if tally.count:
            self.differences.append(
                Difference(
                    file=f"{self.directory}/{file}".strip("/"),
                    tensor=tensor,
                    problem=f"{tally.count:,} of {tally.seen:,} elements {problem}",
                    count=tally.count,
                    index=tally.index,
                    expected=tally.shown[0],
                    found=tally.shown[1],
                )
            )


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
            "differences": [asdict(difference) for difference in self.differences],
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
