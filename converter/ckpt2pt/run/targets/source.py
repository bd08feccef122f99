"""The source of a conversion by global tensors: read as far as its headers, with what it holds that is no tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ckpt2pt.core.extents import Stored
from ckpt2pt.core.index import Index
from ckpt2pt.core.slots import weights_alone
from ckpt2pt.core.state import State
from ckpt2pt.core.tensor import Tensor
from ckpt2pt.discover.checkpoint import only_growing, prove_same, stat_of
from ckpt2pt.discover.request import digest
from ckpt2pt.engine.write import ReadPieces
from ckpt2pt.errors import MissingInputError, aside, ref
from ckpt2pt.formats.checkpoint import Checkpoint, check_layers
from ckpt2pt.formats.described import template_at
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.scaler import scaler_of
from ckpt2pt.formats.mindspore import prove_sources
from ckpt2pt.formats.state import state_of
from ckpt2pt.formats.torch_dist.items import prove_items
from ckpt2pt.formats.torch_dist.read import WHOLE_STATES
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.trees import Global
from ckpt2pt.io.records import Json
from ckpt2pt.run.targets.request import TargetRequest

_HALF = ("bfloat16", "float16")
_OF_MINDSPORE = ("mindspore", "mindformers")
"""Formats whose files are MindSpore's, and may hold float32 weights of any training."""
_SAFETENSORS = (*_OF_MINDSPORE, "huggingface")
"""Formats whose files state one checksum of all that they hold, or none."""
_SHOWN_DEFAULTS = frozenset({
    "adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style", "min_lr",
    "lr_decay_style", "lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples", "make_vocab_size_divisible_by", "seed", "initial_loss_scale",
    "hysteresis",
})  # fmt: skip
"""Arguments that decide what a result holds, and that Megatron-LM has defaults for."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """``index`` holds what is converted: without optimizer state where weights alone are asked for; ``layers`` is the number
    of those that have parameters.

    ``dtype`` is that of the weights in the result, ``facts`` says where what is no tensor is from, ``stats`` size and time of
    the last change of each file, ``template`` what metadata or the checkpoint itself says beside its tensors.
    """

    request: TargetRequest
    checkpoint: Checkpoint
    template: Template | None
    state: State
    index: Index
    layers: int
    dtype: str
    facts: Mapping[str, str]
    stats: Mapping[str, Mapping[str, int]]
    remarks: tuple[str, ...]

    @property
    def where(self) -> str:
        """What errors are about."""
        return str(self.checkpoint.path)

    def identity(self, identity_options: Json) -> str:
        """The digest of what is asked for and what it is made from."""
        state = self.state
        facts = [
            state.iteration,
            state.samples,
            state.step,
            *(repr(sorted(one.items())) for one in (state.args, state.scheduler)),
            *([] if state.scaler is None else [repr(sorted(state.scaler.items()))]),
        ]
        return digest([identity_options, facts, repr(state.groups), sorted(map(str, self.inputs(self.stats)))])

    def inputs(self, paths: Iterable[str]) -> list[Json]:
        """Files of the source, as a manifest lists them."""
        return [self._listed[path] for path in paths]

    @cached_property
    def _listed(self) -> Mapping[str, Json]:
        """One value for each file, however many ranks are read from it: a stage lists it once."""
        root = f"{self.checkpoint.path}/"
        return {path: {"source": path.removeprefix(root), **stat} for path, stat in self.stats.items()}

    def prove_unchanged(self, paths: Iterable[str]) -> None:
        """Refuse files that are not those any more whose headers were read."""
        prove_same({Path(path): self.stats[path] for path in paths})

    def prove_read(self, read: ReadPieces) -> Mapping[str, int]:
        """By the CRC-32 that a file states of itself, or of each record of an archive.

        A record of ``torch_dist``, which may hold a weight of all layers, is read whole for it where everything is verified;
        else a file of which one was read in part counts as not checked.
        """
        counts, level = {"verified": 0, "notChecked": 0, "none": 0}, self.request.verify
        if level != "none" and self.checkpoint.format in _SAFETENSORS:
            return prove_sources(map(Path, read), read, every_byte=self.request.full or level == "full")
        for path, pieces in read.items():
            proved = level != "none"
            if proved and self.checkpoint.format == "torch_dist":
                items = self.checkpoint.items[Path(path).name]
                proved = prove_items(Path(path), items, pieces, every_byte=level == "full")
            elif proved:
                Archive.prove_read(Path(path), pieces)
            counts["verified" if proved else "notChecked"] += 1
        return counts


def paths_of(views: Iterable[Stored]) -> tuple[str, ...]:
    """The files that views lie in."""
    return tuple(dict.fromkeys(extent.path for view in views for extent in view.storage))


def views_of(tensors: Iterable[Tensor]) -> Iterator[Stored]:
    """All views of tensors, replicas included."""
    return (view for tensor in tensors for view in (*tensor.views, *tensor.replicas))


Prove = Callable[[Mapping[str, Path], Callable[[], None]], Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Reading:
    """The source of one rank: the files that it is read from, and what compares its result with it."""

    source: Source
    paths: tuple[str, ...]
    prove: Prove

    def prove_unchanged(self) -> None:
        """Refuse files that are not those any more whose headers were read."""
        self.source.prove_unchanged(self.paths)

    def prove_read(self, read: ReadPieces) -> Mapping[str, int]:
        """As :meth:`Source.prove_read`."""
        return self.source.prove_read(read)

    def prove_result(self, partials: Mapping[str, Path], heed: Callable[[], None]) -> Mapping[str, int]:
        """Compare complete temporary files, by name, with the source, element by element; the CRC-32 of each."""
        return self.prove(partials, heed)


@only_growing()
def located(source: Source, names: Collection[str] | None) -> Source:
    """The source with the places of the parameters ``names``, or of all: of a large one types and shapes are read first.

    The identity is that of all its files, however many are read.
    """
    checkpoint = source.checkpoint
    if checkpoint.locate is None:
        return source
    index = checkpoint.locate(checkpoint.index, names)
    return replace(
        source,
        request=replace(source.request, found=None),
        checkpoint=replace(checkpoint, index=index, locate=None),
        index={key: index[key] for key in source.index},
    )


@only_growing()
def read_source(request: TargetRequest) -> Source:
    """Read the headers of a checkpoint, and its metadata.

    Raises :class:`MissingInputError` where nothing tells the iteration.
    """
    checkpoint = request.read()
    if checkpoint.iteration is None and request.iteration is None:
        raise MissingInputError(
            "nothing in the checkpoint tells its iteration",
            where=checkpoint.path,
            hint=f"say it with {ref('source.iteration')}",
            field="source.iteration",
        )
    if request.full and WHOLE_STATES in checkpoint.warnings:
        raise MissingInputError(
            WHOLE_STATES, where=checkpoint.path, hint=f"convert weights alone{aside('mode')}", field="mode"
        )
    index = checkpoint.index
    if not request.full:
        ignored = weights_alone(index)
        index = {key: tensor for key, tensor in index.items() if key not in ignored}
    given = template_at(request.metadata, checkpoint, allow=request.rules.pickle_globals) if request.metadata else None
    state = state_of(checkpoint, given, iteration=request.iteration, zero_samples=request.zero_samples)
    template = given or checkpoint.template
    dtype, origin, remarks = _dtype(checkpoint, template)
    if dtype == "float16" and request.full:
        scaler, assumed = scaler_of(checkpoint.template, given, state.args)
        state = replace(state, scaler=scaler, assumed={"loss scale": assumed} if assumed else {})
    layers, left_out = _layers(request, checkpoint, state)
    return Source(
        request=request,
        checkpoint=checkpoint,
        template=template,
        state=state,
        index=index,
        layers=layers,
        dtype=dtype,
        facts=_facts(request, checkpoint, given, state) | {"precision of weights": f"{dtype}, {origin}"},
        stats={path: stat_of(Path(path)) for path in checkpoint.files or paths_of(views_of(index.values()))},
        remarks=(*checkpoint.warnings, *remarks, *left_out, *(f"{what}: {why}" for what, why in state.assumed.items())),
    )


def _layers(request: TargetRequest, checkpoint: Checkpoint, state: State) -> tuple[int, Sequence[str]]:
    """Layers with parameters, and a warning where somebody counts more: Megatron-LM core has no no-op layers."""
    stated = state.args.get("num_layers")
    count, whole = check_layers(checkpoint, request.num_layers, request.noop, stated)
    most = max(whole, stated if type(stated) is int else 0)
    if most == count:
        return count, ()
    return count, (f"{count} of {most} layers have parameters: the others are left out as no-op layers",)


def _facts(request: TargetRequest, checkpoint: Checkpoint, given: Template | None, state: State) -> dict[str, str]:
    """What is no tensor -> where it is from: the checkpoint, metadata beside it, an option, a default, or nobody."""
    own, stated = "the checkpoint", checkpoint.statement
    where = f"{Path(state.where).name}, the metadata" if given else own
    samples = own if checkpoint.samples is not None else f"iteration x global_batch_size of {where}"
    if request.zero_samples or state.samples is None:
        samples = "0, as asked for" if request.zero_samples else "0, as nothing states them"
    over = f", with what {own} states" if given and (stated.groups or stated.scheduler) else ""
    found = {
        "iteration": own if checkpoint.iteration is not None else "as asked for",
        "consumed samples": samples,
        "arguments": where if state.args else "nobody",
    }
    if given and given.defaults:
        found["arguments by default"] = ", ".join(sorted(given.defaults & _SHOWN_DEFAULTS))
    if request.full:
        of_step = not given and bool(state.groups) and "step" in state.groups[0]
        found |= {
            "steps of the optimizer": own if of_step else "the iteration",
            "parameter groups": f"{where}{over}",
            "scheduler": f"{where}{over}",
        }
        if state.scaler is not None:
            found["loss scale"] = str(state.assumed.get("loss scale", own))
    return found


def _dtype(checkpoint: Checkpoint, template: Template | None) -> tuple[str, str, Sequence[str]]:
    """The type of the weights and where it is from: their own, unless they are float32 as MindSpeed-Core-MS saves those of any training."""
    dtypes = dict.fromkeys(tensor.dtype for key, tensor in checkpoint.index.items() if key.role == "param")
    # MindFormers in PyNative mode has norms and embeddings in float32 beside linear layers in bfloat16.
    own = next((dtype for dtype in dtypes if dtype in _HALF), next(iter(dtypes), "bfloat16"))
    if checkpoint.format not in _OF_MINDSPORE or own in _HALF:
        return own, "the checkpoint", ()
    args = template.args if template else {}
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if args.get(name) is True:
            return dtype, "the arguments", ()
    if args.get("params_dtype") == Global("torch", "float32") or {"bf16", "fp16"} <= args.keys():
        return own, "the arguments", ()
    return (
        "bfloat16",
        "as nothing states it",
        ("nothing states the precision of the training: weights are written as bfloat16",),
    )
