"""StagePlan: every copy that one pipeline stage needs, proved complete.  Pure: headers in, a frozen value out.

{MindSpore name: TensorRef}  +  ChunkMap (names in buffer order, buckets)  +  Topology, NameTable
|
v
RankPlan(tp, pp)   chunks -> weights: Megatron name <- TensorRef of the parameter and of both moments
each source tensor used once or listed in ``ignored``, each target slot filled once
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt2pt.core import names
from ckpt2pt.core.buckets import Buffer, Placement, stated_shape
from ckpt2pt.core.extents import DTYPE_BYTES, TensorRef
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.topology import Topology
from ckpt2pt.core.training_step import TrainingStep
from ckpt2pt.errors import CoverageError, FormatError, InputError, TopologyError, aside, ref, refs

FLOATS = frozenset({"float32", "bfloat16", "float16"})
"""Types that convert into each other exactly, or by rounding to nearest even on the way down."""

_RULES = aside("model.rules")
_ITERATION = aside("source.iteration")
_UNWANTED = f"check {refs('parallelism', 'model.numLayers')}, or list it under ignore in a rule file{_RULES} if it is not wanted"
_FLOAT_HINT = f"point {ref('metadata.path')} at the metadata of a bf16, fp16 or fp32 run"
_TENSOR_HINT = f"check {ref('parallelism.tensor')}, and that pt_meta belongs to this model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMap:
    """One model chunk as the metadata describes it: names in registration order, and the buffer when there is one."""

    vpp: int
    names: tuple[str, ...]
    buffer: Buffer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One target parameter and where its bytes are.

    ``dtype`` is the model file's; ``moments`` are exp_avg and exp_avg_sq, ``placement`` the slot in the buffer
    (both None in a params-only conversion).
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: str
    source: TensorRef
    moments: tuple[TensorRef, TensorRef] | None
    placement: Placement | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """One model chunk: ``key`` in the model file, weights in registration order."""

    vpp: int
    key: str
    weights: tuple[Weight, ...]
    buffer: Buffer | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """Everything that goes into one ``mp_rank_*`` folder.

    ``ignored`` pairs each source entry that is not carried with the reason; ``tied_copies`` are pairs of source tensors that
    must hold the same bytes because only the first is carried (tied embeddings); ``prefix`` is what all names carried.
    """

    tp: int
    pp: int
    directory: str
    source: str
    training_step: TrainingStep
    chunks: tuple[ChunkPlan, ...]
    ignored: tuple[tuple[str, str], ...]
    tied_copies: tuple[tuple[TensorRef, TensorRef], ...]
    prefix: str = ""
    unused_rules: frozenset[str] = frozenset()
    """Rules of the rule file that match no name of this rank."""
    stated: Statement = Statement()  # noqa: RUF009 - frozen
    """What the source says of optimizer and scheduler."""

    @property
    def weights(self) -> Iterable[Weight]:
        """Every weight of every chunk."""
        return (weight for chunk in self.chunks for weight in chunk.weights)

    @property
    def full(self) -> bool:
        """True when the optimizer's state is carried."""
        return any(chunk.buffer is not None for chunk in self.chunks)

    @property
    def source_bytes(self) -> int:
        """Bytes to read: every parameter, and its moments in a full conversion."""
        return sum(tensor_ref.nbytes for w in self.weights for tensor_ref in (w.source, *(w.moments or ())))

    @property
    def payload_bytes(self) -> int:
        """Bytes of tensors to write: the model's weights, and three float32 buffers."""
        model = sum(weight.source.numel * DTYPE_BYTES[weight.dtype] for weight in self.weights)
        return model + sum(12 * chunk.buffer.numel for chunk in self.chunks if chunk.buffer)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One pipeline stage: its tensor-parallel ranks, all at the same iteration."""

    pp: int
    ranks: tuple[RankPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInput:
    """What was found for one rank: the index of its file, the time it tells, and its metadata with the folder it is from."""

    tp: int
    pp: int
    source: str
    index: Mapping[str, TensorRef]
    training_step: TrainingStep
    chunks: Sequence[ChunkMap]
    sizes: Mapping[str, int | bool]
    params_dtype: str
    tied: bool
    metadata: str = ""
    first_stage: Mapping[str, TensorRef] | None = None
    """Index of the first stage's file at the same tp, for a last stage without a copy of the tied embeddings."""
    copies: tuple[tuple[TensorRef, TensorRef], ...] = ()
    """What other ranks of the source hold of the same, where the layout changes."""
    stated: Statement = Statement()  # noqa: RUF009 - frozen


def plan_rank(found: RankInput, topology: Topology, table: NameTable, *, full: bool) -> RankPlan:
    """Match every target slot with its source tensor, or raise naming what does not match."""
    source = _Source(found, table)
    check_layers(found.chunks, topology, pp=found.pp, where=found.metadata or found.source)
    chunks = tuple(_plan_chunk(chunk, found, source, topology, table, full=full) for chunk in found.chunks)
    if full and not all(chunk.buffer for chunk in chunks if chunk.weights):
        raise FormatError(
            "the metadata has no param map, which the optimizer's buckets need",
            where=found.source,
            hint=f"point {ref('metadata.path')} at a pt_meta with param_map_buffer0_*.json, "
            f"or convert weights alone{aside('mode')}",
        )
    copies = [pair for pair in found.copies if full or table.classify(pair[0].name).role == "param"]
    tied_copies = (*source.leftovers(full=full, tied=found.tied), *copies)
    return RankPlan(
        tp=found.tp,
        pp=found.pp,
        directory=topology.directory(found.tp, found.pp),
        source=found.source,
        training_step=found.training_step,
        chunks=_with_empty_chunks(chunks, topology, found.pp),
        ignored=tuple(source.ignored),
        tied_copies=tied_copies,
        prefix=source.prefix,
        unused_rules=table.unused(found.index, (weight.name for chunk in chunks for weight in chunk.weights)),
        stated=found.stated,
    )


def _with_empty_chunks(chunks: tuple[ChunkPlan, ...], topology: Topology, pp: int) -> tuple[ChunkPlan, ...]:
    """A chunk of no-op layers alone has no parameters and no buffer, but its key in the model file."""
    have = {chunk.vpp: chunk for chunk in chunks}
    empty = (ChunkPlan(vpp=v, key=topology.model_key(v), weights=(), buffer=None) for v in range(topology.virtual))
    return tuple(have.get(chunk.vpp, chunk) for chunk in empty)


def check_layers(chunks: Sequence[ChunkMap], topology: Topology, *, pp: int, where: str) -> None:
    """Refuse metadata whose layers or ends are not those of the topology."""
    if tuple(chunk.vpp for chunk in chunks) != topology.filled_chunks(pp):
        raise TopologyError(
            f"the metadata of stage {pp} describes chunks {[chunk.vpp for chunk in chunks]}, "
            f"the options ask for {list(topology.filled_chunks(pp))}",
            where=where,
            hint=f"check {refs('parallelism.virtualPipeline', 'model.noopLayers')}, "
            f"or point {ref('metadata.path')} at the right pt_meta",
        )
    for chunk in chunks:
        found = {layer for name in chunk.names if (layer := names.local_layer(name)) is not None}
        wanted = set(topology.real_slots(pp, chunk.vpp))
        if found != wanted:
            raise TopologyError(
                f"stage {pp} chunk {chunk.vpp} has layer slots {spans(found)} in the metadata, "
                f"but {spans(wanted)} by the options (no-op layers keep their slot)",
                where=where,
                hint=f"set {refs('model.numLayers', 'model.noopLayers', 'model.layersPerStage')} "
                "to those of the Megatron run that wrote pt_meta",
            )


class _Source:
    """The entries of one source file, sorted by what they are; remembers what was taken."""

    def __init__(self, found: RankInput, table: NameTable) -> None:
        self.where = found.source
        self.ignored: list[tuple[str, str]] = []
        self.roles: dict[str, dict[str, TensorRef]] = {"param": {}, "exp_avg": {}, "exp_avg_sq": {}}
        self.taken: dict[str, set[str]] = {role: set() for role in self.roles}
        # By role as well: both ends may prefix their moments with adam_m., adam_v. and the like.
        first_stage = found.first_stage or {}
        self.first_stage: dict[tuple[str, str], TensorRef] = {
            (what.role, what.name): first_stage[name]
            for name, what in table.classify_all(first_stage, where=found.source)[0].items()
        }
        shards = [name for name in found.index if names.SHARD.fullmatch(name)]
        if shards:
            raise InputError(
                f"the file holds {len(shards)} data-parallel shards ({shards[0]}, ...) instead of named parameters",
                where=found.source,
                hint="the first rank holds named parameters: convert a checkpoint whose ranks were all saved alike"
                + _ITERATION,
            )
        known, self.prefix = table.classify_all(found.index, where=found.source)
        for name, tensor_ref in found.index.items():
            what = known[name]
            if what.role == "ignored":
                if name not in found.stated.names:
                    self.ignored.append((name, what.name))
                continue
            bare = names.without_pipeline_suffix(what.name)
            twice = self.roles[what.role].setdefault(bare, tensor_ref)
            if twice is not tensor_ref:
                raise CoverageError(
                    f"{twice.name} and {name} are the same {what.role} of {bare}",
                    where=found.source,
                    hint=f"remove one of the two, or list it under ignore in a rule file{_RULES}",
                )

    def take(self, role: str, spellings: Sequence[str], wanted: str) -> TensorRef:
        entries, taken = self.roles[role], self.taken[role]
        for name in spellings:
            if name in entries and name not in taken:
                taken.add(name)
                return entries[name]
        prefix = "" if role == "param" else f"{role}."
        if names.is_tied_head(wanted):
            # Both ends hold the same values, so a last stage without a copy of its own takes the first stage's.
            for name in spellings:
                if (role, name) in self.first_stage:
                    return self.first_stage[role, name]
        near = names.nearest(spellings[0], [name for name in entries if name not in taken])
        raise CoverageError(
            f"{prefix}{spellings[0]} is missing, which Megatron's {wanted} is made from"
            + (f" (nearest is {prefix}{near})" if near else ""),
            where=self.where,
            hint=f"check {refs('parallelism', 'model.noopLayers')}, or add the name to a rule file{_RULES}"
            + ("" if role == "param" else f", or convert weights alone{aside('mode')}"),
        )

    def leftovers(self, *, full: bool, tied: bool) -> tuple[tuple[TensorRef, TensorRef], ...]:
        """List or refuse what no slot took; tied copies become pairs to be compared."""
        tied_copies: list[tuple[TensorRef, TensorRef]] = []
        embedding, head = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
        for role, entries in self.roles.items():
            for name, tensor_ref in entries.items():
                if name in self.taken[role]:
                    continue
                if role != "param" and not full:
                    self.ignored.append((tensor_ref.name, "params only"))
                elif tied and {embedding, head} >= {name} and {embedding, head} & self.taken[role]:
                    (kept,) = {embedding, head} & self.taken[role]
                    self.ignored.append((tensor_ref.name, f"copy of the tied {kept}"))
                    if role == "param" or full:
                        tied_copies.append((entries[kept], tensor_ref))
                else:
                    raise CoverageError(
                        f"{tensor_ref.name} has no place in the target",
                        where=self.where,
                        hint=_UNWANTED,
                    )
        return tuple(tied_copies)


def _plan_chunk(
    chunk: ChunkMap, found: RankInput, source: _Source, topology: Topology, table: NameTable, *, full: bool
) -> ChunkPlan:
    slots = topology.real_slots(found.pp, chunk.vpp)
    homes = {placement.name: placement for placement in chunk.buffer.placements} if chunk.buffer else {}
    weights: list[Weight] = []
    for name in chunk.names:
        spellings = table.to_mindspore(name, slots.__getitem__)
        tensor_ref = source.take("param", spellings, name)
        moments = (
            (source.take("exp_avg", spellings, name), source.take("exp_avg_sq", spellings, name)) if full else None
        )
        local, home = names.local_layer(name), homes.get(name)
        weight = Weight(
            name=name,
            layer=None if local is None else slots[local],
            shape=home.shape if home else tensor_ref.shape,
            dtype=chunk.buffer.dtype if chunk.buffer else found.params_dtype,
            source=tensor_ref,
            moments=moments,
            placement=home if full else None,
        )
        _check_weight(weight, found, topology.tensor)
        weights.append(weight)
    return ChunkPlan(
        vpp=chunk.vpp,
        key=topology.model_key(chunk.vpp),
        weights=tuple(weights),
        buffer=chunk.buffer if full else None,
    )


def _check_weight(weight: Weight, found: RankInput, tensor: int) -> None:
    if weight.dtype not in FLOATS:
        raise FormatError(
            f"parameters of type {weight.dtype}; known are {', '.join(sorted(FLOATS))}",
            where=f"pt_meta, {weight.name}",
            hint=_FLOAT_HINT,
        )
    by_args = stated_shape(weight.name, found.sizes, tensor)
    if by_args is not None and by_args != weight.shape:
        raise TopologyError(
            f"{weight.name} has shape {list(weight.shape)}, the arguments in pt_meta give {list(by_args)}",
            where=found.source,
            hint=_TENSOR_HINT,
        )
    for tensor_ref in (weight.source, *(weight.moments or ())):
        if tensor_ref.shape != weight.shape:
            raise TopologyError(
                f"{tensor_ref.name} has shape {list(tensor_ref.shape)}, the target needs {list(weight.shape)}",
                where=found.source,
                hint=_TENSOR_HINT,
            )
        if tensor_ref.dtype not in FLOATS:
            raise InputError(
                f"{tensor_ref.name} is of type {tensor_ref.dtype}; only {', '.join(sorted(FLOATS))} can be converted without loss",
                where=found.source,
                hint="save the checkpoint with float32 (or bfloat16, float16) parameters and moments",
            )


def spans(numbers: set[int]) -> str:
    """``{0, 1, 2, 5}`` -> ``0-2,5``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"
