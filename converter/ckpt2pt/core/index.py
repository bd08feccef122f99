"""The local tensors of ranks, one after the other, become global tensors.  Pure.

tp 0: linear_fc1 (16, 8)  -+
tp 1: linear_fc1 (16, 8)  -+->  Tensor (2, 16, 8), two views           norms, tied heads: one view, the others replicas
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ckpt2pt.core.extents import Extent, Shape, Stored
from ckpt2pt.core.params import EMBEDDING, Axes, axes_of, is_buffer, is_gated, layer_of, model_order
from ckpt2pt.core.tensor import ROLES, Key, Role, Tensor, check_coverage, sharded
from ckpt2pt.errors import CoverageError, TopologyError


class Local(NamedTuple):
    """A rank's part of a parameter: in C order, ``first`` elements into a storage."""

    dtype: str
    shape: Shape
    first: int
    storage: tuple[Extent, ...]


Index = Mapping[Key, Tensor]
"""Every tensor of a checkpoint."""


def find(index: Index, key: Key) -> Tensor | None:
    """The tensor of a key.

    A weight is rounded from its float32 main parameter where the checkpoint has no other, and a float32 weight is its own
    main parameter (MindSpeed-Core-MS feature-0.1 saves float32 parameters alone).
    """
    if key in index or key.role not in {"param", "main_param"}:
        return index.get(key)
    other = index.get(Key("main_param" if key.role == "param" else "param", key.name))
    return other if other and other.dtype == "float32" else None


def layer_numbers(index: Index) -> dict[int, int]:
    """The layers that have tensors, and which one each is: a no-op layer has a number and no tensor."""
    there = {layer for key in index if (layer := layer_of(key.name)) is not None}
    return {layer: number for number, layer in enumerate(sorted(there))}


def without_gaps(index: Index) -> Index:
    """The same tensors with their layers numbered on: those behind a no-op layer move up."""
    numbers = layer_numbers(index)
    if all(layer == number for layer, number in numbers.items()):
        return index
    moved: dict[Key, Tensor] = {}
    for key, tensor in index.items():
        layer = layer_of(key.name)
        new = key if layer is None else Key(key.role, key.name.replace(f".{layer}.", f".{numbers[layer]}.", 1))
        moved[new] = tensor._replace(key=new)
    return moved


@dataclass(slots=True)
class Collector:
    """Collects local tensors by key and tensor-parallel rank; ``tensor`` is the number of ranks."""

    tensor: int
    where: str
    _parts: dict[Key, dict[int, list[Local]]] = field(default_factory=dict[Key, dict[int, list[Local]]])

    def add(self, role: Role, name: str, tp: int, local: Local, *, replica: bool = False) -> None:
        """Take what rank ``tp`` holds of a parameter.

        What a second pipeline stage holds of it is a replica: tied embeddings lie on the first and on the last.  Of expert
        parallel ranks all hold the same dense parameters: those of all but one are a ``replica``.
        """
        copies = self._parts.setdefault(Key(role, name), {}).setdefault(tp, [])
        if copies and name != EMBEDDING and not replica:
            raise CoverageError(
                f"{Key(role, name)} is on two pipeline stages, or in one file by two names",
                where=self.where,
                hint="check the parallel sizes, and that all folders are of one save",
            )
        copies.append(local)

    def index(self, *, partial: bool = False) -> Index:
        """The global tensors, role by role in the order of the model.

        Raises :class:`CoverageError` or :class:`TopologyError` for ranks that do not fit together, and unless ``partial``
        where some parameters have a main parameter or moments and others have not.
        """
        shapes = {key.name: next(iter(ranks.values()))[0].shape for key, ranks in self._parts.items()}
        gated = is_gated(shapes, self.where)
        known: dict[tuple[str, Shape], Axes] = {}
        found = {key: self._tensor(key, ranks, known, gated=gated) for key, ranks in self._parts.items()}
        return ordered(found, self.where, partial=partial)

    def _tensor(
        self, key: Key, ranks: Mapping[int, list[Local]], known: dict[tuple[str, Shape], Axes], *, gated: bool
    ) -> Tensor:
        """``known`` are axes by name and local shape, which are the same for all roles."""
        missing = [tp for tp in range(self.tensor) if tp not in ranks]
        parts = [local for copies in ranks.values() for local in copies]
        if missing or len({(part.dtype, part.shape) for part in parts}) > 1:
            kinds = sorted({f"{part.dtype}{list(part.shape)}" for part in parts})
            raise TopologyError(
                f"{key} is missing on tp {', '.join(map(str, missing))}"
                if missing
                else f"{key} is {' and '.join(kinds)} on different ranks",
                where=self.where,
                hint="check the tensor parallel size, and that the checkpoint is complete",
            )
        first = parts[0]
        axes = known.get((key.name, first.shape))
        if axes is None:
            axes = known[key.name, first.shape] = axes_of(key.name, first.shape, self.tensor, gated=gated)
        views: list[Stored] = []
        replicas: list[Stored] = []
        for tp, copies in ranks.items():
            for number, local in enumerate(copies):
                held = sharded(axes.shape, axes.cut, tp, self.tensor, local.first, local.storage)
                (replicas if number or (axes.cut is None and tp) else views).append(held)
        found = Tensor(key, first.dtype, axes.shape, axes.fused, tuple(views), tuple(replicas))
        check_coverage(found, self.where)
        return found


def ordered(found: Index, where: str, *, partial: bool = False) -> Index:
    """The same role by role in the order of the model.

    Raises :class:`CoverageError` unless ``partial`` where some parameters have a main parameter or moments and others have not.
    """
    if not partial:
        _check_roles(found, where)
    names = sorted({key.name for key in found}, key=model_order)
    order = {name: number for number, name in enumerate(names)}
    return dict(sorted(found.items(), key=lambda item: (ROLES.index(item[0].role), order[item[0].name])))


def _check_roles(index: Index, where: str) -> None:
    """Refuse a checkpoint of which some ranks hold the optimizer and others do not."""
    names = dict.fromkeys(key.name for key in index if not is_buffer(key.name))
    for role in ROLES:
        lacking = [name for name in names if Key(role, name) not in index]
        if 0 < len(lacking) < len(names):
            raise CoverageError(
                f"{len(lacking)} of {len(names)} parameters have no {role}, such as {lacking[0]}",
                where=where,
                hint="check that all ranks are of one save, with the optimizer or all of them without",
            )
