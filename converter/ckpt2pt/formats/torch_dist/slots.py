"""Which part of each global tensor a worker writes into its ``.distcp``.  Pure.

    index, (tp, pp) of the workers  ->  parts of tensors, and the slots that fill them

Any division would do, as loaders cut tensors anew.  It is that of the source's ranks, so that most parts are one stretch of
one file; an axis may be divided unevenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ckpt2pt.core.extents import Box, Shape, Stored, View
from ckpt2pt.core.index import Index
from ckpt2pt.core.params import axes_of, is_buffer, is_padded, kind_of, layer_of
from ckpt2pt.core.slots import FileSlots, Slot, check_used, source_of
from ckpt2pt.core.tensor import ROLES, Key, Role, Tensor, check_coverage, dense_strides
from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import TopologyError, aside
from ckpt2pt.formats.torch_dist.keys import PREFIXES, Layers, extra_states, keys_of
from ckpt2pt.formats.torch_dist.metadata import Chunk, Entry
from ckpt2pt.formats.torch_dist.write import DistcpFile, Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """A result, divided among workers: ``tensor`` of them share the tensors of each of ``pipeline`` stages.

    ``dtype`` is that of the weights; ``full`` says that optimizer state is written, too.
    """

    index: Index
    layers: Layers
    tensor: int
    pipeline: int
    dtype: str
    full: bool
    where: str
    rows: int | None = None
    """Rows of the vocabulary in the result, where it is padded; None: as many as in the source."""

    @property
    def roles(self) -> Sequence[Role]:
        """What is written of each parameter."""
        return ROLES if self.full else ROLES[:1]

    def ranks(self) -> Iterator[Rank]:
        """The workers."""
        return ((tp, pp) for pp in range(self.pipeline) for tp in range(self.tensor))

    def check(self) -> None:
        """Prove that every element of the source goes somewhere.

        Raises :class:`CoverageError` where one does not, and what :meth:`file` raises.
        """
        if self.pipeline > len(self.layers.numbers):
            raise TopologyError(
                f"{self.pipeline} pipeline stages share {len(self.layers.numbers)} layers",
                where=self.where,
                hint=f"give fewer{aside('target.parallelism.pipeline')}",
                field="target.parallelism.pipeline",
            )
        boxes: dict[str, list[Box]] = {}
        for pp in range(self.pipeline):
            for name in self.names(pp):
                tensor = self._padded(source_of(self.index, Key("param", name), self.where))
                boxes.setdefault(name, []).extend(box for tp in range(self.tensor) for box in self._boxes(tensor, tp))
        check_used(self.index, boxes, self.roles, {}, self.where)

    def file(self, rank: Rank) -> tuple[DistcpFile, FileSlots]:
        """What a worker writes.

        Raises :class:`MissingInputError` where the source lacks main parameters or moments, and :class:`TopologyError` for a
        parameter of which nothing says how tensor parallelism cuts it.
        """
        tp, pp = rank
        parts: list[Part] = []
        slots: list[Slot] = []
        for name in self.names(pp):
            for role in ROLES[:1] if is_buffer(name) else self.roles:
                key = Key(role, name)
                tensor = self._padded(source_of(self.index, key, self.where))
                for box in self._boxes(tensor, tp):
                    for part in self._parts(key, tensor, box):
                        slots.append(Slot(key, part.dtype, len(parts), 0, box))
                        parts.append(part)
        name = f"__{pp * self.tensor + tp}_0.distcp"
        stage, last = self.layers.stage(pp, self.pipeline), pp == self.pipeline - 1
        objects = () if tp else tuple(extra_states(self.layers, stage, last=last))
        return (
            DistcpFile(name=name, parts=tuple(parts), objects=objects),
            FileSlots(name=name, slots=tuple(slots), storages=tuple(part.nbytes for part in parts)),
        )

    @property
    def result(self) -> Index:
        """The tensors as they are in the result."""
        if self.rows is None:
            return self.index
        return {key: self._padded(tensor) for key, tensor in self.index.items()}

    def _padded(self, tensor: Tensor) -> Tensor:
        """With the rows that the vocabulary has in the result: those behind the source's are zeros."""
        if self.rows is None or not is_padded(tensor.key.name):
            return tensor
        shape = (self.rows, *tensor.fused[1:])
        return tensor._replace(shape=shape, fused=shape)

    def names(self, pp: int) -> Iterator[str]:
        """The parameters that the workers of a stage write."""
        stage = self.layers.stage(pp, self.pipeline)
        for name in dict.fromkeys(key.name for key in self.index):
            number = layer_of(name)
            if number is None:
                mine = pp == (0 if name.startswith("embedding.") else self.pipeline - 1)
            else:
                mine = self.layers.numbers[number] in stage
            if mine:
                yield name

    def _boxes(self, tensor: Tensor, tp: int) -> Iterator[Box]:
        """The worker's boxes in the natural axes: what nothing cuts is the first one's, gate and up are two where they are cut."""
        known = kind_of(tensor.key.name)
        if known is None:
            raise TopologyError(
                f"nothing says how {tensor.key.name} is cut over tensor-parallel ranks",
                where=self.where,
                hint="leave modules of a rule file out, or convert with the parallel sizes of the source into another format",
            )
        gated = len(tensor.shape) > len(tensor.fused)
        cut = axes_of(tensor.key.name, tensor.fused, 1, gated=gated).cut
        if cut is None or self.tensor == 1:
            if not tp:
                yield (0,) * len(tensor.shape), tensor.shape
            return
        start, stop = (rank * tensor.shape[cut] // self.tensor for rank in (tp, tp + 1))
        if start == stop:
            return
        origin = tuple(start if axis == cut else 0 for axis in range(len(tensor.shape)))
        shape = tuple(stop - start if axis == cut else length for axis, length in enumerate(tensor.shape))
        if gated:
            yield from (((half, *origin[1:]), (1, *shape[1:])) for half in range(tensor.shape[0]))
        else:
            yield origin, shape

    def _parts(self, key: Key, tensor: Tensor, box: Box) -> Iterator[Part]:
        """A box under each key that loaders ask for, in the axes that they know."""
        origin, shape = box
        if len(origin) > len(tensor.fused):
            origin, shape = (
                (origin[0] * tensor.shape[1] + origin[1], *origin[2:]),
                (shape[0] * shape[1], *shape[2:]),
            )
        dtype = tensor.dtype if is_buffer(key.name) else self.dtype if key.role == "param" else "float32"
        for name, lead, of in keys_of(key.name, self.layers):
            yield Part(PREFIXES[key.role] + name, dtype, of + tensor.fused, lead + origin, (1,) * len(lead) + shape)


def tensors_of(files: Iterable[DistcpFile], where: str) -> dict[str, Entry]:
    """The tensors that files hold together.

    Raises :class:`CoverageError` unless they hold every element of each exactly once: no loader checks it, and one that finds
    an element nowhere leaves what was in memory (torch/distributed/checkpoint/planner_helpers.py).
    """
    shapes: dict[str, tuple[str, Shape]] = {}
    chunks: dict[str, list[Chunk]] = {}
    for file in files:
        for part, chunk in file.chunks():
            shapes[part.key] = part.dtype, part.whole
            chunks.setdefault(part.key, []).append(chunk)
    for key, (dtype, shape) in shapes.items():
        views: tuple[Stored, ...] = tuple(
            View(one.origin, one.shape, dense_strides(one.shape), 0, ()) for one in chunks[key]
        )
        check_coverage(Tensor(Key("param", key), dtype, shape, shape, views), where)
    return {key: Entry(dtype, shape, tuple(chunks[key])) for key, (dtype, shape) in shapes.items()}
