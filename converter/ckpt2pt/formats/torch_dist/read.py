"""A distributed checkpoint as global tensors.

.metadata, items --locate--> chunks of stacked tensors --layers, experts--> views of each tensor --> core's Index
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from ckpt2pt.core.extents import Box, Shape, Stored, View, intersection
from ckpt2pt.core.index import Index, ordered
from ckpt2pt.core.params import axes_of, is_gated
from ckpt2pt.core.tensor import Key, Tensor, boxes, check_coverage, dense_strides
from ckpt2pt.errors import FormatError, TopologyError, aside
from ckpt2pt.formats.checkpoint import Checkpoint, Selection, agreed
from ckpt2pt.formats.folders import source_folder
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.rounding import check_rounding
from ckpt2pt.formats.torch_dist.buckets import Buckets
from ckpt2pt.formats.torch_dist.common import iteration_of_common, read_common
from ckpt2pt.formats.torch_dist.items import Located, locate
from ckpt2pt.formats.torch_dist.metadata import Chunk, Entry, Metadata, read_metadata
from ckpt2pt.formats.torch_dist.names import named

WHOLE_STATES = (
    "the optimizer's state is stored in whole objects (dp_zero_gather_scatter), which are not read: load the checkpoint with the "
    "Megatron-LM that wrote it and save it again"
)
_HINT = "copy the whole folder again from where it was written"


def open_torch_dist(path: Path, wanted: Selection) -> Checkpoint:
    """Read the headers of one iteration: that of the tracker unless ``wanted`` names another.

    Its tensors are whole, whatever the parallel sizes were; sizes that are said have to be those of its arguments.
    A few elements of each weight are compared with its main parameter; weights alone leave the optimizer alone.
    """
    folder = source_folder(path, wanted.iteration)
    metadata = read_metadata(folder)
    common = read_common(metadata, wanted.rules.pickle_globals)
    sizes = parallel_sizes(common)
    agreed((wanted.tensor, wanted.pipeline), sizes, folder)
    index = read_index(metadata, common, weights_alone=wanted.weights_alone)
    check_rounding(index, str(folder))
    samples = common.args.get("consumed_train_samples")
    return Checkpoint(
        path=folder,
        format="torch_dist",
        iteration=iteration_of_common(common, folder),
        tensor=sizes[0],
        pipeline=sizes[1],
        expert=expert if type(expert := common.args.get("expert_model_parallel_size")) is int and expert > 0 else 1,
        index=index,
        warnings=tuple(_warnings(metadata)),
        template=common,
        samples=samples if type(samples) is int else None,
        items=metadata.items,
    )


def _warnings(metadata: Metadata) -> Iterator[str]:
    if metadata.extra:
        yield f"{', '.join(metadata.extra[:6])} hold no part of the checkpoint"
    if metadata.whole_states:
        yield WHOLE_STATES


def parallel_sizes(common: Template) -> tuple[int, int]:
    """Tensor and pipeline parallel size of the run that wrote it, by its arguments; 1 where they say nothing."""
    stated = (common.args.get(f"{name}_model_parallel_size") for name in ("tensor", "pipeline"))
    tensor, pipeline = (size if type(size) is int and size > 0 else 1 for size in stated)
    return tensor, pipeline


def read_index(metadata: Metadata, common: Template, *, weights_alone: bool = False) -> Index:
    """Every weight, main parameter and moment, or ``weights_alone``.  Raises :class:`CoverageError` unless chunks hold each element once."""
    known = {key: found for key in metadata.tensors if (found := named(key))}
    state = {key: entry for key, entry in metadata.tensors.items() if key not in known}
    if weights_alone:
        known, state = {key: found for key, found in known.items() if found.role == "param"}, {}
    buckets, others = Buckets.of(state)
    if others:
        raise FormatError(
            f"{others[0]} is state of an optimizer in a form that is not read",
            where=metadata.folder,
            hint=f"convert weights alone{aside('mode')}",
        )
    held = [metadata.tensors[key] for key in (*known, *state)]
    chunks = ((entry.dtype, chunk) for entry in held for chunk in entry.chunks)
    located = dict(locate(metadata.folder, chunks))
    parts: dict[Key, list[tuple[Entry, Shape, list[Stored]]]] = {}
    for key, name in known.items():
        entry = metadata.tensors[key]
        shape = entry.unflattened or entry.shape
        if len(shape) < name.leading:
            raise FormatError(f"{key} has the shape {list(shape)}", where=metadata.folder, hint=_HINT)
        views = [view for chunk in entry.chunks for view in _views(chunk, entry, located[chunk], key, metadata.folder)]
        for numbers, own in _split(views, shape, name.leading):
            new = Key(name.role, name.name(numbers))
            parts.setdefault(new, []).append((entry, shape[name.leading :], own))
    where = str(metadata.folder)
    shapes = {key.name: held[0][1] for key, held in parts.items()}
    gated = is_gated(shapes, where)
    tensors = {key: _tensor(key, held, gated=gated, where=where) for key, held in parts.items()}
    if buckets:
        tensors |= buckets.read(tensors, located, common, metadata.folder)
    return ordered(tensors, where)


def _views(chunk: Chunk, entry: Entry, located: Located, key: str, folder: Path) -> Iterator[Stored]:
    """The boxes of the tensor that a chunk holds: one, or several where the tensor was flattened."""
    shape = entry.unflattened
    if shape is None:
        yield View(chunk.origin, chunk.shape, located.strides, located.first, located.storage)
        return
    # (L, Y, X) is stored as (L / l, Y / y, X / x, l * y * x): a cell of the grid is a rank's part, and a chunk a stretch of it.
    grid, (*place, start), (*one, numel) = entry.shape[:-1], chunk.origin, chunk.shape
    fits = len(grid) == len(shape) and all(
        cells and not length % cells for length, cells in zip(shape, grid, strict=True)
    )
    cell = tuple(length // cells for length, cells in zip(shape, grid, strict=True)) if fits else ()
    if (
        not fits
        or math.prod(cell) != entry.shape[-1]
        or any(length != 1 for length in one)
        or located.strides[-1:] != (1,)
    ):
        raise FormatError(f"{key} {list(entry.shape)} cannot be a flattened {list(shape)}", where=folder, hint=_HINT)
    done = located.first
    for origin, box in boxes(cell, start, start + numel):
        at = tuple(number * length + inner for number, length, inner in zip(place, cell, origin, strict=True))
        yield View(at, box, dense_strides(box), done, located.storage)
        done += math.prod(box)


def _split(views: list[Stored], shape: Shape, leading: int) -> Iterator[tuple[Shape, list[Stored]]]:
    """The views of each layer, or of each expert of each layer, without the leading axes."""
    found: dict[Shape, list[Stored]] = {number: [] for number, _ in _places((0,) * leading, shape[:leading])}
    for view in views:
        for number, step in _places(view.origin[:leading], view.shape[:leading]):
            first = view.first + sum(at * stride for at, stride in zip(step, view.strides[:leading], strict=True))
            own = View(view.origin[leading:], view.shape[leading:], view.strides[leading:], first, view.storage)
            found.setdefault(number, []).append(own)
    yield from found.items()


def _places(origin: Shape, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Each place of a box, and its distance from the origin."""
    for step, _ in _singles(shape):
        yield tuple(a + b for a, b in zip(origin, step, strict=True)), step


def _singles(shape: Shape) -> Iterator[Box]:
    for number in range(math.prod(shape)):
        yield from boxes(shape, number, number + 1)


def _tensor(key: Key, held: list[tuple[Entry, Shape, list[Stored]]], *, gated: bool, where: str) -> Tensor:
    """One tensor; a second key for the same holds a copy."""
    entry, shape, _ = held[0]
    axes = axes_of(key.name, shape, 1, gated=gated)
    if len({(entry.dtype, shape) for entry, shape, _ in held}) > 1:
        kinds = " and ".join(sorted(f"{entry.dtype}{list(shape)}" for entry, shape, _ in held))
        raise TopologyError(f"{key} is there by several keys, as {kinds}", where=where, hint=_HINT)
    found: list[tuple[Stored, ...]] = []
    for _, fused, views in held:
        own = tuple(part for view in views for part in _natural(view, fused, axes.shape))
        check_coverage(Tensor(key, entry.dtype, axes.shape, axes.fused, own), where)
        found.append(own)
    copies = tuple(view for own in found[1:] for view in own)
    return Tensor(key, entry.dtype, axes.shape, axes.fused, found[0], copies)


def _natural(view: Stored, fused: Shape, shape: Shape) -> Iterator[Stored]:
    """The same along natural axes, of which one more may number gate and up."""
    if len(shape) == len(fused):
        yield view
        return
    rows = shape[1]
    for half in range(shape[0]):
        shared = intersection(((view.origin[0],), (view.shape[0],)), ((half * rows,), (rows,)))
        if shared:
            (start,), (length,) = shared
            first = view.first + (start - view.origin[0]) * view.strides[0]
            origin = (half, start - half * rows, *view.origin[1:])
            # Two halves never share a view, so that the stride along the first axis does not matter.
            yield View(origin, (1, length, *view.shape[1:]), (0, *view.strides), first, view.storage)
