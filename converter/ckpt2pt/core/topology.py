"""Parallel degrees -> ranks, directories and global layers.  Pure: no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ckpt2pt.core.foldernames import model_rank_name
from ckpt2pt.errors import UsageError, ref

Rank = tuple[int, int]
"""(tp, pp): one file of MindSpore, or one group of shards, and one folder of Megatron."""

MAX_DEGREE = 65536
MAX_RANKS = 1 << 20
"""More layers, or ranks in one direction and in all, than any training has; guards against absurd numbers."""
_SPLIT = ref("model.layersPerStage")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """How the model is cut; the constructor proves that the cut is possible.

    ``num_layers`` counts layer slots, no-op layers included.  ``layers_per_stage`` holds one count per pipeline
    stage, or with virtual pipeline parallelism one per chunk, chunk-major (all stages of chunk 0 first).
    """

    num_layers: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    data: int = 1
    context: int = 1
    noop: frozenset[int] = frozenset()
    layers_per_stage: tuple[int, ...] | None = None
    ignored_noop: frozenset[int] = field(default=frozenset(), init=False, compare=False)
    """No-op layers that were given and do not exist, as the reference's own example gives 62 and 63 of 8."""

    def __post_init__(self) -> None:
        degrees = {
            "model.numLayers": self.num_layers,
            "parallelism.tensor": self.tensor,
            "parallelism.pipeline": self.pipeline,
            "parallelism.virtualPipeline": self.virtual,
            "parallelism.data": self.data,
            "parallelism.context": self.context,
        }
        for path, value in degrees.items():
            name = ref(path)
            if value < 1:
                raise _refused(f"{name} is {value}, and must be at least 1", f"set {name} to 1 or more", path)
            if value > MAX_DEGREE:
                raise _refused(
                    f"{name} is {value}, more than {MAX_DEGREE}", f"set {name} to that of the training", path
                )
        ranks = self.tensor * self.pipeline * self.data * self.context
        if ranks > MAX_RANKS:
            raise _refused(
                f"the degrees multiply to {ranks} ranks, more than {MAX_RANKS}",
                f"set {ref('parallelism')} to those of the training",
            )
        negative = sorted(layer for layer in self.noop if layer < 0)
        if negative:
            raise _refused(
                f"no-op layers {negative} are below 0",
                f"give {ref('model.noopLayers')} numbers from 0 to {self.num_layers - 1}",
                "model.noopLayers",
            )
        # The metadata proves which layers there are, so a number beyond them changes nothing.
        beyond = frozenset(layer for layer in self.noop if layer >= self.num_layers)
        object.__setattr__(self, "noop", self.noop - beyond)
        object.__setattr__(self, "ignored_noop", beyond)
        if len(self.noop) == self.num_layers:
            hint = f"list fewer layers in {ref('model.noopLayers')}"
            raise _refused("every layer is a no-op layer", hint, "model.noopLayers")
        self._check_split()

    def _check_split(self) -> None:
        chunks = self.pipeline * self.virtual
        if self.layers_per_stage is None:
            if self.num_layers % chunks:
                raise _refused(
                    f"{self.num_layers} layers do not divide into {self.pipeline} stages"
                    f"{f' of {self.virtual} chunks' if self.virtual > 1 else ''}",
                    f"set {ref('model.numLayers')} to the count with no-op layers included, "
                    f"or give the split in {ref('model.layersPerStage')}",
                )
            return
        counts = self.layers_per_stage
        if len(counts) != chunks:
            raise _refused(
                f"{_SPLIT} has {len(counts)} counts, {self.pipeline} stages of {self.virtual} chunks need {chunks}",
                f"give {_SPLIT} one count per stage, "
                "with virtual pipeline parallelism one per chunk, all stages of the first chunk first",
                "model.layersPerStage",
            )
        if min(counts) < 0:
            raise _refused(
                f"{_SPLIT} {list(counts)} holds a count below 0",
                f"give {_SPLIT} counts of 0 or more",
                "model.layersPerStage",
            )
        if sum(counts) != self.num_layers:
            raise _refused(
                f"{_SPLIT} {list(counts)} adds up to {sum(counts)} layers, not {self.num_layers}",
                f"make {_SPLIT} add up to {ref('model.numLayers')}",
                "model.layersPerStage",
            )

    @property
    def remark(self) -> str:
        """A warning about no-op layers that do not exist; empty when all do."""
        names = ", ".join(map(str, sorted(self.ignored_noop)))
        return names and f"no-op layers {names} are ignored: there are only layers 0 to {self.num_layers - 1}"

    def slots(self, pp: int, vpp: int) -> range:
        """Global layer slots of one chunk; local slot 0 is the first of them.

        Interleaved stages take turns chunk by chunk (Megatron-LM cac60ce4, megatron/model/transformer.py, ``offset``).
        """
        turn = vpp * self.pipeline + pp
        if self.layers_per_stage is None:
            each = self.num_layers // (self.pipeline * self.virtual)
            return range(turn * each, (turn + 1) * each)
        start = sum(self.layers_per_stage[:turn])
        return range(start, start + self.layers_per_stage[turn])

    def real_slots(self, pp: int, vpp: int) -> dict[int, int]:
        """Local slot -> global layer for the layers of a chunk that carry parameters.

        A no-op layer keeps its slot as a module without parameters, so local numbers may have gaps.
        """
        return {local: layer for local, layer in enumerate(self.slots(pp, vpp)) if layer not in self.noop}

    def holds_embedding(self, pp: int, vpp: int) -> bool:
        """True for the chunk that begins the model."""
        return pp == 0 and vpp == 0

    def holds_head(self, pp: int, vpp: int) -> bool:
        """True for the chunk that ends the model."""
        return pp == self.pipeline - 1 and vpp == self.virtual - 1

    def filled_chunks(self, pp: int) -> tuple[int, ...]:
        """Chunks of a stage that have parameters: only these have a buffer and a param map."""
        return tuple(
            vpp
            for vpp in range(self.virtual)
            if self.real_slots(pp, vpp) or self.holds_embedding(pp, vpp) or self.holds_head(pp, vpp)
        )

    def source_rank(self, tp: int, pp: int) -> int:
        """The first global rank that holds (tp, pp): order tp-cp-dp-pp, tensor parallel fastest.

        MindSpeed-Core-MS feature-0.1, mindspeed_ms/core/parallel_state.py, order "tp-cp-ep-dp-pp".
        """
        return pp * self.data * self.context * self.tensor + tp

    def group(self, tp: int, pp: int) -> tuple[int, ...]:
        """The global ranks that share (tp, pp): data x context parallel, ascending, :meth:`source_rank` first."""
        first = self.source_rank(tp, pp)
        return tuple(first + number * self.tensor for number in range(self.data * self.context))

    def ranks(self) -> Iterator[Rank]:
        """Every (tp, pp)."""
        return ((tp, pp) for pp in range(self.pipeline) for tp in range(self.tensor))

    def directory(self, tp: int, pp: int) -> str:
        """``mp_rank_01`` or ``mp_rank_01_003``: the loader looks for the suffix only when there is more than one stage.

        Megatron-LM cac60ce4, megatron/checkpointing.py, ``get_checkpoint_name``.
        """
        return model_rank_name(tp, None if self.pipeline == 1 else pp)

    def model_key(self, vpp: int) -> str:
        """``model``, or ``model0`` and on when a stage has several chunks."""
        return "model" if self.virtual == 1 else f"model{vpp}"


def _refused(what: str, hint: str, path: str | None = None) -> UsageError:
    return UsageError(what, where=ref("spec"), hint=hint, field=path)
