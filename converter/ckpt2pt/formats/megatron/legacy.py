"""The files of a rank of Megatron-LM 0.6, as slots of tensors: everything that its metadata names, and nothing is left over.

tensors of the rank  +  ChunkMap (names in registration order, buckets)  --plan_rank-->  LegacyRank
LegacyRank, template, time                                               --lay_out---->  model_optim_rng.pt, distrib_optim.pt

Megatron-LM cac60ce4: megatron/checkpointing.py (``save_checkpoint``) and megatron/core/optimizer/distrib_optimizer.py
(``save_parameter_state``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, cast

from ckpt2pt.core import names
from ckpt2pt.core.buckets import Buffer, ChunkMap, Placement, stated_shape
from ckpt2pt.core.extents import DTYPE_BYTES, FLOATS, TensorRef
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE, OPTIM_KINDS
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.params import EMBEDDING, HEAD, canonical_name, legacy_name
from ckpt2pt.core.reshard import Part, RankTensors
from ckpt2pt.core.slots import FileSlots, Slot
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.tensor import ROLES, Key, Role, Tensor
from ckpt2pt.core.topology import Topology
from ckpt2pt.core.training_step import TrainingStep
from ckpt2pt.errors import CoverageError, FormatError, InputError, TopologyError, aside, ref, refs
from ckpt2pt.formats.megatron.payload import FilePayload, Template, check_storages, nested, renumbered
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Value, is_namespace, namespace_attrs, tensor, with_attrs
from ckpt2pt.io.text import spans

_RULES = aside("model.rules")
_TENSOR_HINT = f"check {ref('parallelism.tensor')}, and that pt_meta belongs to this model"
_TIED = {HEAD: EMBEDDING, EMBEDDING: HEAD}


class Parameter(NamedTuple):
    """A parameter of a chunk: Megatron's name, the tensor and the part of it that its weight is, and its place in the buffer."""

    name: str
    tensor: Tensor
    part: Part
    placement: Placement | None

    @property
    def numel(self) -> int:
        """Number of elements of the part."""
        return math.prod(self.part.shape)


class Chunk(NamedTuple):
    """One model chunk: ``key`` in the model file, the type of its weights, parameters in registration order."""

    vpp: int
    key: str
    dtype: str = ""
    parameters: tuple[Parameter, ...] = ()
    buffer: Buffer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyRank:
    """Everything that goes into one ``mp_rank_*`` folder.

    ``ignored`` pairs each entry of the source that is not carried with the reason; ``copies`` are pairs of source tensors that
    must hold the same bytes because only the first is carried; ``unused_rules`` are rules of the rule file that match no name
    of this rank.
    """

    held: RankTensors
    chunks: tuple[Chunk, ...]
    full: bool
    ignored: tuple[tuple[str, str], ...]
    copies: tuple[tuple[TensorRef, TensorRef], ...]
    unused_rules: frozenset[str]

    @property
    def parameters(self) -> Iterator[Parameter]:
        """Every parameter of every chunk."""
        return (one for chunk in self.chunks for one in chunk.parameters)

    def lay_out(
        self, template: Template, training_step: TrainingStep, stated: Statement, *, reference_samples: bool = False
    ) -> tuple[tuple[FilePayload, FileSlots], ...]:
        """The files, and what fills them: the model's, and the optimizer's in a full conversion.

        ``reference_samples`` zeroes ``consumed_train_samples`` as the reference converter does.
        """
        time = _Time(training_step, stated, reference_samples)
        model = _model_file(self.chunks, template, time)
        return (model, _optimizer_file(self.chunks, template)) if self.full else (model,)


def plan_rank(
    held: RankTensors,
    meta: RankMeta,
    pp: int,
    topology: Topology,
    table: NameTable,
    *,
    full: bool,
    where: str,
    stated: Collection[str] = (),
) -> LegacyRank:
    """Find the source of every parameter that the metadata of a rank of stage ``pp`` names, or raise naming what does not match.

    ``where`` is what the tensors were read from; ``stated`` are entries that are carried, though they are no tensors.
    """
    matching = _Matching(held, table, where, {})
    chunks = {chunk.vpp: _chunk(chunk, meta, matching, topology, pp, full=full) for chunk in meta.chunks}
    if full and not all(chunk.buffer for chunk in chunks.values() if chunk.parameters):
        raise FormatError(
            "the metadata has no param map, which the optimizer's buckets need",
            where=where,
            hint=f"point {ref('metadata.path')} at a pt_meta with param_map_buffer0_*.json, "
            f"or convert weights alone{aside('mode')}",
        )
    ignored, copies = matching.leftovers(full=full, tied=meta.tied, stated=stated)
    copies += [pair for pair in held.copies if full or table.classify(pair[0].name).role == "param"]
    return LegacyRank(
        held=held,
        # A chunk of no-op layers alone has no parameters and no buffer, but its key in the model file.
        chunks=tuple(chunks.get(v) or Chunk(v, topology.model_key(v)) for v in range(topology.virtual)),
        full=full and any(chunk.buffer for chunk in chunks.values()),
        ignored=tuple(ignored),
        copies=tuple(copies),
        unused_rules=table.unused(
            chain(map(held.name, held.index), held.others), [name for chunk in meta.chunks for name in chunk.names]
        ),
    )


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


@dataclass(frozen=True, slots=True)
class _Matching:
    """The tensors of the source; remembers what was taken."""

    held: RankTensors
    table: NameTable
    where: str
    taken: dict[Key, None]

    def take(self, role: Role, canonical: Sequence[str], name: str, layers: range) -> Tensor:
        """The tensor of a parameter that Megatron calls ``name``, by the first of its canonical names that is there."""
        for one in canonical:
            key = Key(role, one)
            found = self.held.index.get(key)
            if found and key not in self.taken:
                self.taken[key] = None
                return found
        raise self._missing(role, name, layers)

    def _missing(self, role: Role, name: str, layers: range) -> CoverageError:
        spelled = self.table.to_mindspore(name, layers.__getitem__)[0]
        left = [self.held.name(key) for key in self.held.index if key.role == role and key not in self.taken]
        known, _ = self.table.classify_all(left, where=self.where)
        near = names.nearest(spelled, [names.without_pipeline_suffix(what.name) for what in known.values()])
        prefix = "" if role == "param" else f"{role}."
        return CoverageError(
            f"{prefix}{spelled} is missing, which Megatron's {name} is made from"
            + (f" (nearest is {prefix}{near})" if near else ""),
            where=self.where,
            hint=f"check {refs('parallelism', 'model.noopLayers')}, or add the name to a rule file{_RULES}"
            + ("" if role == "param" else f", or convert weights alone{aside('mode')}"),
        )

    def leftovers(
        self, *, full: bool, tied: bool, stated: Collection[str]
    ) -> tuple[list[tuple[str, str]], list[tuple[TensorRef, TensorRef]]]:
        """List or refuse what no parameter took; copies of tied embeddings become pairs to be compared."""
        ignored = [(entry, self.table.classify(entry).name) for entry in self.held.others if entry not in stated]
        copies: list[tuple[TensorRef, TensorRef]] = []
        for key in sorted(
            (key for key in self.held.index if key not in self.taken), key=lambda key: ROLES.index(key.role)
        ):
            entry, kept = self.held.name(key), key._replace(name=_TIED.get(key.name, ""))
            if key.role != "param" and not full:
                ignored.append((entry, "params only"))
            elif tied and kept in self.taken:
                ignored.append((entry, f"copy of the tied {legacy_name(kept.name)}"))
                copies.append((self.held.ref(kept), self.held.ref(key)))
            else:
                raise CoverageError(
                    f"{entry} has no place in the target",
                    where=self.where,
                    hint=f"check {refs('parallelism', 'model.numLayers')}, or list it under ignore in a rule file{_RULES} "
                    "if it is not wanted",
                )
        return ignored, copies

    def check(self, found: Tensor, part: Part, shape: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape than the target has, or of a type that is no floating point."""
        if part.shape != shape:
            raise TopologyError(
                f"{self.held.name(found.key)} has shape {list(part.shape)}, the target needs {list(shape)}",
                where=self.where,
                hint=_TENSOR_HINT,
            )
        if found.dtype not in FLOATS:
            raise InputError(
                f"{self.held.name(found.key)} is of type {found.dtype}; only {', '.join(sorted(FLOATS))} can be converted "
                "without loss",
                where=self.where,
                hint="save the checkpoint with float32 (or bfloat16, float16) parameters and moments",
            )


def _chunk(chunk: ChunkMap, meta: RankMeta, matching: _Matching, topology: Topology, pp: int, *, full: bool) -> Chunk:
    layers, sizes = topology.slots(pp, chunk.vpp), meta.sizes
    dtype = chunk.buffer.dtype if chunk.buffer else meta.params_dtype
    homes = {placement.name: placement for placement in chunk.buffer.placements} if chunk.buffer else {}
    parameters: list[Parameter] = []
    for name in chunk.names:
        # A last stage's copy of tied embeddings may be there by the name of an output layer.
        canonical = (HEAD, EMBEDDING) if names.is_tied_head(name) else (canonical_name(name, layers),)
        found, home = matching.take("param", canonical, name, layers), homes.get(name)
        part = matching.held.part(found)
        shape = home.shape if home else part.shape
        moments = [matching.take(role, canonical, name, layers) for role in ("exp_avg", "exp_avg_sq") if full]
        if dtype not in FLOATS:
            raise FormatError(
                f"parameters of type {dtype}; known are {', '.join(sorted(FLOATS))}",
                where=f"pt_meta, {name}",
                hint=f"point {ref('metadata.path')} at the metadata of a bf16, fp16 or fp32 run",
            )
        stated = stated_shape(name, sizes, topology.tensor)
        if stated is not None and stated != shape:
            raise TopologyError(
                f"{name} has shape {list(shape)}, the arguments in pt_meta give {list(stated)}",
                where=matching.where,
                hint=_TENSOR_HINT,
            )
        matching.check(found, part, shape)
        for moment in moments:
            same = moment.shape == found.shape  # as it is but for damaged files
            matching.check(moment, part if same else matching.held.part(moment), shape)
        parameters.append(Parameter(name, found, part, home if full else None))
    return Chunk(chunk.vpp, topology.model_key(chunk.vpp), dtype, tuple(parameters), chunk.buffer if full else None)


# ------------------------------------------------------------------------------------------------------------- the files


class _Time(NamedTuple):
    """What of the model file is not of the template."""

    training_step: TrainingStep
    stated: Statement
    reference_samples: bool


def _model_file(chunks: Sequence[Chunk], template: Template, time: _Time) -> tuple[FilePayload, FileSlots]:
    """``model_optim_rng.pt``: the template with the weights and the true time put in."""
    slots: list[Slot] = []
    model: dict[Value, Value] = {chunk.key: _weights(chunk, slots) for chunk in chunks}
    copied: list[str] = []
    rest = cast("dict[str, Value]", renumbered(cast("Value", template.tree), copied, len(slots)))
    tree: dict[Value, Value] = {}
    for key, value in rest.items():
        if key != "param_name_list" and key not in model:
            tree[key] = value
        if key == "iteration":
            tree.update(model)
    if "iteration" not in tree:
        tree["iteration"] = time.training_step.iteration
        tree.update(model)
    _set_time(tree, time)
    _set_optimizer(tree, time, template)
    check_storages(copied, template.storages, template.where)
    extents = tuple(template.storages[key] for key in copied)
    sizes = tuple(slot.numel * DTYPE_BYTES[slot.dtype] for slot in slots)
    payload = FilePayload(
        name=MODEL_FILE,
        pickle=write_pickle(tree, check=False),
        storages=(*sizes, *(extent.nbytes for extent in extents)),
        copied=extents,
    )
    return payload, FileSlots(name=MODEL_FILE, slots=tuple(slots), storages=sizes)


def _weights(chunk: Chunk, slots: list[Slot]) -> Value:
    """The weights of a chunk, whose slots join those of the file; a module's ``_extra_state`` follows its last parameter."""
    entries: list[tuple[tuple[str, ...], Value]] = []
    modules = [one.name.rpartition(".")[0] for one in chunk.parameters]
    for (name, found, part, _), module, after in zip(chunk.parameters, modules, [*modules[1:], ""], strict=False):
        path, number = names.state_dict_path(name), len(slots)
        slots.append(Slot(found.key, chunk.dtype, number, 0, part.box))
        entries.append((path, tensor(chunk.dtype, str(number), math.prod(part.shape), 0, part.shape)))
        if after != module and module.rpartition(".")[2] in names.HAS_EXTRA_STATE:
            leaf = f"{path[-1].rpartition('.')[0]}._extra_state".removeprefix(".")
            entries.append(((*path[:-1], leaf), None))
    return nested(entries)


def _optimizer_file(chunks: Sequence[Chunk], template: Template) -> tuple[FilePayload, FileSlots]:
    """``distrib_optim.pt`` as Megatron 0.6 keeps it: padded buckets with their true and padded sizes.

    A buffer's key are the types of its parameters and of their gradients.
    """
    slots: list[Slot] = []
    sizes: list[int] = []
    padded: list[Value] = []
    unpadded: list[Value] = []
    buffers: list[Value] = []
    for chunk in chunks:
        if chunk.buffer is None:
            continue
        dtype, buckets = chunk.dtype, chunk.buffer.buckets
        types = (Global("torch", dtype), Global("torch", dtype if template.gradients_as_parameters else "float32"))
        held = {one.name: one for one in chunk.parameters}
        kinds: dict[Value, Value] = {}
        for kind in OPTIM_KINDS:
            tensors: list[Value] = []
            for bucket in buckets:
                storage = len(sizes)
                sizes.append(bucket.numel * DTYPE_BYTES["float32"])
                tensors.append(tensor("float32", str(storage), bucket.numel, 0, (bucket.numel,)))
                for placed in bucket.placements:
                    _, found, part, _ = held[placed.name]
                    key = Key(cast("Role", kind), found.key.name)
                    slots.append(Slot(key, "float32", storage, placed.start - bucket.start, part.box))
            kinds[kind] = tensors
        padded.append({types: [bucket.numel for bucket in buckets]})
        unpadded.append({types: [bucket.numel_unpadded for bucket in buckets]})
        buffers.append({types: kinds})
    tree: dict[Value, Value] = {"per_bucket_numel": padded, "per_bucket_numel_unpadded": unpadded}
    tree.update(enumerate(buffers))
    payload = FilePayload(name=OPTIM_FILE, pickle=write_pickle(tree, check=False), storages=tuple(sizes), copied=())
    gaps = frozenset(range(len(sizes)))
    return payload, FileSlots(name=OPTIM_FILE, slots=tuple(slots), storages=tuple(sizes), padded=gaps)


def _set_time(tree: dict[Value, Value], time: _Time) -> None:
    """Put the source's iteration and sample count where Megatron looks for them."""
    training_step = time.training_step
    tree["iteration"] = training_step.iteration
    if training_step.as_saved and not time.reference_samples:
        return
    args = tree.get("args")
    if isinstance(args, Call) and is_namespace(args):
        known = namespace_attrs(args)
        changes: dict[str, Value] = {"iteration": training_step.iteration} if "iteration" in known else {}
        if time.reference_samples:
            changes["consumed_train_samples"] = 0
        elif training_step.samples is not None:
            changes["consumed_train_samples"] = training_step.samples
        tree["args"] = with_attrs(args, changes)


def _set_optimizer(tree: dict[Value, Value], time: _Time, template: Template) -> None:
    """Put what the source states into scheduler and groups, and the true time."""
    carried, training_step = template.carried(time.stated), time.training_step
    if training_step.as_saved:
        return
    scheduler = tree.get("opt_param_scheduler")
    if isinstance(scheduler, dict):
        steps: dict[Value, Value] = {}
        if "num_steps" in scheduler and training_step.samples is not None:
            steps = {"num_steps": training_step.samples}
        tree["opt_param_scheduler"] = scheduler | dict(carried.scheduler.items()) | steps
    outer = tree.get("optimizer")
    if template.groups and isinstance(outer, dict):
        inner = cast("dict[Value, Value]", outer["optimizer"])
        groups = cast("list[dict[Value, Value]]", inner["param_groups"])
        changed: list[Value] = [
            group | dict(more.items()) | {"step": training_step.iteration}
            for group, more in zip(groups, carried.groups, strict=True)
        ]
        tree["optimizer"] = {**outer, "optimizer": {**inner, "param_groups": changed}}
