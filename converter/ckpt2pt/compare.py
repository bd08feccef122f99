"""Compare any two checkpoints element by element: every tensor's bits and every other leaf, not a printed summary.

x.pt  x.pt                       all leaves of the pickles
x.ckpt, x.safetensors            by name, in any combination
two folders                      files of the same place; a Megatron root through its tracker
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ckpt2pt.errors import InputError, MissingInputError, UsageError, VerificationError
from ckpt2pt.leaves import (
    Bytes,
    Files,
    Leaf,
    Leaves,
    TensorLeaf,
    bits,
    is_archive,
    leaf_of,
    open_file,
    same_scalar,
    show_element,
    spans,
    values,
    width,
)
from ckpt2pt.publish import TRACKER, Json
from ckpt2pt.tensors import TensorRef
from ckpt2pt.text import short, size, table

SUFFIXES = frozenset({".pt", ".ckpt", ".safetensors"})
_NAMED_IN_ERROR = 5
_BUFFER_ROLES = frozenset({"param", "exp_avg", "exp_avg_sq"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One leaf that is not the same on both sides.

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

    def __str__(self) -> str:
        if self.differing is None:
            return f"{self.file}: {self.name}: {self.kind}: {self.left} | {self.right}"
        return (
            f"{self.file}: {self.name}: {self.differing + self.bits_only} of {self.numel} elements differ, "
            f"first at element {self.index}: {self.left} | {self.right}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two checkpoints side by side; ``notes`` tell what differs without being a difference, such as an order of keys."""

    left: str
    right: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    files: int
    equal: int
    nbytes: int

    @property
    def same(self) -> bool:
        """True when every leaf is on both sides, and equal."""
        return not self.rows

    def document(self) -> Json:
        """For ``--output json``."""
        return {
            "left": self.left,
            "right": self.right,
            "same": self.same,
            "files": self.files,
            "equalLeaves": self.equal,
            "bytesCompared": self.nbytes,
            "notes": list(self.notes),
            "differences": [
                {
                    "file": row.file,
                    "name": row.name,
                    "kind": row.kind,
                    "left": row.left,
                    "right": row.right,
                    "numel": row.numel,
                    "differing": row.differing,
                    "bitsOnly": row.bits_only,
                    # JSON has no NaN and no infinity.
                    "maxAbs": row.max_abs if row.max_abs is None or math.isfinite(row.max_abs) else str(row.max_abs),
                    "index": row.index,
                }
                for row in self.rows
            ],
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
        lines += [f"note: {note}" for note in self.notes]
        verdict = "no difference" if self.same else f"{len(self.rows)} differ"
        done = f"{self.files} files, {self.equal} leaves are equal, {verdict}; {size(self.nbytes)} compared"
        return "\n".join([*lines, *([""] if lines else []), done])

    def raise_differences(self) -> None:
        """Raise :class:`VerificationError` naming the first few; nothing when there are none."""
        if self.same:
            return
        shown = "\n  ".join(map(str, self.rows[:_NAMED_IN_ERROR]))
        more = len(self.rows) - _NAMED_IN_ERROR
        raise VerificationError(
            f"{len(self.rows)} leaves differ:\n  {shown}" + (f"\n  and {more} more" if more > 0 else ""),
            where=f"{self.left} and {self.right}",
            mend="see the table; leave out what may differ with --ignore LEAF",
        )


def same_bytes(kept: TensorRef, copy: TensorRef) -> None:
    """Refuse two copies of tied weights of which only the first is carried, unless they are equal bit for bit."""
    one, other = leaf_of(kept), leaf_of(copy)
    with Files() as files:
        found = _Elements(one, other, one.numel, files).compare() if repr(one) == repr(other) else None
    if found is not None and not found.unequal_bits:
        return
    what = (
        f"differ at element {found.bits_index}: {found.bits_left} and {found.bits_right}"
        if found
        else "differ in type or shape"
    )
    raise InputError(
        f"{kept} and {copy} are one tied weight, but {what}",
        where=" and ".join(dict.fromkeys(ref.extents[0].path for ref in (kept, copy) if ref.extents)),
        mend="train with tied embeddings as pt_meta says, or point spec.metadata.path (--param-map-path) at the pt_meta "
        "of an untied model",
    )


def compare(
    left: Path,
    right: Path,
    *,
    ignore: Collection[str] = (),
    ignore_padding: bool = False,
    allow: Collection[str] = (),
) -> Comparison:
    """Compare two files or two folders.

    ``ignore`` lists leaves such as ``/args/save``, with everything below them; ``*`` stands for anything.  ``ignore_padding`` compares the buckets of
    ``distrib_optim.pt`` up to ``per_bucket_numel_unpadded``: what follows is uninitialised memory in Megatron's own files.
    """
    run = _Run(frozenset(ignore), ignore_padding, frozenset(allow))
    pairs = list(_pairs(left, right))
    with Files() as files:
        for name, one, other in pairs:
            if one and other:
                run.compare_files(name, one, other, files)
            else:
                kind = "left only" if one else "right only"
                run.rows.append(Row(file=name, name="file", kind=kind, left=str(one or ""), right=str(other or "")))
    return Comparison(
        left=str(left),
        right=str(right),
        rows=tuple(run.rows),
        notes=tuple(run.notes),
        files=sum(1 for _, one, other in pairs if one and other),
        equal=run.equal,
        nbytes=run.nbytes,
    )


@dataclass(slots=True)
class _Elements:
    """Two tensors of equally many elements, compared block by block."""

    left: TensorLeaf
    right: TensorLeaf
    numel: int
    files: Files
    differing: int = 0
    bits_only: int = 0
    unequal_bits: int = 0
    max_abs: float | None = None
    index: int | None = None
    shown: tuple[str, str] = ("", "")
    bits_index: int | None = None
    bits_left: str = ""
    bits_right: str = ""

    def compare(self) -> _Elements:
        widest = max(width(self.left.dtype), width(self.right.dtype))
        for start, stop in spans(self.numel, widest):
            one = self.left.elements.block(self.files, start, stop)
            other = self.right.elements.block(self.files, start, stop)
            if self.left.dtype != self.right.dtype or not np.array_equal(one, other):
                self._block(start, one, other)
        return self

    def _block(self, start: int, one: Bytes, other: Bytes) -> None:
        left, right = self.left.dtype, self.right.dtype
        x, y = values(one, left), values(other, right)
        if left == right:
            unlike = bits(one, left) != bits(other, right)
            if width(left) == 16:
                unlike = unlike.reshape(-1, 2).any(axis=1)
            self.unequal_bits += int(unlike.sum())
            if self.bits_index is None and unlike.any():
                first = int(unlike.argmax())
                self.bits_index = start + first
                self.bits_left, self.bits_right = show_element(one, left, first), show_element(other, right, first)
            is_float = x is not None and y is not None and "float" in left
            value = unlike & (x != y) & ~(np.isnan(x) & np.isnan(y)) if is_float else unlike
            # What is left is 0.0 against -0.0: a NaN has many forms and none of them says anything.
            sign_only = unlike & (x == y) if is_float else np.zeros_like(unlike)
        else:
            value = (
                (x != y) & ~(np.isnan(x) & np.isnan(y)) if x is not None and y is not None else np.ones(len(one), bool)
            )
            sign_only = np.zeros_like(value)
        self.differing += int(value.sum())
        self.bits_only += int(sign_only.sum())
        either = value | sign_only
        if self.index is None and either.any():
            first = int(either.argmax())
            self.index = start + first
            self.shown = (show_element(one, left, first), show_element(other, right, first))
        if x is not None and y is not None and value.any():
            with np.errstate(invalid="ignore", over="ignore"):
                far = np.abs(x - y)[value]
            # maximum, unlike max, lets a NaN win: a NaN against a number is as far as can be.
            self.max_abs = float(np.maximum(far.max(), self.max_abs or 0.0))


@dataclass(slots=True)
class _Run:
    """A comparison under way."""

    ignore: frozenset[str]
    ignore_padding: bool
    allow: frozenset[str]
    rows: list[Row] = field(default_factory=list[Row])
    notes: list[str] = field(default_factory=list[str])
    equal: int = 0
    nbytes: int = 0

    def compare_files(self, name: str, left: Path, right: Path, files: Files) -> None:
        """Every leaf of two files."""
        if is_archive(left) != is_archive(right):
            raise UsageError(
                "one is a torch archive, the other a MindSpore file: their names do not match",
                where=f"{left} and {right}",
                mend="prove a conversion with `ckpt2pt verify` and the flags of convert, without paths",
            )
        one, other = (
            {path: leaf for path, leaf in open_file(file, allow=self.allow).items() if not self._ignored(path)}
            for file in (left, right)
        )
        for path in one:
            if path in other:
                self._compare_leaves(name, path, one, other, files)
        self.rows += _one_sided(name, one, other, "left only") + _one_sided(name, other, one, "right only")
        mine, theirs = [path for path in one if path in other], [path for path in other if path in one]
        moved = next(((a, b) for a, b in zip(mine, theirs, strict=True) if a != b), None)
        if moved:
            self.notes.append(f"{name}: keys are in another order, first {moved[0]} | {moved[1]}")

    def _ignored(self, path: str) -> bool:
        return any(fnmatchcase(path, leaf) or fnmatchcase(path, f"{leaf}/*") for leaf in self.ignore)

    def _compare_leaves(self, file: str, path: str, one: Leaves, other: Leaves, files: Files) -> None:
        left, right = one[path], other[path]
        if not isinstance(left, TensorLeaf) or not isinstance(right, TensorLeaf):
            if same_scalar(left, right):
                self.equal += 1
            else:
                kind = "value" if type(left) is type(right) else "type"
                self.rows.append(Row(file=file, name=path, kind=kind, left=short(left), right=short(right)))
            return
        both = (_unpadded(path, one), _unpadded(path, other)) if self.ignore_padding else (None, None)
        numel = both[0] if both[0] is not None and both[0] == both[1] else left.numel
        if left.shape != right.shape and (None in both or both[0] != both[1]):
            self.rows.append(Row(file=file, name=path, kind="type", left=repr(left), right=repr(right)))
            return
        found = _Elements(left, right, min(numel, left.numel, right.numel), files).compare()
        self.nbytes += found.numel * (width(left.dtype) + width(right.dtype))
        if left.dtype == right.dtype and not found.differing and not found.bits_only:
            self.equal += 1
            return
        kind = "type" if left.dtype != right.dtype else "value" if found.differing else "bits"
        text = [f"{leaf!r} {value}".rstrip() for leaf, value in zip((left, right), found.shown, strict=True)]
        self.rows.append(
            Row(
                file=file,
                name=path,
                kind=kind,
                left=text[0],
                right=text[1],
                numel=found.numel,
                differing=found.differing,
                bits_only=found.bits_only,
                max_abs=found.max_abs,
                index=found.index,
            )
        )


def _one_sided(file: str, there: Leaves, missing: Leaves, kind: str) -> list[Row]:
    """Leaves of one side alone; a container stands for all that is below it."""
    tops = [path for path in there if path not in missing and (path.rpartition("/")[0] or "/") in missing]
    rows: list[Row] = []
    for path in tops or [path for path in there if path not in missing]:
        below = sum(1 for other in there if other.startswith(f"{path}/"))
        text = short(there[path]) + (f" with {below} leaves" if below else "")
        rows.append(Row(file=file, name=path, kind=kind, **{kind.split()[0]: text}))
    return rows


def _unpadded(path: str, leaves: Mapping[str, Leaf]) -> int | None:
    """Elements of a bucket that carry parameters: ``/0/(torch.bfloat16, torch.float32)/param/1`` -> what the file states."""
    parts = path.split("/")
    if len(parts) != 5 or parts[3] not in _BUFFER_ROLES:
        return None
    numel = leaves.get(f"/per_bucket_numel_unpadded/{parts[1]}/{parts[2]}/{parts[4]}")
    return numel if isinstance(numel, int) else None


def _pairs(left: Path, right: Path) -> Iterator[tuple[str, Path | None, Path | None]]:
    """Files that belong together, by their place; a file without a partner is paired with None."""
    for path in (left, right):
        if not path.exists():
            raise MissingInputError("it is not there", where=path, mend="check the two paths")
    if left.is_dir() != right.is_dir():
        raise UsageError(
            "one is a folder, the other a file", where=f"{left} and {right}", mend="give two files or two folders"
        )
    if not left.is_dir():
        yield (left.name, left, right)
        return
    one, other = _files(_iteration(left)), _files(_iteration(right))
    if not one and not other:
        raise MissingInputError(
            "neither folder holds a .pt, .ckpt or .safetensors file",
            where=f"{left} and {right}",
            mend="name the folders that hold the checkpoints",
        )
    _rename(one, other)
    _rename(other, one)
    for name in sorted(one.keys() | other.keys()):
        yield name, one.get(name), other.get(name)


def _iteration(folder: Path) -> Path:
    """The iteration that a Megatron root's tracker names, or its only one; any other folder itself."""
    try:
        named = (folder / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    if named:
        return folder / (f"iter_{int(named):07d}" if named.isdigit() else "release")
    iterations = sorted(path for path in folder.glob("iter_*") if path.is_dir())
    if len(iterations) > 1:
        raise InputError(
            f"{len(iterations)} iterations and no {TRACKER}",
            where=folder,
            mend=f"name one of them, such as {iterations[-1]}",
        )
    return iterations[0] if iterations else folder


def _files(folder: Path) -> dict[str, Path]:
    """Checkpoint files by their place below ``folder``; names with a dot in front are unfinished or not ours."""
    found = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES}
    return {
        place.as_posix(): path
        for place, path in found.items()
        if path.is_file() and not any(part.startswith(".") for part in place.parts)
    }


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
