"""What a rank of the result is made from: tensors, and the part of each that it holds.  Pure.

    tensors of the rank's own files, of which it holds all  -+
    global tensors  +  Topology of the result, (tp, pp)     -+->  RankTensors: index, part

Everything behind it (names, slots, coverage, manifests) is the same for a source that has the layout of the result already and
for one that has not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from ckpt2pt.core.extents import Box, Shape, TensorRef
from ckpt2pt.core.fill import box_ref, replicas_of
from ckpt2pt.core.index import Index
from ckpt2pt.core.names import TIED_HEAD, NameTable
from ckpt2pt.core.params import EMBEDDING, HEAD, axes_of, is_padded, kind_of, layer_of, legacy_name
from ckpt2pt.core.tensor import ROLES, Key, Tensor, box_of, sharded
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.errors import CoverageError, TopologyError, aside, refs

_FIRST = (EMBEDDING, "embedding.position_embeddings.weight")


class Part(NamedTuple):
    """What a rank holds of a tensor: a box of its natural axes, and the shape that the rank's file states."""

    box: Box
    shape: Shape


def whole(tensor: Tensor) -> Part:
    """All of a tensor."""
    return Part(((0,) * len(tensor.shape), tensor.shape), tensor.fused)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTensors:
    """``part`` of each tensor of ``index``, and ``others``: entries of a MindSpore file that are taken as they are.

    ``name`` is what MindSpore's file of the rank calls a tensor, ``copies`` are pairs that must hold the same bytes, as only
    the first is carried, and ``remarks`` are what a user should know before the result is used.
    """

    index: Index = field(default_factory=dict[Key, Tensor])
    part: Callable[[Tensor], Part] = whole
    name: Callable[[Key], str] = str
    others: Mapping[str, TensorRef] = field(default_factory=dict[str, TensorRef])
    copies: tuple[tuple[TensorRef, TensorRef], ...] = ()
    remarks: tuple[str, ...] = ()

    def ref(self, key: Key) -> TensorRef:
        """The rank's part of a tensor, wherever it lies."""
        tensor = self.index[key]
        part = self.part(tensor)
        return box_ref(tensor, part.box)._replace(name=self.name(key), shape=part.shape)

    def named(self, where: str) -> dict[str, Key]:
        """All tensors by their names.  Raises :class:`CoverageError` where two have the same."""
        found: dict[str, Key] = {}
        for key in self.index:
            name = self.name(key)
            if found.setdefault(name, key) is not key:
                raise CoverageError(
                    f"two parameters become {name}",
                    where=where,
                    hint=f"give each a name of its own in a rule file{aside('model.rules')}",
                )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The target: its layout, and what its arguments say; ``sizes`` holds Megatron's argument names.

    ``source_tensor`` is the tensor parallel size of the source.
    """

    topology: Topology
    source_tensor: int
    sizes: Mapping[str, int | bool]
    tied: bool
    where: str


def reshard(index: Index, rank: Rank, wanted: Wanted, table: NameTable) -> RankTensors:
    """What one rank of the target holds of global tensors.

    Raises :class:`TopologyError` for a tensor that cannot be cut into so many parts, and :class:`CoverageError` for one that
    no rank of the target would hold.
    """
    check_target(index, wanted)
    tp, pp = rank
    held = RankTensors(
        index={tensor.key: tensor for tensor in held_by(index, rank, wanted)},
        part=partial(part_of, tp=tp, wanted=wanted),
        name=partial(entry_name, pp=pp, table=table),
        remarks=padding_remarks(index, rank, wanted),
    )
    kept, copies = dict(held.index), list[tuple[TensorRef, TensorRef]]()
    for key, tensor in held.index.items():
        held.part(tensor)  # what cannot be cut is refused for that, before what the result does not name
        own = Key(key.role, HEAD)
        if (
            key.name == EMBEDDING and pp and own in held.index
        ):  # the last stage has a copy of tied embeddings of its own
            del kept[key]
            copies.append((held.ref(own), held.ref(key)._replace(name=entry_name(key, 0, table))))
        elif not tp:
            copies += (
                (one._replace(name=held.name(key)), copy._replace(name=held.name(key)))
                for one, copy in replicas_of(tensor)
            )
    return replace(held, index=kept, copies=tuple(copies))


def entry_name(key: Key, pp: int, table: NameTable) -> str:
    """What the file of a rank of stage ``pp`` calls a tensor; a later stage has the embedding as its head."""
    legacy = TIED_HEAD if key.name == EMBEDDING and pp else legacy_name(key.name)
    name = table.to_mindspore(legacy, lambda layer: layer)[0]
    return name if key.role == "param" else f"{key.role}.{name}"


def held_by(index: Index, rank: Rank, wanted: Wanted) -> Iterator[Tensor]:
    """What the pipeline stage holds, chunk by chunk."""
    topology, pp = wanted.topology, rank[1]
    layers = {layer for vpp in range(topology.virtual) for layer in topology.real_slots(pp, vpp).values()}
    first, last = pp == 0, pp == topology.pipeline - 1
    for key, tensor in index.items():
        layer = layer_of(key.name)
        if layer is not None:
            if layer in layers:
                yield tensor
        elif (
            (first and key.name in _FIRST)
            or (last and key.name not in _FIRST)
            or (last and wanted.tied and key.name == EMBEDDING)
        ):
            yield tensor


def part_of(tensor: Tensor, tp: int, wanted: Wanted) -> Part:
    """One rank's part; padding of the vocabulary follows the target.

    Raises :class:`TopologyError` for a tensor that cannot be cut into so many parts.
    """
    of = wanted.topology.tensor
    known = kind_of(tensor.key.name)
    if known is None:
        raise TopologyError(
            f"nothing says how {tensor.key.name} is cut over tensor-parallel ranks",
            where=wanted.where,
            hint="convert it with the parallel sizes that it was saved with",
        )
    axis = known[0].cuts[known[1]]
    fused = _padded(tensor, wanted)
    if axis is None:
        return Part(((0,) * len(fused), fused), fused)
    if fused[axis] % (of * (tensor.shape[0] if len(tensor.shape) > len(fused) else 1)):
        raise TopologyError(
            f"{tensor.key.name} has {fused[axis]} {('rows', 'columns')[axis]}, which {of} ranks do not divide",
            where=wanted.where,
            hint=f"choose another tensor parallel size for the target{aside('target.parallelism.tensor')}",
            field="target.parallelism.tensor",
        )
    local = tuple(length // of if number == axis else length for number, length in enumerate(fused))
    axes = axes_of(tensor.key.name, local, of, gated=len(tensor.shape) > len(fused))
    return Part(box_of(sharded(axes.shape, axes.cut, tp, of, 0, None)), local)


def _padded(tensor: Tensor, wanted: Wanted) -> Shape:
    """The global shape in the target."""
    rows, held = wanted.sizes.get("padded_vocab_size"), tensor.fused[0]
    if not is_padded(tensor.key.name) or type(rows) is not int or rows == held:
        return tensor.fused
    _check_padding(tensor.key.name, held, rows, wanted)
    return (rows, *tensor.fused[1:])


def padded_rows(tokens: object, held: int, multiple: int) -> int:
    """Rows for ``tokens``, or for the ``held`` rows of the source where these are not known or more."""
    known = tokens if type(tokens) is int and 0 < tokens <= held else held
    return -(-known // multiple) * multiple


def vocabulary_rows(args: Mapping[str, object], held: int, tensor: int) -> int:
    """Rows of the embedding on ``tensor`` ranks together, by training arguments; ``held`` are those of the source.

    Where the arguments do not say how it is padded, it stays as it is.
    """
    stated, degree = args.get("padded_vocab_size"), args.get("tensor_model_parallel_size")
    if type(stated) is int and degree in {None, tensor}:
        return stated
    divisor = args.get("make_vocab_size_divisible_by")
    if type(divisor) is not int or divisor < 1:
        return held
    return padded_rows(args.get("vocab_size"), held, divisor * tensor)


def _check_padding(name: str, held: int, rows: int, wanted: Wanted) -> None:
    """Refuse a target whose vocabulary has rows more or less than can be padding.

    Without the number of tokens, the smaller side is the most that it can be: the other one is then at most that, filled up
    as Megatron-LM does it (cac60ce4, megatron/tokenizer/tokenizer.py, ``_vocab_size_with_padding``).
    """
    tokens, divisor = wanted.sizes.get("vocab_size"), wanted.sizes.get("make_vocab_size_divisible_by")
    small, large = sorted((held, rows))
    if type(tokens) is int and tokens > 0:
        fits, known = tokens <= small, f"there are {tokens} tokens"
    elif type(divisor) is int and divisor > 0:
        multiple = divisor * (wanted.source_tensor if held > rows else wanted.topology.tensor)
        fits = large <= -(-small // multiple) * multiple
        known = f"padding is to a multiple of {multiple}"
    else:
        fits, known = False, "neither the number of tokens nor make_vocab_size_divisible_by is known"
    if not fits:
        raise TopologyError(
            f"{name} has {held} rows in the source, {rows} in the target, and {known}",
            where=wanted.where,
            hint="make pt_meta for this vocabulary: ckpt2pt pt-meta --from-pt-meta ... --vocab-size TOKENS",
        )


def padding_remarks(index: Index, rank: Rank, wanted: Wanted) -> tuple[str, ...]:
    """What happens to the rows of the vocabulary; nothing where both sides have as many, or the rank has none."""
    ends = {EMBEDDING: 0, HEAD: wanted.topology.pipeline - 1}
    rows = wanted.sizes.get("padded_vocab_size")
    keys = (Key(role, name) for role in ROLES for name, end in ends.items() if end == rank[1])
    held = next((index[key].fused[0] for key in keys if key in index), None)
    if held is None or type(rows) is not int or held == rows:
        return ()
    if rows > held:
        return (f"the vocabulary is padded from {held} to {rows} rows: rows {held} to {rows - 1} are zero",)
    return (
        f"the vocabulary has {held} rows and the target {rows}: rows {rows} to {held - 1} are padding and left out",
    )


def check_target(index: Index, wanted: Wanted) -> None:
    """Refuse a target whose layers are not those of the source, or whose ranks would cut groups of attention heads."""
    _check_layers(index, wanted)
    _check_heads(wanted)


def _check_layers(index: Index, wanted: Wanted) -> None:
    topology = wanted.topology
    there = {layer for key in index if (layer := layer_of(key.name)) is not None}
    slots = {layer for layer in range(topology.num_layers) if layer not in topology.noop}
    if there != slots:
        unexpected, missing = sorted(there - slots), sorted(slots - there)
        raise CoverageError(
            f"layer {unexpected[0]} of the source has no place in the target"
            if unexpected
            else f"layer {missing[0]} of the target is not in the source",
            where=wanted.where,
            hint=f"check {refs('model.numLayers', 'model.noopLayers')}",
        )


def _check_heads(wanted: Wanted) -> None:
    """Groups of attention heads cannot be cut: rows of one head would lie on two ranks."""
    grouped = wanted.sizes.get("group_query_attention")
    name = "num_query_groups" if grouped else "num_attention_heads"
    heads, tensor = wanted.sizes.get(name), wanted.topology.tensor
    if type(heads) is int and heads % tensor:
        raise TopologyError(
            f"{name} is {heads}, which a tensor parallel size of {tensor} does not divide",
            where=wanted.where,
            hint=f"choose another tensor parallel size for the target{aside('target.parallelism.tensor')}",
            field="target.parallelism.tensor",
        )
