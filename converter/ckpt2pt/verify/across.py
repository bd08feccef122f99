"""Compare two checkpoints of any formats and parallel layouts: global tensor by global tensor, moments included.

MindSpore, tp 2 --formats--> index -+
                                    +-- each tensor's elements, gathered block by block --> rows, a Comparison
Megatron, tp 4  --formats--> index -+
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ckpt2pt.core.index import find
from ckpt2pt.core.params import EMBEDDING, HEAD, is_padded
from ckpt2pt.core.tensor import Key, Tensor, box_of
from ckpt2pt.errors import InputError
from ckpt2pt.folders import iteration_folder
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.registry import detect, read
from ckpt2pt.mapping.names import Rules
from ckpt2pt.pt.megatron import rank_folders
from ckpt2pt.text import short
from ckpt2pt.verify.compare import Comparison, ElementComparison, Row
from ckpt2pt.verify.examine import rounded
from ckpt2pt.verify.gather import Gathered, gathered
from ckpt2pt.verify.leaves import Bytes, Elements, Files, TensorLeaf, width

_WHOLE = "checkpoint"


def compare_across(
    left: Checkpoint, right: Checkpoint, *, ignore: Collection[str] = (), ignore_padding: bool = False
) -> Comparison:
    """Compare every weight, main parameter and moment.

    A float32 weight stands for its main parameter, and is compared rounded with a weight of less precision.  Copies on
    other ranks are compared with what they copy.  ``ignore`` are patterns of ``role/name``; ``ignore_padding`` leaves out the
    rows that one side's vocabulary has more.
    """
    run = _Run(left, right, frozenset(ignore), ignore_padding)
    with Files() as files:
        for key in dict.fromkeys((*left.index, *right.index)):
            run.compare(key, files)
        for side, checkpoint in (("left", left), ("right", right)):
            for tensor in checkpoint.index.values():
                run.compare_replicas(side, tensor, files)
    if left.iteration != right.iteration:
        run.rows.append(
            Row(file=_WHOLE, name="iteration", kind="value", left=short(left.iteration), right=short(right.iteration))
        )
    unused = [f"--ignore {pattern} matches no tensor" for pattern in sorted(run.ignore - run.used)]
    return Comparison(
        left=str(left.path),
        right=str(right.path),
        rows=tuple(run.rows),
        notes=(*run.notes, *unused),
        files=len(_files(left) | _files(right)),
        equal=run.equal,
        nbytes=run.nbytes,
    )


def _files(checkpoint: Checkpoint) -> set[str]:
    views = (view for tensor in checkpoint.index.values() for view in (*tensor.views, *tensor.replicas))
    return {extent.path for view in views for extent in view.storage}


@dataclass(frozen=True, slots=True)
class _Rounded:
    """Elements of more precision, rounded to nearest even."""

    elements: Elements
    source: str
    target: str

    def block(self, files: Files, start: int, stop: int) -> Bytes:
        """As the other side stores them."""
        return rounded(self.elements.block(files, start, stop), self.source, self.target)


@dataclass(slots=True)
class _Run:
    """A comparison under way."""

    left: Checkpoint
    right: Checkpoint
    ignore: frozenset[str]
    ignore_padding: bool
    rows: list[Row] = field(default_factory=list[Row])
    notes: list[str] = field(default_factory=list[str])
    equal: int = 0
    nbytes: int = 0
    used: set[str] = field(default_factory=set[str])

    def compare(self, key: Key, files: Files) -> None:
        """One tensor of both sides."""
        name = f"{key.role}/{key.name}"
        if self._is_ignored(name):
            return
        one, other = self._find(self.left, key), self._find(self.right, key)
        if one is None or other is None:
            kind = "left only" if one else "right only"
            self.rows.append(Row(file=_WHOLE, name=name, kind=kind, left=short(one or ""), right=short(other or "")))
            return
        numel = self._common(name, one, other)
        if numel is None:
            self.rows.append(Row(file=_WHOLE, name=name, kind="type", left=str(one), right=str(other)))
            return
        sides = _alike(one, other)
        self._record(_WHOLE, name, ElementComparison(*sides, numel).compare(files), files)

    def compare_replicas(self, side: str, tensor: Tensor, files: Files) -> None:
        """What other ranks hold of the same."""
        name = f"{tensor.key.role}/{tensor.key.name}"
        if self._is_ignored(name):
            return
        for view in tensor.replicas:
            own, copy = (
                TensorLeaf(tensor.dtype, view.shape, Gathered(tensor.dtype, views, box_of(view)))
                for views in (tensor.views, (view,))
            )
            found = ElementComparison(own, copy, view.numel).compare(files)
            path = view.storage[0].path if view.storage else ""
            self._record(f"{side}, {path}", f"copy of {name}", found, files)

    def _record(self, file: str, name: str, found: ElementComparison, files: Files) -> None:
        self.nbytes += found.numel * (width(found.left.dtype) + width(found.right.dtype))
        row = found.row(file, name)
        if row is None:
            self.equal += 1
        else:
            self.rows.append(row)

    def _find(self, checkpoint: Checkpoint, key: Key) -> Tensor | None:
        found = find(checkpoint.index, key)
        if found is None and key.name == HEAD and key.role in {other.role for other in checkpoint.index}:
            # The last stage's copy of tied embeddings goes by this name in MindSpore's files.
            return find(checkpoint.index, Key(key.role, EMBEDDING))
        return found

    def _common(self, name: str, one: Tensor, other: Tensor) -> int | None:
        """Elements to be compared; None where the shapes exclude it."""
        if one.fused == other.fused:
            return one.numel
        if self.ignore_padding and is_padded(one.key.name) and one.fused[1:] == other.fused[1:]:
            rows = min(one.fused[0], other.fused[0])
            self.notes.append(f"{name}: rows from {rows} on are on one side only, {one} | {other}")
            return rows * math.prod(one.fused[1:])
        return None

    def _is_ignored(self, name: str) -> bool:
        matching = [pattern for pattern in self.ignore if fnmatchcase(name, pattern)]
        self.used.update(matching)
        return bool(matching)


def _alike(one: Tensor, other: Tensor) -> tuple[TensorLeaf, TensorLeaf]:
    """Both sides as one type: what is more precise is rounded, as a conversion does."""
    left, right = (TensorLeaf(side.dtype, side.fused, gathered(side)) for side in (one, other))
    floats = {"bfloat16", "float16"}
    if one.dtype == "float32" and other.dtype in floats:
        left = TensorLeaf(other.dtype, one.fused, _Rounded(gathered(one), one.dtype, other.dtype))
    elif other.dtype == "float32" and one.dtype in floats:
        right = TensorLeaf(one.dtype, other.fused, _Rounded(gathered(other), other.dtype, one.dtype))
    return left, right


def differ_in_layout(left: Path, right: Path, *, asked: bool) -> bool:
    """Whether two folders cannot be compared file by file: other formats, or other ranks; ``asked`` says that they are."""
    try:
        formats = [detect(path) for path in (left, right)]
    except InputError:
        return False
    if formats[0] != formats[1]:
        return True
    if formats[0] == "mindspore":
        return asked
    ranks = [rank_folders(iteration_folder(path)).keys() for path in (left, right)]
    return asked or ranks[0] != ranks[1]


def read_both(
    left: Path, right: Path, *, tensor: int | None, pipeline: int | None, rules: Rules
) -> tuple[Checkpoint, Checkpoint]:
    """Read the headers of both sides.

    Parallel sizes are those of MindSpore's side; without them they are the other side's, which reading then proves.
    """
    found: dict[Path, Checkpoint] = {}
    for path in sorted((left, right), key=lambda path: detect(path) == "mindspore"):
        if detect(path) == "megatron":
            found[path] = read(path, rules=rules)
            tensor, pipeline = tensor or found[path].tensor, pipeline or found[path].pipeline
        else:
            found[path] = read(path, tensor=tensor, pipeline=pipeline, rules=rules)
    return found[left], found[right]
