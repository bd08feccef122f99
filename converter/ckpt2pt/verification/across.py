"""Compare two checkpoints of any formats and parallel layouts: global tensor by global tensor, moments included.

MindSpore, tp 2 --formats--> index -+
                                    +-- each tensor's elements, gathered block by block --> rows, a Comparison
Megatron, tp 4  --formats--> index -+
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ckpt2pt.core.foldernames import expert_ranks, is_rank, iterations
from ckpt2pt.core.index import find
from ckpt2pt.core.names import NameTable, Rules
from ckpt2pt.core.params import EMBEDDING, HEAD, is_padded
from ckpt2pt.core.progress import SILENCE, Portion, Reporter
from ckpt2pt.core.tensor import ROLES, Key, Role, Tensor, box_of
from ckpt2pt.errors import FormatError, InputError, MissingInputError, UsageError
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.folders import iteration_folder, pairs
from ckpt2pt.formats.megatron.headers import read_rank
from ckpt2pt.formats.mindformers.flags import Flags
from ckpt2pt.formats.mindspore.degrees import weights_of
from ckpt2pt.formats.registry import MINDSPORE_FILES, detect, read
from ckpt2pt.io.paths import is_folder, listing
from ckpt2pt.verification.compare import ALL_FILES, Comparing, Comparison, compare
from ckpt2pt.verification.elements import rounded
from ckpt2pt.verification.gather import Bytes, Elements, Files, Gathered, file_of, gathered, width
from ckpt2pt.verification.leaves import TensorLeaf


def compare_any(
    paths: Sequence[Path],
    sizes: tuple[int | None, int | None] = (None, None),
    rules: Rules | None = None,
    *,
    ignore: Collection[str] = (),
    ignore_padding: bool = False,
    mindformers: Flags | None = None,
    reporter: Reporter = SILENCE,
) -> Comparison:
    """Compare two checkpoints leaf by leaf where their files are alike, else tensor by tensor.

    ``sizes`` are the tensor and pipeline parallel size of a MindSpore training, and ask for the second.  ``mindformers`` is what
    is said of the fused weights of MindFormers.
    """
    if len(paths) != 2:
        raise UsageError(
            f"{len(paths)} paths are given",
            where="ckpt2pt verify",
            hint="give two checkpoints to compare, one result, or none and the flags of convert",
        )
    left, right = paths
    if not differ_in_layout(left, right, asked=sizes != (None, None)):
        return compare(left, right, ignore=ignore, ignore_padding=ignore_padding, reporter=reporter)
    sides = read_both(left, right, tensor=sizes[0], pipeline=sizes[1], rules=rules or Rules(), mindformers=mindformers)
    return compare_across(*sides, ignore=ignore, ignore_padding=ignore_padding, reporter=reporter)


def compare_across(
    left: Checkpoint,
    right: Checkpoint,
    *,
    ignore: Collection[str] = (),
    ignore_padding: bool = False,
    reporter: Reporter = SILENCE,
) -> Comparison:
    """Compare every weight, main parameter and moment.

    A float32 weight stands for its main parameter, and is compared rounded with a weight of less precision.  Copies on
    other ranks are compared with what they copy.  ``ignore`` are patterns of ``role/name``; ``ignore_padding`` leaves out the
    rows that one side's vocabulary has more.  An iteration that only one side states is no difference.
    """
    run = _Run(sides=(left, right), ignore=frozenset(ignore), ignore_padding=ignore_padding)
    total = sum(map(_nbytes_to_read, (left, right)))
    portion = Portion(reporter, ALL_FILES, total)
    reporter.begin({ALL_FILES: total}, 0)
    with Files(advance=portion.advance) as files:
        for role in ROLES:
            run.compare_role(role, files)
        for side, checkpoint in (("left", left), ("right", right)):
            for tensor in checkpoint.index.values():
                run.compare_replicas(side, checkpoint, tensor, files)
    portion.fill()
    steps = [checkpoint.iteration for checkpoint in (left, right)]
    if None not in steps and steps[0] != steps[1]:
        run.unlike("", "iteration", "value", *steps)
    run.notes = [*left.warnings, *right.warnings, *run.notes]
    return run.result(left.path, right.path, len(_files(left) | _files(right)), "tensor")


def _nbytes_to_read(checkpoint: Checkpoint) -> int:
    """Each tensor once, and once more with each of its copies."""
    return sum(
        (tensor.numel + 2 * sum(view.numel for view in tensor.replicas)) * width(tensor.dtype)
        for tensor in checkpoint.index.values()
    )


def _files(checkpoint: Checkpoint) -> set[str]:
    views = (view for tensor in checkpoint.index.values() for view in (*tensor.views, *tensor.replicas))
    return {extent.path for view in views for extent in view.storage}


def _relative(checkpoint: Checkpoint, path: str) -> str:
    return path.removeprefix(f"{checkpoint.path}/")


@dataclass(frozen=True, slots=True)
class _Rounded:
    """Elements of more precision, rounded to nearest even."""

    elements: Elements
    source: str
    target: str

    def block(self, files: Files, start: int, stop: int) -> Bytes:
        """As the other side stores them."""
        return rounded(self.elements.block(files, start, stop), self.source, self.target)


@dataclass(slots=True, kw_only=True)
class _Run(Comparing):
    """Of tensors, wherever they lie."""

    sides: tuple[Checkpoint, Checkpoint]

    def compare_role(self, role: Role, files: Files) -> None:
        """Every tensor of a role; where one side has none at all, that is one difference."""
        keys = list(dict.fromkeys(key for side in self.sides for key in side.index))
        if all(key.role != role for key in keys):
            return
        keys = list(dict.fromkeys(Key(role, key.name) for key in keys))
        keys = [key for key in keys if not self.is_ignored(_name(key))]
        found = {key: tuple(_find(side, key) for side in self.sides) for key in keys}
        counts = [sum(pair[side] is not None for pair in found.values()) for side in (0, 1)]
        if all(counts):
            for key, (one, other) in found.items():
                self._compare(key, one, other, files)
        elif any(counts):
            shown = [f"{count} tensors" if count else "" for count in counts]
            self.one_sided("", f"{role}/*", shown[0], shown[1])

    def _compare(self, key: Key, one: Tensor | None, other: Tensor | None, files: Files) -> None:
        """One tensor of both sides."""
        name = _name(key)
        if one is None or other is None:
            if one or other:
                self.one_sided("", name, str(one or ""), str(other or ""))
            return
        numel = self._common(name, one, other)
        if numel is None:
            self.unlike("", name, "type", one, other)
            return

        def places(element: int | None) -> str:
            if element is None:
                return ""
            both = zip(self.sides, (one, other), strict=True)
            return " | ".join(_relative(side, file_of(tensor, element)) for side, tensor in both)

        self.compare_elements(name, *_alike(one, other), numel, files, places)

    def compare_replicas(self, side: str, checkpoint: Checkpoint, tensor: Tensor, files: Files) -> None:
        """What other ranks hold of the same."""
        if self.is_ignored(_name(tensor.key)):
            return
        for view in tensor.replicas:
            own, copy = (
                TensorLeaf(tensor.dtype, view.shape, Gathered(tensor.dtype, views, box_of(view)))
                for views in (tensor.views, (view,))
            )
            path = _relative(checkpoint, view.storage[0].path) if view.storage else ""
            place = partial(_same, f"{side}, {path}")
            self.compare_elements(f"copy of {_name(tensor.key)}", own, copy, view.numel, files, place)

    def _common(self, name: str, one: Tensor, other: Tensor) -> int | None:
        """Elements to be compared; None where the shapes exclude it."""
        if one.fused == other.fused:
            return one.numel
        if not is_padded(one.key.name) or one.fused[1:] != other.fused[1:]:
            return None
        if not self.ignore_padding:
            self.padding += 1
            return None
        rows = min(one.fused[0], other.fused[0])
        self.notes.append(f"{name}: rows from {rows} on are on one side only, {one} | {other}")
        return rows * math.prod(one.fused[1:])


def _same(file: str, _: object) -> str:
    return file


def _name(key: Key) -> str:
    return f"{key.role}/{key.name}"


def _find(checkpoint: Checkpoint, key: Key) -> Tensor | None:
    found = find(checkpoint.index, key)
    if found is None and key.name == HEAD:
        # The last stage's copy of tied embeddings goes by this name in MindSpore's files.
        return find(checkpoint.index, Key(key.role, EMBEDDING))
    return found


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
    """Whether two folders are to be compared as tensors: other formats, or other ranks; ``asked`` says that they are."""
    formats = [_format(path) for path in (left, right)]
    if formats == [None, None]:
        return False
    for path, found in zip((left, right), formats, strict=True):
        if found is None:
            if not is_folder(path):
                return False
            detect(path)  # says what a checkpoint is
    if asked or formats[0] != formats[1] or formats[0] in {"torch_dist", "mindformers", "huggingface"}:
        return True
    if formats[0] == "megatron":
        folders = [expert_ranks(listing(iteration_folder(path)), pipelined=True) for path in (left, right)]
        return (
            folders[0].keys() != folders[1].keys()
            or len({_form_of(found[min(found)]) for found in folders if found}) > 1
        )
    names = [
        {
            folder.name
            for place in (path, *iterations(listing(path)))
            for folder in listing(place)
            if is_rank(folder.name)
        }
        for path in (left, right)
    ]
    return names[0] != names[1] or _differ_in_shapes(left, right)


def _format(path: Path) -> str | None:
    try:
        return detect(path)
    except FormatError:
        return None


def _form_of(folder: Path) -> tuple[bool, bool, int] | None:
    """Names and form of the optimizer that a rank of Megatron-LM has, and how many model chunks; None where it cannot be read."""
    try:
        rank = read_rank(folder, experts=True)
    except (InputError, MissingInputError):
        return None
    return rank.core_names, rank.coalesced, len(rank.chunks)


def _differ_in_shapes(left: Path, right: Path) -> bool:
    """Whether the first files of two MindSpore folders hold other parameters, or other parts of them."""
    both = ((one, other) for _, one, other in pairs(left, right) if one and other)
    first = next(
        ((one, other) for one, other in both if one.suffix[1:] in MINDSPORE_FILES), None
    )  # a pt_meta may be inside
    if first is None:
        return False
    held = [{name: ref.shape for name, ref in weights_of(file, NameTable()).items()} for file in first]
    return held[0] != held[1]


def read_both(
    left: Path, right: Path, *, tensor: int | None, pipeline: int | None, rules: Rules, mindformers: Flags | None = None
) -> tuple[Checkpoint, Checkpoint]:
    """Read the headers of both sides.

    ``tensor`` and ``pipeline`` are the parallel sizes of the MindSpore training; where they are not given and nothing in it
    tells them, they are those of the other side.
    """
    found: dict[Path, Checkpoint] = {}
    undetermined: dict[Path, UsageError] = {}
    for path in dict.fromkeys((left, right)):
        format_ = detect(path)
        sizes = (tensor, pipeline) if format_ == "mindspore" else (None, None)
        flags = mindformers if format_ == "mindformers" else None
        try:
            found[path] = read(path, tensor=sizes[0], pipeline=sizes[1], rules=rules, mindformers=flags)
        except UsageError as error:
            if format_ == "mindformers":  # no sizes are what it lacks
                raise
            undetermined[path] = error
    for path, failure in undetermined.items():
        if not found or (tensor, pipeline) != (None, None):
            raise failure
        other = next(iter(found.values()))
        found[path] = read(path, tensor=other.tensor, pipeline=other.pipeline, rules=rules)
    return found[left], found[right]
