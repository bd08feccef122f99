"""A distributed checkpoint (torch_dist) as the source of a conversion: whole tensors, and the metadata that follows from its arguments.

.metadata, *.distcp --formats.torch_dist--> tensors --core.reshard--> entries of a rank of the result
common state        --ptmeta.relayout-----> template, buffers of that rank

It has no layout of its own: that of the result is asked for, or is what its arguments say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.index import Index
from ckpt2pt.core.names import NameTable, Rules
from ckpt2pt.core.params import EMBEDDING, HEAD, in_legacy_models, kind_of, layer_of
from ckpt2pt.core.reshard import held_by, reshard
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.tensor import Tensor
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.discover.checkpoint import Discovered, Found, RankSource, prove_same, stat_of, step_of, wanted_of
from ckpt2pt.discover.made import meta_of_files
from ckpt2pt.discover.recent import Recent
from ckpt2pt.discover.request import Request
from ckpt2pt.discover.stored import carried, stated_by
from ckpt2pt.errors import FormatError, MissingInputError, TopologyError, aside
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.mindspore.filenames import UNNAMED
from ckpt2pt.formats.mindspore.ranks import SourceFile
from ckpt2pt.formats.ptmeta.describe import known
from ckpt2pt.formats.ptmeta.files import render
from ckpt2pt.formats.ptmeta.legacy import legacy_template, not_legacy
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.formats.ptmeta.relayout import NewLayout, Relayout, relayout
from ckpt2pt.formats.rounding import check_rounding
from ckpt2pt.formats.torch_dist.common import COMMON, iteration_of_common, read_common
from ckpt2pt.formats.torch_dist.items import prove_items
from ckpt2pt.formats.torch_dist.metadata import METADATA, METADATA_JSON, Metadata, read_metadata
from ckpt2pt.formats.torch_dist.read import WHOLE_STATES, parallel_sizes, read_index
from ckpt2pt.formats.torchfile.trees import Global, Value, namespace
from ckpt2pt.io.checksums import Piece
from ckpt2pt.io.paths import is_file

_UNKNOWN = frozenset({"make_vocab_size_divisible_by", "vocab_size"})
"""Arguments without a default here: the vocabulary keeps the rows that it has where nothing says how it was padded."""
_QKV, _PROJECTION, _FC1, _FC2 = (
    "self_attention.linear_qkv.", "self_attention.linear_proj.", "mlp.linear_fc1.", "mlp.linear_fc2.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint by its headers: what describes the ranks of a result (:class:`ckpt2pt.formats.ptmeta.relayout.Described`)."""

    metadata: Metadata
    common: Template
    index: Index
    defaults: tuple[str, ...] = ()
    """Arguments that the checkpoint does not state, and that are those of Megatron-LM 0.6."""

    @property
    def where(self) -> Path:
        """The folder of the iteration."""
        return self.metadata.folder

    @property
    def layout(self) -> Topology:
        """As the run that saved it was cut, where that is even; else as one stage."""
        return layout_of_opened(self)

    def arguments(self, rank: Rank) -> Template:
        """The same for every rank: what depends on the rank is made for each."""
        return self.common

    def buffers(self, pp: int) -> Sequence[Buffer]:
        """None: the state of the optimizer is there by parameters."""
        return ()


def open_source(folder: Path, rules: Rules, *, full: bool) -> Opened:
    """Read the headers, and compare samples of the main parameters with the weights where the optimizer is asked for."""
    if not is_file(folder / METADATA):
        read_metadata(folder)  # which says what that means
    return _open(folder, full, rules.pickle_globals, tuple(stat_of(folder / METADATA).values()))


@lru_cache(1)
def _open(folder: Path, full: bool, allow: tuple[str, ...], _: tuple[int, ...]) -> Opened:
    metadata = read_metadata(folder)
    common = read_common(metadata, allow)
    index = read_index(metadata, common, weights_alone=not full)
    if full:
        check_rounding(index, str(folder))
        if not any(key.role == "exp_avg" for key in index):
            raise MissingInputError(
                WHOLE_STATES if metadata.whole_states else "the checkpoint holds no state of the optimizer",
                where=folder,
                hint=f"convert weights alone{aside('mode')}",
            )
    other = next((key.name for key in index if kind_of(key.name) is None or not in_legacy_models(key.name)), None)
    if other:
        raise not_legacy(other, folder)
    common = replace(common, tree={**common.tree, "iteration": _iteration(common, folder), "rng_state": None})
    completed, defaults = _completed(legacy_template(common, (True, False)), index)
    return Opened(metadata, completed, index, defaults)


def _iteration(common: Template, folder: Path) -> int:
    found = iteration_of_common(common, folder)
    if found is None:
        raise FormatError(
            "nothing states the iteration", where=folder, hint="name the folder as Megatron-LM does, iter_0000500"
        )
    return found


def _completed(template: Template, index: Index) -> tuple[Template, tuple[str, ...]]:
    """The arguments that a small Namespace leaves out: what the tensors tell, else what Megatron-LM 0.6 takes as its default."""
    weights = {key.name: tensor for key, tensor in index.items() if key.role == "param"}
    derived = {**_args_by_weights(template.args, weights), "use_distributed_optimizer": True}
    defaults = cast("Mapping[str, Value]", known().arguments)
    base = {name: value for name, value in defaults.items() if name not in template.args and name not in _UNKNOWN}
    missing = tuple(sorted(base.keys() - derived.keys()))
    args = {**base, **{name: value for name, value in derived.items() if name not in template.args}, **template.args}
    args["use_distributed_optimizer"] = True
    return replace(template, tree={**template.tree, "args": namespace(args)}), missing


def _args_by_weights(args: Mapping[str, Value], weights: Mapping[str, Tensor]) -> dict[str, Value]:
    layers = sorted({layer for name in weights if (layer := layer_of(name)) is not None})

    def of(inner: str, leaf: str = "weight") -> Tensor | None:
        return weights.get(f"decoder.layers.{layers[0]}.{inner}{leaf}") if layers else None

    embedding, positions = weights.get(EMBEDDING), weights.get("embedding.position_embeddings.weight")
    found: dict[str, Value] = {
        "num_layers": len(layers),
        "untie_embeddings_and_output_weights": HEAD in weights,
        "normalization": "LayerNorm" if "decoder.final_layernorm.bias" in weights else "RMSNorm",
        "add_bias_linear": of(_FC2, "bias") is not None,
        "add_qkv_bias": of(_QKV, "bias") is not None and of(_FC2, "bias") is None,
        "position_embedding_type": "learned_absolute" if positions else "rope",
        "bf16": any(tensor.dtype == "bfloat16" for tensor in weights.values()),
        "fp16": any(tensor.dtype == "float16" for tensor in weights.values()),
    }
    if positions:
        found["max_position_embeddings"] = positions.fused[0]
    if embedding:
        found |= {
            "padded_vocab_size": embedding.fused[0],
            "hidden_size": embedding.fused[1],
            "params_dtype": Global("torch", embedding.dtype),
        }
    fc1, fc2, qkv, projection = of(_FC1), of(_FC2), of(_QKV), of(_PROJECTION)
    if fc1 and fc2:
        found |= {"ffn_hidden_size": fc2.fused[1], "swiglu": fc1.fused[0] == 2 * fc2.fused[1]}
    heads = args.get("num_attention_heads")
    if qkv and projection and type(heads) is int and heads > 0:
        channels = projection.fused[1] // heads
        groups = (qkv.fused[0] // max(1, channels) - heads) // 2
        found |= {"kv_channels": channels, "num_query_groups": groups, "group_query_attention": groups != heads}
    return found


def layout_of_opened(opened: Opened) -> Topology:
    """The layout that the arguments state, with the layers that are there."""
    args, (tensor, pipeline) = opened.common.args, parallel_sizes(opened.common)
    layers = {layer for key in opened.index if (layer := layer_of(key.name)) is not None}
    slots, virtual = args.get("num_layers"), args.get("virtual_pipeline_model_parallel_size")
    if type(slots) is not int or layers != set(range(slots)):
        raise TopologyError(
            f"the arguments say num_layers {slots!r}, and there are layers {len(layers)}",
            where=opened.where,
            hint="copy the whole folder again from where it was written",
        )
    virtual = virtual if type(virtual) is int and virtual > 0 else 1
    if slots % (pipeline * virtual):  # uneven stages, of which a distributed checkpoint keeps nothing
        pipeline = virtual = 1
    return Topology(num_layers=slots, tensor=tensor, pipeline=pipeline, virtual=virtual)


def layout_of(folder: Path, rules: Rules, *, full: bool) -> Topology:
    """The layout of the result where no other is asked for."""
    return open_source(folder, rules, full=full).layout


# ------------------------------------------------------------------------------------------------------------ the source


def find(request: Request, keep: Collection[Rank]) -> Found:
    """All files, which every rank of the result may be read from."""
    folder, opened = request.source, _opened(request)
    names = dict.fromkeys(
        Path(extent.path).name for tensor in opened.index.values() for view in tensor.views for extent in view.storage
    )
    beside = [path for name in (COMMON, METADATA_JSON, *names) if is_file(path := folder / name)]
    file = SourceFile(path=folder / METADATA, when=UNNAMED, merged=False, beside=tuple(beside))
    seen = {path: stat_of(path) for path in file.paths}
    training_step = step_of(opened.common.args, _iteration(opened.common, folder), request)
    return Found({(0, 0): file}, training_step, {}, partial(prove_same, seen))


def _opened(request: Request) -> Opened:
    return open_source(request.source, request.rules, full=request.full)


def tensors_for(request: Request, chosen: Discovered, rank: Rank) -> Index:
    """All tensors, whatever the rank."""
    return _opened(request).index


def read(request: Request, chosen: Discovered, rank: Rank, meta: RankMeta) -> RankSource:
    """The tensors, cut for the rank."""
    tensors, wanted = carried(_opened(request).index, full=request.full), wanted_of(request, meta)
    return RankSource(reshard(tensors, rank, wanted, NameTable(request.rules)), stated(request, chosen, rank))


def stated(request: Request, chosen: Discovered, rank: Rank) -> Statement:
    """What the common state says, where another template takes its place."""
    return Statement() if request.metadata is None else stated_by(_opened(request).common)


def prove_read(
    request: Request, chosen: Discovered, rank: Rank, read: Mapping[str, Sequence[Piece]], *, every_byte: bool
) -> dict[str, int]:
    """By the CRC-32 of each item.  With ``verify: Full`` every main parameter of the stage has to round to its weight."""
    opened, found = _opened(request), {"verified": 0, "notChecked": 0, "none": 0}
    if request.full and request.verify == "full" and not rank[0]:
        own = held_by(opened.index, rank, wanted_of(request, own_meta(request, rank)))
        check_rounding({tensor.key: tensor for tensor in own}, str(request.source), every=True)
    items = opened.metadata.items
    for path, pieces in read.items():
        inside = items.get(Path(path).name)
        if not pieces or not inside or Path(path).parent != request.source:
            continue
        if request.verify == "none":
            found["notChecked"] += 1
        else:
            prove_items(Path(path), inside, pieces)
            found["verified"] += 1
    return found


# ---------------------------------------------------------------------------------------------------------- the metadata


def own_meta(request: Request, rank: Rank) -> RankMeta:
    """What follows for a rank of the result from the arguments."""
    return meta_of_files(_relaid(request).rank(rank), request.source)


def described(request: Request, rank: Rank) -> dict[str, bytes]:
    """The files of ``pt_meta`` of a rank of the result."""
    return render([_relaid(request).rank(rank)], with_maps=request.full)


def own_assumptions(request: Request) -> dict[str, object]:
    """What that rests on besides the checkpoint."""
    found, defaults = dict(_relaid(request).assumed), _opened(request).defaults
    if defaults:
        found["arguments"] = (
            f"the defaults of Megatron-LM 0.6, {len(defaults)} of them, where the checkpoint states none"
        )
    return found


def _relaid(request: Request) -> Relayout:
    wanted, opened = request.topology, _opened(request)
    state = tuple(stat_of(request.source / METADATA).values())
    key = request.source, request.full, request.rules.pickle_globals, state, wanted, request.target_data
    new = NewLayout(
        tensor=wanted.tensor,
        pipeline=wanted.pipeline,
        virtual=wanted.virtual,
        data=request.target_data,
        layers_per_stage=wanted.layers_per_stage,
    )
    return _RELAID.get(key, lambda: relayout(opened, new), lambda _: 1)


_RELAID: Recent[Relayout] = Recent(1)
"""The last one, by all that it is made from: each rank in turn asks for it."""
