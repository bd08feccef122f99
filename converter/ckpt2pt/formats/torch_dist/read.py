"""A distributed checkpoint as global tensors.

.metadata, items --locate--> chunks of stacked tensors --layers, experts--> views of each tensor --> core's Index
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from ckpt2pt.core.extents import Shape, Stored, View, intersection
from ckpt2pt.core.index import Index, ordered
from ckpt2pt.core.params import axes_of, is_gated
from ckpt2pt.core.tensor import Key, Tensor, boxes, check_coverage, dense_strides
from ckpt2pt.errors import FormatError, TopologyError, aside
from ckpt2pt.formats.checkpoint import Checkpoint, Locate, Selection, agreed
from ckpt2pt.formats.folders import source_folder
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.rounding import check_rounding
from ckpt2pt.formats.torch_dist.buckets import Buckets
from ckpt2pt.formats.torch_dist.common import iteration_of_common, read_common
from ckpt2pt.formats.torch_dist.items import Located, locate
from ckpt2pt.formats.torch_dist.metadata import Chunk, Entry, Metadata, read_metadata
from ckpt2pt.formats.torch_dist.names import Named, named

WHOLE_STATES = (
    "the optimizer's state is stored in whole objects (dp_zero_gather_scatter), which are not read: load the checkpoint with the "
    "Megatron-LM that wrote it and save it again"
)
_HINT = "copy the whole folder again from where it was written"
_MAX_PLACES = 1 << 22
"""Layers times experts of one tensor: each is listed, and a damaged shape may say any number."""


def open_torch_dist(path: Path, wanted: Selection) -> Checkpoint:
    """Read the headers of one iteration: that of the tracker unless ``wanted`` names another.

    Its tensors are whole, whatever the parallel sizes were; sizes that are said have to be those of its arguments.
    A few elements of each weight are compared with its main parameter; weights alone leave the optimizer alone.
    Types and shapes are those of ``.metadata``: what is ``described`` opens no other file, unless buckets hold the optimizer's state.
    """
    folder = source_folder(path, wanted.iteration)
    metadata = read_metadata(folder)
    common = read_common(metadata, wanted.rules.pickle_globals)
    sizes = parallel_sizes(common)
    agreed((wanted.tensor, wanted.pipeline), sizes, folder)
    held = _held(metadata, weights_alone=wanted.weights_alone)
    if wanted.described and not held.state:
        locate: Locate | None = partial(_locate, metadata, held)
        index = ordered(_described(metadata, held), str(folder))
    else:
        locate, index = None, read_index(metadata, common, weights_alone=wanted.weights_alone)
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
        files=[str(folder / name) for name in dict.fromkeys(chunk.item.file for _, chunk in held.chunks(metadata))],
        locate=locate,
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


class _Held(NamedTuple):
    """Keys of tensors by what they stand for, and those of an optimizer's state that is not held by parameters."""

    named: Mapping[str, Named]
    state: Sequence[str]

    def chunks(self, metadata: Metadata) -> Iterator[tuple[str, Chunk]]:
        """Each with its type."""
        for key in (*self.named, *self.state):
            entry = metadata.tensors[key]
            for chunk in entry.chunks:
                yield entry.dtype, chunk


def _held(metadata: Metadata, *, weights_alone: bool) -> _Held:
    known = {key: found for key in metadata.tensors if (found := named(key))}
    if weights_alone:
        return _Held({key: found for key, found in known.items() if found.role == "param"}, ())
    return _Held(known, [key for key in metadata.tensors if key not in known])


def read_index(metadata: Metadata, common: Template, *, weights_alone: bool = False) -> Index:
    """Every weight, main parameter and moment, or ``weights_alone``.  Raises :class:`CoverageError` unless chunks hold each element once."""
    held = _held(metadata, weights_alone=weights_alone)
    buckets, others = Buckets.of({key: metadata.tensors[key] for key in held.state})
    if others:
        raise FormatError(
            f"{others[0]} is state of an optimizer in a form that is not read",
            where=metadata.folder,
            hint=f"convert weights alone{aside('mode')}",
        )
    located = dict(locate(metadata.folder, held.chunks(metadata)))
    index = _described(metadata, held)
    tensors = _with_views(metadata, held, index, located)
    if buckets:
        tensors |= buckets.read(tensors, located, common, metadata.folder)
    return ordered(tensors, str(metadata.folder))


def _locate(metadata: Metadata, held: _Held, index: Index, names: Collection[str] | None) -> Index:
    """The index with the views of the parameters ``names``, or of all: the headers of other items are not read."""
    wanted = index if names is None else {key: tensor for key, tensor in index.items() if key.name in names}
    located = dict(locate(metadata.folder, _chunks_of(metadata, held, wanted)))
    found = _with_views(metadata, held, wanted, located)
    check_rounding(found, str(metadata.folder))
    return {key: found.get(key, tensor) for key, tensor in index.items()}


def _chunks_of(metadata: Metadata, held: _Held, wanted: Index) -> Iterator[tuple[str, Chunk]]:
    """Chunks that hold a part of a tensor that is wanted; all of a tensor that was flattened, whose boxes do not tell."""
    for key, name in held.named.items():
        entry = metadata.tensors[key]
        places = {at for at, new in _keys_of(entry, name) if new in wanted}
        for chunk in entry.chunks if places else ():
            inside = _places(chunk.origin[: name.leading], chunk.shape[: name.leading])
            if entry.unflattened or any(at in places for at, _ in inside):
                yield entry.dtype, chunk


def _keys_of(entry: Entry, name: Named) -> Iterator[tuple[Shape, Key]]:
    """Each place along the axes that number layers and experts, and what is there."""
    leading = (entry.unflattened or entry.shape)[: name.leading]
    for at, _ in _places((0,) * len(leading), leading):
        yield at, Key(name.role, name.name(at))


def _described(metadata: Metadata, held: _Held) -> Index:
    """Every tensor without its views.  Raises :class:`TopologyError` where two keys of one tensor differ."""
    where, shapes = str(metadata.folder), dict[Key, set[tuple[str, Shape]]]()
    for key, name in held.named.items():
        entry = metadata.tensors[key]
        shape = entry.unflattened or entry.shape
        if len(shape) < name.leading:
            raise FormatError(f"{key} has the shape {list(shape)}", where=metadata.folder, hint=_HINT)
        places = max(math.prod(box[: name.leading]) for box in (shape, *(chunk.shape for chunk in entry.chunks)))
        if places > _MAX_PLACES:
            raise FormatError(f"{key} is said to hold {places} layers or experts", where=metadata.folder, hint=_HINT)
        for _, one in _keys_of(entry, name):
            shapes.setdefault(one, set()).add((entry.dtype, shape[name.leading :]))
    gated = is_gated({new.name: next(iter(kinds))[1] for new, kinds in shapes.items()}, where)
    found: dict[Key, Tensor] = {}
    for new, kinds in shapes.items():
        if len(kinds) > 1:
            listed = " and ".join(sorted(f"{dtype}{list(shape)}" for dtype, shape in kinds))
            raise TopologyError(f"{new} is there by several keys, as {listed}", where=where, hint=_HINT)
        [(dtype, shape)] = kinds
        axes = axes_of(new.name, shape, 1, gated=gated)
        found[new] = Tensor(new, dtype, axes.shape, axes.fused, ())
    return found


def _with_views(metadata: Metadata, held: _Held, wanted: Index, located: Mapping[Chunk, Located]) -> dict[Key, Tensor]:
    """The ``wanted`` tensors with their views; a second key for the same holds a copy."""
    where, parts = str(metadata.folder), dict[Key, list[tuple[Stored, ...]]]()
    for key, name in held.named.items():
        entry = metadata.tensors[key]
        here = (chunk for chunk in entry.chunks if chunk in located)
        views = (view for chunk in here for view in _views(chunk, entry, located[chunk], key, metadata.folder))
        split = _split(views, name.leading)
        for at, new in _keys_of(entry, name):
            if tensor := wanted.get(new):
                own = tuple(part for view in split.get(at, ()) for part in _natural(view, tensor.fused, tensor.shape))
                check_coverage(tensor._replace(views=own), where)
                parts.setdefault(new, []).append(own)
    return {
        key: tensor._replace(views=parts[key][0], replicas=tuple(view for own in parts[key][1:] for view in own))
        for key, tensor in wanted.items()
    }


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


def _split(views: Iterable[Stored], leading: int) -> dict[Shape, list[Stored]]:
    """The views of each layer, or of each expert of each layer, without the leading axes."""
    found: dict[Shape, list[Stored]] = {}
    for view in views:
        for number, step in _places(view.origin[:leading], view.shape[:leading]):
            first = view.first + sum(at * stride for at, stride in zip(step, view.strides[:leading], strict=True))
            own = View(view.origin[leading:], view.shape[leading:], view.strides[leading:], first, view.storage)
            found.setdefault(number, []).append(own)
    return found


def _places(origin: Shape, shape: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Each place of a box in C order, and its distance from the origin."""
    places = product(*(range(start, start + length) for start, length in zip(origin, shape, strict=True)))
    return zip(places, product(*map(range, shape)), strict=True)


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
