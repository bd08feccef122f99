"""Compare any two checkpoints element by element: every tensor's bits and every other leaf, not a printed summary.

x.pt  x.pt                       all leaves of the pickles
x.ckpt, x.safetensors            by name, in any combination
two folders                      files of the same place; a Megatron root through its tracker
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.progress import SILENCE, Portion, Reporter
from ckpt2pt.errors import InputError, Spell, UsageError, VerificationError, counted, printable, ref, size
from ckpt2pt.formats.folders import iteration_folder, pairs
from ckpt2pt.io.paths import is_folder, status
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import short, table
from ckpt2pt.publish import TRACKER, read_tracker
from ckpt2pt.verification.elements import Differing
from ckpt2pt.verification.gather import Files, width
from ckpt2pt.verification.leaves import Leaf, Leaves, Symbol, TensorLeaf, is_archive, leaf_of, open_file, same_scalar

_NAMED_IN_ERROR = 5
ALL_FILES = (0, 0)
"""A reporter counts by ranks, and files of any two checkpoints are of none."""
_CAMEL = {"bits_only": "bitsOnly", "max_abs": "maxAbs"}
_BUFFER_ROLES = frozenset({"param", "exp_avg", "exp_avg_sq"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One leaf, or tensor, that is not the same on both sides; ``file`` is empty where it is in no one file.

    ``kind``: ``left only``, ``right only``, ``type`` (type or shape), ``value``, or ``bits``: the values are equal, and
    0.0 stands against -0.0.  ``index`` counts elements in C order.
    """

    file: str
    name: str
    kind: str
    left: str = ""
    right: str = ""
    numel: int | None = None
    differing: int | None = None
    bits_only: int = 0
    max_abs: float | None = None
    index: int | None = None

    def document(self) -> Json:
        """For ``--output json``, which has no NaN and no infinity."""
        found: Json = {_CAMEL.get(name, name): value for name, value in asdict(self).items()}
        if not math.isfinite(self.max_abs or 0):
            found["maxAbs"] = str(self.max_abs)
        return found

    def __str__(self) -> str:
        place = f"{self.file}: " if self.file else ""
        if self.differing is None:
            return printable(f"{place}{self.name}: {self.kind}: {self.left} | {self.right}")
        return printable(
            f"{place}{self.name}: {self.differing + self.bits_only} of {self.numel} elements differ, "
            f"first at element {self.index}: {self.left} | {self.right}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two checkpoints side by side; ``notes`` tell what differs without being a difference, such as an order of keys.

    ``padding`` counts the rows of buckets that differ behind their last parameter alone.
    """

    left: str
    right: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    files: int
    equal: int
    nbytes: int
    padding: int = 0

    @property
    def same(self) -> bool:
        """True when every leaf is on both sides, and equal."""
        return not self.rows

    def document(self) -> Json:
        """For ``--output json``."""
        return {
            "left": self.left,
            "right": self.right,
            "equal": self.same,
            "files": self.files,
            "equalLeaves": self.equal,
            "bytesCompared": self.nbytes,
            "notes": list(self.notes),
            "differences": [row.document() for row in self.rows],
        }

    def render(self) -> str:
        """A table of the differences, the notes and one sentence."""
        head = ("file", "name", "kind", "left", "right", "differing", "of", "max abs", "first")
        rows = [
            (
                row.file,
                row.name,
                row.kind,
                row.left,
                row.right,
                *("" if value is None else value for value in (row.differing, row.numel)),
                "" if row.max_abs is None else f"{row.max_abs:.4g}",
                "" if row.index is None else row.index,
            )
            for row in self.rows
        ]
        lines = table(head, rows, right=frozenset({5, 6, 7, 8}))
        lines += [printable(f"note: {note}") for note in self.notes]
        verdict = "no difference" if self.same else f"{len(self.rows)} differ"
        done = (
            f"{counted(self.files, 'file')}, {self.equal:,} leaves are equal, {verdict}; {size(self.nbytes)} compared"
        )
        return "\n".join([*lines, *([""] if lines else []), done])

    def raise_differences(self, spell: Spell = str) -> None:
        """Raise :class:`VerificationError` naming the first few; nothing when there are none.  ``spell`` names options."""
        if self.same:
            return
        shown = "\n  ".join(map(str, self.rows[:_NAMED_IN_ERROR]))
        more = len(self.rows) - _NAMED_IN_ERROR
        error = VerificationError(
            f"{len(self.rows)} leaves differ:\n  {shown}" + (f"\n  and {more} more" if more > 0 else ""),
            where=f"{self.left} and {self.right}",
            hint=f"see the table; leave out what may differ with {ref('ignore')} LEAF"
            + (f", and the padding of {self.padding} of them with {ref('ignorePadding')}" if self.padding else ""),
        )
        raise error.spelled(spell)


def same_bytes(kept: TensorRef, copy: TensorRef, files: Files) -> None:
    """Refuse two copies of which only the first is carried, unless they are equal bit for bit.

    They are tied weights, or what several ranks of the source hold of one parameter.
    """
    one, other = leaf_of(kept), leaf_of(copy)
    what = "they differ in type or shape"
    if repr(one) == repr(other):
        found = Differing(one.dtype, one.dtype, strict=True).compare(files, one.elements, other.elements, one.numel)
        if not found.count:
            return
        what = f"they differ at element {found.index}: {' and '.join(found.shown)}"
    where = " and ".join(dict.fromkeys(path for ref in (kept, copy) for path in ref.paths))
    if kept.name == copy.name:
        raise InputError(
            f"{kept} is held by several ranks, and one copy of it is carried, but {what}",
            where=where,
            hint="convert it with the parallel sizes that it was saved with, which keeps the copy of each rank, "
            "or save the checkpoint again with copies that are equal",
        )
    raise InputError(
        f"{kept} and {copy} are one tied weight, but {what}",
        where=where,
        hint="save the checkpoint again with tied embeddings, or convert with the pt_meta of an untied model",
    )


def compare(
    left: Path,
    right: Path,
    *,
    ignore: Collection[str] = (),
    ignore_padding: bool = False,
    allow: Collection[str] = (),
    reporter: Reporter = SILENCE,
) -> Comparison:
    """Compare two files or two folders.

    ``ignore`` lists leaves such as ``/args/save``, with everything below them; ``*`` stands for anything.  ``ignore_padding`` compares the buckets of
    ``distrib_optim.pt`` up to ``per_bucket_numel_unpadded``: what follows is uninitialised memory in Megatron's own files.
    """
    run = _Run(ignore=frozenset(ignore), ignore_padding=ignore_padding, allow=frozenset(allow))
    places = list(pairs(left, right))
    run.compare_trackers(left, right)
    seen = [status(path) for _, *both in places if all(both) for path in both if path]
    total = sum(found.st_size for found in seen if found)
    portion = Portion(reporter, ALL_FILES, total)
    reporter.begin({ALL_FILES: total}, 0)
    with Files(advance=portion.advance) as files:
        for name, one, other in places:
            if one and other:
                run.compare_files(name, one, other, files)
            else:
                run.one_sided(name, "file", str(one or ""), str(other or ""))
    portion.fill()
    return run.result(left, right, sum(1 for _, one, other in places if one and other), "leaf")


@dataclass(slots=True, kw_only=True)
class Comparing:
    """A comparison under way: what is to be left out, and what was found."""

    ignore: frozenset[str]
    ignore_padding: bool
    rows: list[Row] = field(default_factory=list[Row])
    notes: list[str] = field(default_factory=list[str])
    equal: int = 0
    nbytes: int = 0
    padding: int = 0
    used: set[str] = field(default_factory=set[str])

    def is_ignored(self, name: str) -> bool:
        """Whether a pattern names it, or something above it."""
        matching = [one for one in self.ignore if fnmatchcase(name, one) or fnmatchcase(name, f"{one}/*")]
        self.used.update(matching)
        return bool(matching)

    def one_sided(self, file: str, name: str, left: str, right: str) -> None:
        """What one side alone has."""
        self.rows.append(Row(file=file, name=name, kind="left only" if left else "right only", left=left, right=right))

    def unlike(self, file: str, name: str, kind: str, left: object, right: object) -> None:
        """What is no tensor, or not of one type and shape."""
        self.rows.append(Row(file=file, name=name, kind=kind, left=str(left), right=str(right)))

    def compare_elements(
        self,
        name: str,
        left: TensorLeaf,
        right: TensorLeaf,
        numel: int,
        files: Files,
        file: Callable[[int | None], str],
    ) -> Differing:
        """The first ``numel`` elements of two tensors; ``file`` says where the first that differs lies."""
        found = Differing(left.dtype, right.dtype).compare(files, left.elements, right.elements, numel)
        self.nbytes += numel * (width(left.dtype) + width(right.dtype))
        if left.dtype == right.dtype and not found.count:
            self.equal += 1
            return found
        text = [f"{leaf!r} {value}".rstrip() for leaf, value in zip((left, right), found.shown, strict=True)]
        self.rows.append(
            Row(
                file=file(found.index),
                name=name,
                kind="type" if left.dtype != right.dtype else "value" if found.differing else "bits",
                left=text[0],
                right=text[1],
                numel=numel,
                differing=found.differing,
                bits_only=found.bits_only,
                max_abs=found.max_abs,
                index=found.index,
            )
        )
        return found

    def result(self, left: object, right: object, files: int, matched: str) -> Comparison:
        """All that was found; ``matched`` is what a pattern should have named."""
        unused = [f"the ignored {pattern} matches no {matched}" for pattern in sorted(self.ignore - self.used)]
        return Comparison(
            left=str(left),
            right=str(right),
            rows=tuple(self.rows),
            notes=(*self.notes, *unused),
            files=files,
            equal=self.equal,
            nbytes=self.nbytes,
            padding=self.padding,
        )


@dataclass(slots=True, kw_only=True)
class _Run(Comparing):
    """Of files, leaf by leaf."""

    allow: frozenset[str]

    def compare_trackers(self, left: Path, right: Path) -> None:
        """Which iteration is loaded is stated in a file of its own; two folders of iterations have to agree in it."""
        if any(not is_folder(path) or iteration_folder(path) == path for path in (left, right)):
            return
        one, other = read_tracker(left), read_tracker(right)
        if one != other:
            kind = "value" if one and other else "left only" if one else "right only"
            self.unlike(TRACKER, "iteration", kind, short(one), short(other))

    def compare_files(self, name: str, left: Path, right: Path, files: Files) -> None:
        """Every leaf of two files."""
        if is_archive(left) != is_archive(right):
            raise UsageError(
                "one is a torch archive, the other a MindSpore file: their names do not match",
                where=f"{left} and {right}",
                hint="prove a conversion with `ckpt2pt verify` and the flags of convert, without paths",
            )
        one, other = (
            {path: leaf for path, leaf in open_file(file, allow=self.allow).items() if not self.is_ignored(path)}
            for file in (left, right)
        )
        for side, there, missing in (("left", one, other), ("right", other, one)):
            self._drop_metadata(f"{name}: on the {side} only", there, missing)
        before = len(self.rows)
        for path in one:
            if path in other:
                self._compare_leaves(name, path, one, other, files)
        self.rows[before:] = _folded(self.rows[before:], one)
        self.rows += _one_sided(name, one, other, "left only") + _one_sided(name, other, one, "right only")
        mine, theirs = [path for path in one if path in other], [path for path in other if path in one]
        moved = next(((a, b) for a, b in zip(mine, theirs, strict=True) if a != b), None)
        if moved:
            self.notes.append(f"{name}: keys are in another order, first {moved[0]} | {moved[1]}")

    def _drop_metadata(self, where: str, there: Leaves, missing: Leaves) -> None:
        """A module's state dict may bring its ``_metadata`` or not: no loader needs it."""
        tops = [
            path
            for path in there
            if path.endswith("/@state/_metadata")
            and path.removesuffix("/@state/_metadata") in missing
            and path.removesuffix("/_metadata") not in missing
        ]
        for path in [path for path in there if any(path == top or path.startswith(f"{top}/") for top in tops)]:
            del there[path]
        for top in tops:
            state = top.removesuffix("/_metadata")
            if not any(path.startswith(f"{state}/") for path in there):
                del there[state]
        if tops:
            self.notes.append(f"{where}: _metadata of {len(tops)} state dicts, which no loader needs")

    def _compare_leaves(self, file: str, path: str, one: Leaves, other: Leaves, files: Files) -> None:
        left, right = one[path], other[path]
        if not isinstance(left, TensorLeaf) or not isinstance(right, TensorLeaf):
            if same_scalar(left, right):
                self.equal += 1
            else:
                kind = "value" if type(left) is type(right) else "type"
                self.unlike(file, path, kind, short(left), short(right))
            return
        used = _unpadded(path, one), _unpadded(path, other)
        both = used if self.ignore_padding else (None, None)
        numel = both[0] if both[0] is not None and both[0] == both[1] else left.numel
        if left.shape != right.shape and (None in both or both[0] != both[1]):
            self.unlike(file, path, "type", left, right)
            return
        numel = min(numel, left.numel, right.numel)
        found = self.compare_elements(path, left, right, numel, files, lambda _: file)
        if found.count:
            self.padding += used[0] is not None and used[0] == used[1] and used[0] <= (found.index or 0)


def _one_sided(file: str, there: Leaves, missing: Leaves, kind: str) -> list[Row]:
    """Leaves of one side alone; a container stands for all that is below it.

    So does one that the other side has in another form, of which nothing below is the same, as an array and a list of its
    numbers: that they differ is said of themselves.
    """
    above = {path: path.rpartition("/")[0] or "/" for path in there}
    shared = {above[path] for path in there if path in missing}
    rows: list[Row] = []
    for path, parent in above.items():
        covered = parent in there and (
            parent not in missing or (there[parent] != missing[parent] and parent not in shared)
        )
        if path in missing or covered:
            continue
        below = sum(other.startswith(f"{path}/") for other in there) if isinstance(there[path], Symbol) else 0
        text = short(there[path]) + (f" with {below} leaves" if below else "")
        left, right = (text, "") if kind == "left only" else ("", text)
        rows.append(Row(file=file, name=path, kind=kind, left=left, right=right))
    return rows


def _folded(rows: Sequence[Row], leaves: Leaves) -> list[Row]:
    """One row for all numbers of a list that differ, such as the 624 of a generator's state."""
    lists: dict[str, list[Row]] = {}
    for row in rows:
        parent, _, number = row.name.rpartition("/")
        plain = row.kind == "value" and row.differing is None and number.isdecimal()
        lists.setdefault(f"{parent}/*" if plain else row.name, []).append(row)
    return [found[0] if len(found) == 1 else _fold(name, found, leaves) for name, found in lists.items()]


def _fold(name: str, rows: Sequence[Row], leaves: Leaves) -> Row:
    parent = name.removesuffix("*")
    numel = sum(path.startswith(parent) and "/" not in path.removeprefix(parent) for path in leaves)
    index = int(rows[0].name.removeprefix(parent))
    return replace(rows[0], name=name, numel=numel, differing=len(rows), index=index)


def _unpadded(path: str, leaves: Mapping[str, Leaf]) -> int | None:
    """Elements of a bucket that carry parameters: ``/0/(torch.bfloat16, torch.float32)/param/1`` -> what the file states."""
    parts = path.split("/")
    if len(parts) != 5 or parts[3] not in _BUFFER_ROLES:
        return None
    numel = leaves.get(f"/per_bucket_numel_unpadded/{parts[1]}/{parts[2]}/{parts[4]}")
    return numel if isinstance(numel, int) else None
