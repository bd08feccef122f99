"""The files of each rank of Megatron-LM 0.7 to 0.19, as slots of global tensors.

index, state, layout --order--> parameters of each chunk --planning.layout--> places in the optimizer's buffer
                                                         --tree-------------> model_optim_rng.pt, distrib_optim.pt

Megatron-LM, megatron/core/optimizer/distrib_optimizer.py (``save_parameter_state``): a buffer is one tensor for each of
param, exp_avg and exp_avg_sq, without the padding behind its buckets, with the gaps inside them.  With expert parallelism
experts have an optimizer and buffers of their own (core/optimizer/__init__.py, ``get_megatron_optimizer``): the file is a list
of two states, of which ranks of other experts than the first leave out the dense one (optimizer.py, ``ChainedOptimizer``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.extents import DTYPE_BYTES, Box, Shape, Stored, TensorRef, intersection
from ckpt2pt.core.fill import box_ref, replicas_of
from ckpt2pt.core.foldernames import model_rank_name
from ckpt2pt.core.index import Index
from ckpt2pt.core.layout import (
    BUCKET_NUMEL,
    BUCKET_NUMEL_A_RANK,
    COALESCED,
    Parameter,
    Policy,
    bucket_numel,
    coalesce,
    lay_out,
    weight_decay_groups,
)
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE
from ckpt2pt.core.names import state_dict_path
from ckpt2pt.core.params import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    check_expert_parallel,
    expert_count,
    expert_of,
    in_legacy_models,
    is_buffer,
    without_expert,
)
from ckpt2pt.core.reshard import Part, Wanted, check_target, padding_remarks, part_of
from ckpt2pt.core.slots import FileSlots, Slot, check_used, source_of
from ckpt2pt.core.state import State
from ckpt2pt.core.tensor import ROLES, Key, Role, Tensor, box_of
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.errors import UsageError, ref
from ckpt2pt.formats.megatron.order import Registered, Style, chunk_parameters
from ckpt2pt.formats.megatron.payload import FilePayload, nested, tree_payload
from ckpt2pt.formats.megatron.tree import Group, model_tree
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Global, Value, ordered_dict, tensor

_KINDS: Mapping[str, Role] = {"param": "main_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_ALIGNED_GROUPS = (0, 13)
"""The release from which on all ranks have the same parameter groups, empty ones too, and with them the same optimizers."""
_WHOLE_DOWN = (0, 15)
"""The release from which on Transformer Engine's layer spec has whole down projections on every rank (gpt_layer_specs.py)."""
_FIRST_OF = {(0, 13): COALESCED[0], (0, 9): COALESCED[1], (0, 8): COALESCED[2], (0, 7): COALESCED[3]}


def policy_of(release: tuple[int, int]) -> Policy:
    """How a release fills its buffers."""
    return next(policy for first, policy in _FIRST_OF.items() if release >= first)


class Held(NamedTuple):
    """A parameter of a chunk, and the part of the tensor that a rank holds."""

    registered: Registered
    part: Part

    @property
    def numel(self) -> int:
        """Number of elements of the part."""
        return math.prod(self.part.shape)


class Place(NamedTuple):
    """Where a rank stands in each direction."""

    tp: int
    pp: int
    ep: int


class Optimizer(NamedTuple):
    """What one optimizer of a rank holds of each chunk; ``divisor`` ranks share its buffers."""

    chunks: Sequence[Sequence[Held]]
    divisor: int
    experts: bool


@dataclass(frozen=True)
class McoreLayout:
    """A result: where each part of each tensor goes.

    ``dtype`` is that of the weights, ``gradients`` that of the gradients, which keys the optimizer's buffers; ``rows`` are
    those of the vocabulary in the result; ``data`` is the data x context parallel size of the run to come, which matters
    where parameters have sizes that are no multiples of 64.  ``expert`` is the expert parallel size: a rank is (number, pp),
    where numbers count the tensor parallel ranks of the first experts, then those of the next.
    """

    index: Index
    state: State
    topology: Topology
    source_tensor: int
    style: Style
    dtype: str
    gradients: str
    rows: int
    tied: bool
    full: bool
    data: int
    expert: int
    where: str

    @property
    def members(self) -> int:
        """Ranks of each stage."""
        return self.topology.tensor * self.expert

    def ranks(self) -> Iterator[Rank]:
        """Every rank."""
        return ((number, pp) for pp in range(self.topology.pipeline) for number in range(self.members))

    def place(self, rank: Rank) -> Place:
        """Where a rank stands."""
        ep, tp = divmod(rank[0], self.topology.tensor)
        return Place(tp, rank[1], ep)

    @cached_property
    def experts(self) -> int:
        """Experts of a layer."""
        return expert_count(self.names)

    @cached_property
    def names(self) -> frozenset[str]:
        """Canonical names of all parameters."""
        return frozenset(key.name for key in self.index)

    @cached_property
    def wanted(self) -> Wanted:
        """What decides the parts of each rank."""
        sizes = {**self.state.sizes, "padded_vocab_size": self.rows}
        return Wanted(
            topology=self.topology, source_tensor=self.source_tensor, sizes=sizes, tied=self.tied, where=self.where
        )

    def check(self) -> None:
        """Prove that every tensor of the source goes somewhere, once, and that the ranks can have their parts.

        Raises :class:`CoverageError`, :class:`TopologyError` or :class:`MissingInputError` for what does not fit.
        """
        check_target(self.index, self.wanted)
        self._check_experts()
        self._check_latent()
        others = [name for name in sorted(self.names) if not in_legacy_models(name)]
        if self.style.names == "legacy" and others:
            raise UsageError(
                f"legacy models of Megatron-LM have no {others[0]}",
                where=self.where,
                hint=f"leave {ref('target.names')} out",
                field="target.names",
            )
        tied = (key for key in self.index if self.tied and key.name == HEAD)
        ignored = dict.fromkeys(tied, "compared with the embedding it is tied to")
        check_used(self.index, self._boxes(), ROLES if self.full else ROLES[:1], ignored, self.where)

    def _boxes(self) -> dict[str, dict[Box, None]]:
        """What the ranks hold of each parameter; of dense ones those of the first experts, as all the others hold the same."""
        found: dict[str, dict[Box, None]] = {}
        for rank in self.ranks():
            first = not self.place(rank).ep
            for held in chain.from_iterable(self.chunks(rank)):
                if first or expert_of(held.registered.name) is not None:
                    found.setdefault(held.registered.name, {})[held.part.box] = None
        return found

    def _check_latent(self) -> None:
        """Refuse latent attention whose down projections a run would cut, and prediction on several stages, which share its embedding."""
        name = next((name for name in self.names if name.endswith(".linear_kv_down_proj.weight")), None)
        whole = self.style.transformer_engine and self.style.release >= _WHOLE_DOWN
        if name and self.topology.tensor > 1 and not whole:
            raise UsageError(
                f"a run with {self.style.needs} of this release cuts {name} over its tensor-parallel ranks, which is not written",
                where=self.where,
                hint=f"choose TorchDist in {ref('target.format')}, or give {ref('target.transformerImpl')} for a run of 0.15 or newer "
                "with Transformer Engine",
                field="target.format",
            )
        if self.topology.pipeline > 1 and any(name.startswith("mtp.") for name in self.names):
            raise UsageError(
                "layers that predict further tokens (mtp) share their stage with a second embedding, which is not written",
                where=self.where,
                hint=f"choose TorchDist in {ref('target.format')}, which loads at any sizes, or one pipeline stage",
                field="target.format",
            )

    def _check_experts(self) -> None:
        check_expert_parallel(self.experts, self.expert, self.where)
        if self.expert > 1 and self.data > 1 and self.data % self.expert:
            raise UsageError(
                f"{ref('target.dataParallel')} is {self.data}, which an expert parallel size of {self.expert} does not divide",
                where=self.where,
                hint=f"give a multiple of {self.expert}, or leave it out",
                field="target.dataParallel",
            )

    def remarks(self, rank: Rank) -> tuple[str, ...]:
        """What a user should know of a rank."""
        place = self.place(rank)
        return padding_remarks(self.index, (place.tp, place.pp), self.wanted)

    def directory(self, rank: Rank) -> str:
        """The folder of a rank."""
        tp, pp, ep = self.place(rank)
        return model_rank_name(tp, pp if self.topology.pipeline > 1 else None, ep if self.expert > 1 else None)

    def chunks(self, rank: Rank) -> list[list[Held]]:
        """The parameters of each chunk of a rank, in order of registration."""
        tp, pp, ep = self.place(rank)
        each = self.experts // self.expert
        own = range(ep * each, (ep + 1) * each)
        return [
            [
                Held(one, self._part(one.name, tp))
                for one in chunk_parameters(
                    self.names, self.topology, pp=pp, vpp=vpp, tied=self.tied, style=self.style, experts=own
                )
            ]
            for vpp in range(self.topology.virtual)
        ]

    def _part(self, name: str, tp: int) -> Part:
        """A rank's part of a parameter: that of all ranks of experts, and one part for all experts of a layer that are alike."""
        source = source_of(self.index, Key("param", name), self.where)
        key = without_expert(name), source.shape, tp
        if key not in self._parts:
            self._parts[key] = part_of(source, tp, self.wanted)
        return self._parts[key]

    @cached_property
    def _parts(self) -> dict[tuple[str, Shape, int], Part]:
        return {}

    def optimizers(self, chunks: Sequence[Sequence[Held]]) -> list[Optimizer]:
        """The optimizers of a rank: one, or one of dense parameters and one of experts.

        Up to 0.12 a stage without experts has the first alone, since 0.13 the second one is empty there.
        """
        trained = [[held for held in chunk if not is_buffer(held.registered.name)] for chunk in chunks]
        if self.expert == 1:
            return [Optimizer(trained, self.data, experts=False)]
        dense, own = (
            [[held for held in chunk if (expert_of(held.registered.name) is not None) == kind] for chunk in trained]
            for kind in (False, True)
        )
        data = max(self.data, self.expert)
        found = [Optimizer(dense, data, experts=False), Optimizer(own, data // self.expert, experts=True)]
        return found if any(own) or self.style.release >= _ALIGNED_GROUPS else found[:1]

    def _groups(self, optimizer: Optimizer) -> list[Group]:
        """Parameter groups in Megatron's order; those of an empty optimizer are those of other stages."""
        parameters: Iterable[Parameter] = self._parameters(held for chunk in optimizer.chunks for held in chunk)
        if optimizer.experts and not any(optimizer.chunks):
            names = [name for name in sorted(self.names) if expert_of(name) is not None]
            parameters = [Parameter(name=name, shape=self.index[Key("param", name)].fused, dtype="") for name in names]
        return [Group(decays, optimizer.experts) for decays in weight_decay_groups(parameters)]

    def _parameters(self, held: Iterable[Held]) -> list[Parameter]:
        return [
            Parameter(name=one.spelled, shape=part.shape, dtype=self.dtype, shared=one.shared) for one, part in held
        ]

    def buffers(self, rank: Rank, optimizer: Optimizer) -> list[Buffer]:
        """The optimizer's buffer of each chunk that has parameters, as its file holds it."""
        policy, found = policy_of(self.style.release), list[Buffer]()
        stated = self.state.args.get("ddp_bucket_size")
        size = stated if type(stated) is int and stated > 0 else max(BUCKET_NUMEL, BUCKET_NUMEL_A_RANK * self.data)
        overlap = self.state.args.get("overlap_grad_reduce") is True
        for vpp, held in enumerate(optimizer.chunks):
            limit = bucket_numel(overlap=overlap, pp=rank[1], chunk=vpp, size=size)
            parameters = self._parameters(held)
            for buffer in lay_out(parameters, divisor=optimizer.divisor, bucket_numel=limit, policy=policy):
                found.append(coalesce(buffer))
        return found

    def files(self, rank: Rank) -> tuple[tuple[FilePayload, ...], tuple[FileSlots, ...]]:
        """The files of a rank, and what fills them."""
        chunks = self.chunks(rank)
        optimizers = self.optimizers(chunks) if self.full else []
        found = [self._model(rank, chunks, optimizers)]
        if self.saves_optimizer(rank, optimizers):
            found.append(self._optimizer(rank, optimizers))
        return tuple(payload for payload, _ in found), tuple(slots for _, slots in found)

    def saves_optimizer(self, rank: Rank, optimizers: Sequence[Optimizer]) -> bool:
        """Whether a rank has a file of the optimizer: of dense parameters alone the first experts' ranks save it."""
        return bool(optimizers) and (not self.place(rank).ep or len(optimizers) > 1)

    def copies(self, rank: Rank) -> Iterator[tuple[TensorRef, TensorRef]]:
        """Pairs of the source that must hold the same bytes, as only the first of each is converted."""
        for found in (one for one in self.tensors(rank) if self._compares(rank, one.key.name)):
            yield from replicas_of(found)
            if self.tied and found.key.name == HEAD:
                own = source_of(self.index, Key(found.key.role, EMBEDDING), self.where)
                box = (0,) * len(own.shape), own.shape
                yield box_ref(own, box), box_ref(found, box)

    def tensors(self, rank: Rank) -> Iterator[Tensor]:
        """Those of the source that a rank is made from or compared with, in its order."""
        held = {one.name for chunk in self.chunks(rank) for one, _ in chunk}
        if self.tied and rank[1] == self.topology.pipeline - 1:
            held.add(HEAD)
        keys = (key for role in ROLES for name in held if (key := Key(role, name)) in self.index)
        return (self.index[key] for key in sorted(keys, key=self._order.__getitem__))

    def _compares(self, rank: Rank, name: str) -> bool:
        """Whether it is this rank, of those that hold a parameter, that compares its copies."""
        tp, _, ep = self.place(rank)
        return not tp and (not ep or expert_of(name) is not None)

    def held_by(self, stages: Iterable[int]) -> frozenset[str]:
        """The parameters of these stages, and the head that is compared with the embedding that it is tied to."""
        ranks = ((ep * self.topology.tensor, pp) for pp in stages for ep in range(self.expert))
        held = {one.name for rank in ranks for chunk in self.chunks(rank) for one, _ in chunk}
        return frozenset(held | ({HEAD} if self.tied else set()))

    def views(self, rank: Rank) -> Iterator[Stored]:
        """What a rank reads of the source: of each tensor the parts that it holds, and the copies that it compares."""
        boxes = {one.name: part.box for chunk in self.chunks(rank) for one, part in chunk}
        for found in self.tensors(rank):
            compares, box = self._compares(rank, found.key.name), boxes.get(found.key.name)
            for view in found.views:
                if intersection(box_of(view), box) if box else compares:
                    yield view
            if compares:
                yield from found.replicas

    @cached_property
    def _order(self) -> dict[Key, int]:
        return {key: number for number, key in enumerate(self.index)}

    def _model(
        self, rank: Rank, chunks: Sequence[Sequence[Held]], optimizers: Sequence[Optimizer]
    ) -> tuple[FilePayload, FileSlots]:
        slots: list[Slot] = []
        models: dict[str, Value] = {}
        for vpp, held in enumerate(chunks):
            pairs: list[tuple[str, Value]] = []
            for one, part in held:
                key = Key("param", one.name)
                slot = Slot(key, self.index[key].dtype if is_buffer(one.name) else self.dtype, len(slots), 0, part.box)
                pairs.append((one.spelled, tensor(slot.dtype, str(slot.storage), slot.numel, 0, part.shape)))
                slots.append(slot)
            models[self.topology.model_key(vpp)] = (
                nested((state_dict_path(name), value) for name, value in pairs)
                if self.style.names == "legacy"
                else ordered_dict(pairs)
            )
        tree, literals = model_tree(
            self.state,
            sizes={
                "num_layers": self.topology.num_layers,
                "hidden_size": self.index[self._norm].fused[0],
                "tensor_model_parallel_size": self.topology.tensor,
                "pipeline_model_parallel_size": self.topology.pipeline,
                "untie_embeddings_and_output_weights": not self.tied,
                **self._of_experts,
                **self._bucketing,
                **self._precision,
            },
            chunks=models,
            optimizers=[*map(self._groups, optimizers)] if self.full else None,
            rank=self.place(rank),
        )
        # Storages are numbered as the tree names them: those of the weights first, and by the same numbers again.
        pickle, keys = tree_payload(tree, {*literals, *map(str, range(len(slots)))}, MODEL_FILE)
        copied = tuple(literals[key] for key in keys[len(slots) :])
        sizes = tuple(slot.numel * DTYPE_BYTES[slot.dtype] for slot in slots)
        payload = FilePayload(name=MODEL_FILE, pickle=pickle, storages=(*sizes, *map(len, copied)), copied=copied)
        return payload, FileSlots(name=MODEL_FILE, slots=tuple(slots), storages=sizes)

    @property
    def _of_experts(self) -> dict[str, Value]:
        """What tells a folder of experts from one of a stage, which have the same name, and that one without a file lacks nothing."""
        if not self.experts:
            return {}
        sizes: dict[str, Value] = {"num_experts": self.experts, "expert_model_parallel_size": self.expert}
        return sizes | ({"use_distributed_optimizer": True} if self.full else {})

    @property
    def _bucketing(self) -> dict[str, Value]:
        """Where buckets end, for whoever reads the file: with odd sizes the places of parameters follow from it."""
        stated = self.state.args.get("ddp_bucket_size")
        if self.state.args.get("overlap_grad_reduce") is not True or type(stated) is not int:
            return {}
        return {"overlap_grad_reduce": True, "ddp_bucket_size": stated}

    @property
    def _precision(self) -> dict[str, Value]:
        """Of fp16, whose gradients have a type that nothing else in the model file tells."""
        if self.dtype != "float16":
            return {}
        return {"fp16": True, "accumulate_allreduce_grads_in_fp32": self.gradients == "float32"}

    @cached_property
    def _norm(self) -> Key:
        return source_of(self.index, Key("param", FINAL_NORM), self.where).key

    def _optimizer(self, rank: Rank, optimizers: Sequence[Optimizer]) -> tuple[FilePayload, FileSlots]:
        slots: list[Slot] = []
        sizes: list[int] = []
        states: list[Value] = [
            None if self.place(rank).ep and not one.experts else self._state(rank, one, slots, sizes)
            for one in optimizers
        ]
        pickle = write_pickle(states if len(states) > 1 else states[0])
        payload = FilePayload(name=OPTIM_FILE, pickle=pickle, storages=tuple(sizes), copied=())
        gaps = frozenset(range(len(sizes)))
        return payload, FileSlots(name=OPTIM_FILE, slots=tuple(slots), storages=tuple(sizes), padded=gaps)

    def _state(self, rank: Rank, optimizer: Optimizer, slots: list[Slot], sizes: list[int]) -> Value:
        """The state of one optimizer; its slots, and the sizes of its storages, join those of the file."""
        tree: dict[Value, Value] = {"buckets_coalesced": True}
        filled = [chunk for chunk in optimizer.chunks if chunk]
        for number, (buffer, chunk) in enumerate(zip(self.buffers(rank, optimizer), filled, strict=True)):
            held = {one.spelled: (one.name, part) for one, part in chunk}
            numel = buffer.numel
            kinds: dict[Value, Value] = {}
            for kind, role in _KINDS.items():
                storage = len(sizes)
                kinds[kind] = tensor("float32", str(storage), numel, 0, (numel,))
                sizes.append(numel * DTYPE_BYTES["float32"])
                for placed in buffer.placements:
                    name, part = held[placed.name]
                    slots.append(Slot(Key(role, name), "float32", storage, placed.start, part.box))
            kinds["numel_unpadded"] = numel
            tree[number] = {(Global("torch", self.dtype), Global("torch", self.gradients)): kinds}
        return tree
