"""``pt_meta`` of one parallel layout -> ``pt_meta`` of another: the same run, as it would have begun on other ranks.

    args_tp*_pp*.pt --arguments with other degrees--> parameters of each chunk --planning.layout--> buffers, groups

Everything that does not depend on the layout stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.layout import Parameter, bucket_numel, lay_out, weight_decay_groups
from ckpt2pt.core.names import local_layer
from ckpt2pt.core.reshard import padded_rows
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.errors import FormatError, UsageError, ref
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.ptmeta.arguments import integer
from ckpt2pt.formats.ptmeta.files import RankFiles
from ckpt2pt.formats.ptmeta.gpt import Argument, chunk_parameters
from ckpt2pt.formats.ptmeta.metadata import (
    Given,
    chunk_names,
    data_parallel_size,
    learn,
    read_arguments,
    read_param_maps,
    read_stated,
)
from ckpt2pt.formats.ptmeta.rng import rng_state
from ckpt2pt.formats.torchfile.trees import Global, Value, with_attrs

_OPTION = ref("metadata.path")


@dataclass(frozen=True, slots=True, kw_only=True)
class NewLayout:
    """What changes; None keeps what the metadata states.  ``tokens`` is the size of the vocabulary before padding."""

    tensor: int | None = None
    pipeline: int | None = None
    virtual: int | None = None
    data: int | None = None
    noop: frozenset[int] = frozenset()
    layers_per_stage: tuple[int, ...] | None = None
    tokens: int | None = None
    bucket_size: int | None = None


class Described(Protocol):
    """What describes the ranks of a Megatron run, and its layout."""

    @property
    def where(self) -> Path:
        """What errors are about."""
        ...

    @property
    def layout(self) -> Topology:
        """With the no-op layers, and with the layers of each stage where they are uneven."""
        ...

    def arguments(self, rank: Rank) -> Template:
        """The template of one rank."""
        ...

    def buffers(self, pp: int) -> Sequence[Buffer]:
        """The buffers of the first rank of a stage, none where nothing describes them."""
        ...


@dataclass(frozen=True, slots=True)
class PtMeta:
    """A folder of metadata.  Raises :class:`UsageError` where there is none."""

    where: Path
    allow: tuple[str, ...] = ()

    @property
    def layout(self) -> Topology:
        """Local numbers tell the layers of each chunk: where these add up to all layers there are no no-op layers."""
        stated = read_stated(self.where, allow=self.allow)
        if stated is None:
            hint = f"point {_OPTION} at a folder with args_tp*_pp*.pt"
            raise UsageError("there is no pt_meta", where=self.where, hint=hint)
        chunks = [chunk_names(self.where, (0, pp), allow=self.allow) for pp in range(stated.pipeline)]
        virtual, layers = stated.virtual or 1, self.arguments((0, 0)).args.get("num_layers")
        if all(len(one) == virtual for one in chunks):
            held = tuple(_slots(chunks[pp][vpp]) for vpp in range(virtual) for pp in range(stated.pipeline))
            if sum(held) == layers:
                return Topology(
                    num_layers=sum(held),
                    tensor=stated.tensor,
                    pipeline=stated.pipeline,
                    virtual=virtual,
                    layers_per_stage=held,
                )
        return learn(Given(data=1), source=self.where, metadata=self.where, target=self.where, allow=self.allow)

    def arguments(self, rank: Rank) -> Template:
        """The template of one rank."""
        return read_arguments(self.where, rank, allow=self.allow)

    def buffers(self, pp: int) -> Sequence[Buffer]:
        """The buffers of the first rank of a stage, by their maps."""
        divisor = data_parallel_size(self.arguments((0, 0)))
        return read_param_maps(self.where, tp=0, pp=pp, divisor=divisor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relayout:
    """Metadata of any rank of the new ``layout``; ``assumed`` is what it rests on besides the old one."""

    base: Template
    layout: Topology
    groups: Mapping[bool, dict[str, Value]]
    changes: Mapping[str, Value]
    bucket_size: int | None
    assumed: Mapping[str, object]

    def rank(self, rank: Rank) -> RankFiles:
        """All of one rank."""
        return _rank(self.base, self.layout, rank, self.groups, self.changes, self.bucket_size)


def relayout(old: Described, new: NewLayout) -> Relayout:
    """Make the metadata of another layout.

    Raises :class:`FormatError` for metadata without what is needed, :class:`UsageError` for a layout that cannot be.
    """
    before, base = old.layout, old.arguments((0, 0))
    args = cast("Mapping[str, Argument]", base.args)
    _check_maps(old, before, base, new.bucket_size)
    layout = _topology(args, before, replace(new, noop=new.noop or before.noop))
    rows, evidence = _vocabulary(args, layout, new)
    return Relayout(
        base=base,
        layout=layout,
        groups=_groups(old, before),
        changes=_changes(args, layout, rows, new),
        bucket_size=new.bucket_size,
        assumed={
            "vocabulary": evidence,
            "parameter order": "the built-in order of a legacy GPT model of Megatron-LM 0.6, which the maps of the old layout have",
            "rng_state": f"as at the start of a run with seed {args.get('seed')}, as other ranks draw other numbers",
        },
    )


def _slots(names: Sequence[str]) -> int:
    return 1 + max((layer for name in names if (layer := local_layer(name)) is not None), default=-1)


def _check_maps(described: Described, old: Topology, base: Template, bucket_size: int | None) -> None:
    """The maps that are there are those that would be made for the same layout: else the model, or its Megatron, is another."""
    for pp in range(old.pipeline):
        there = described.buffers(pp)
        made = [
            buffer
            for buffers in _buffers(base, cast("Mapping[str, Argument]", base.args), old, (0, pp), bucket_size).values()
            for buffer in buffers
        ]
        if there and list(there) != made:
            raise FormatError(
                f"the param maps of stage {pp} are not those of a legacy GPT model of Megatron-LM 0.6"
                + (f" with buckets of {bucket_size} elements" if bucket_size else ""),
                where=described.where,
                hint=f"give {ref('bucketSize')} if that Megatron's number of elements for a bucket was changed; for a model with an "
                "order of parameters of its own make pt_meta from a checkpoint in the new layout",
            )


def _topology(args: Mapping[str, Argument], old: Topology, new: NewLayout) -> Topology:
    return Topology(
        num_layers=integer(args, "num_layers"),
        tensor=new.tensor or old.tensor,
        pipeline=new.pipeline or old.pipeline,
        virtual=new.virtual or old.virtual,
        noop=new.noop,
        layers_per_stage=new.layers_per_stage,
    )


def _vocabulary(args: Mapping[str, Argument], layout: Topology, new: NewLayout) -> tuple[int | None, str]:
    """Rows of the embedding: Megatron-LM cac60ce4, megatron/tokenizer/tokenizer.py, ``_vocab_size_with_padding``."""
    held, divisor = args.get("padded_vocab_size"), args.get("make_vocab_size_divisible_by")
    if type(held) is not int or type(divisor) is not int or divisor < 1:
        return None, "as it is: the arguments do not say how it is padded"
    tokens = new.tokens or args.get("vocab_size")
    multiple = divisor * layout.tensor
    rows = padded_rows(tokens, held, multiple)
    if type(tokens) is int and 0 < tokens <= held:
        return rows, f"{tokens} tokens in {rows} rows"
    if new.tokens:
        raise UsageError(
            f"{ref('vocabSize')} is {new.tokens}, and the embedding has {held} rows",
            where=ref("spec"),
            hint="give the number of tokens before padding",
        )
    return (
        rows,
        f"{rows} rows, as the number of tokens is not known; Megatron pads it to {multiple}",
    )


def _changes(args: Mapping[str, Argument], layout: Topology, rows: int | None, new: NewLayout) -> dict[str, Value]:
    """Arguments that depend on the layout (Megatron-LM cac60ce4, megatron/arguments.py, ``validate_args``)."""
    context = args.get("context_parallel_size")
    context = context if type(context) is int else 1
    group = new.data or (cast("int", args.get("data_parallel_size") or 1) * context)
    if group % context:
        raise UsageError(
            f"{ref('target.dataParallel')} {group} counts data and context parallel ranks together, and there are {context} of these",
            where=ref("spec"),
            hint=f"give a multiple of {context}",
        )
    changes: dict[str, Value] = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "transformer_pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual if layout.virtual > 1 else None,
        "num_layers_per_virtual_pipeline_stage": layout.num_layers // layout.pipeline // layout.virtual
        if layout.virtual > 1
        else None,
        "data_parallel_size": group // context,
        "world_size": layout.tensor * layout.pipeline * group,
    }
    if rows is not None:
        changes["padded_vocab_size"] = rows
    if new.tokens:
        changes["vocab_size"] = new.tokens
    if layout.tensor == 1 and args.get("sequence_parallel"):
        changes["sequence_parallel"] = False
    return {name: value for name, value in changes.items() if name in args}


def _groups(described: Described, old: Topology) -> dict[bool, dict[str, Value]]:
    """A parameter group with weight decay and one without, from whichever rank has them."""
    found: dict[bool, dict[str, Value]] = {}
    for pp in range(old.pipeline):
        for group in described.arguments((0, pp)).groups:
            found.setdefault(group.get("wd_mult") != 0, group)
        if len(found) == 2:
            break
    return found


def _rank(
    base: Template,
    layout: Topology,
    rank: Rank,
    groups: Mapping[bool, dict[str, Value]],
    changes: Mapping[str, Value],
    bucket_size: int | None,
) -> RankFiles:
    tp, pp = rank
    changes = {**changes, "rank": pp * (_of(changes, "world_size") // layout.pipeline) + tp}
    args = cast("dict[str, Argument]", {**base.args, **changes})
    chunks = _parameters(args, layout, pp)
    flat = [parameter for parameters in chunks.values() for parameter in parameters]
    tree: dict[str, Value] = dict(base.tree) | {"args": with_attrs(base.tree["args"], changes)}
    tree.pop("param_name_list", None)
    storages: dict[str, object] = dict(base.storages)
    if "rng_state" in tree:
        tree["rng_state"], made = rng_state(integer(args, "seed"), tp=tp, pp=pp)
        storages |= made
    if base.groups:
        wanted = weight_decay_groups(flat)
        missing = [kind for kind in wanted if kind not in groups]
        if missing:
            raise FormatError(
                f"no rank has a parameter group {'with' if missing[0] else 'without'} weight decay",
                where=base.path,
                hint="make pt_meta from a checkpoint or from a description (ckpt2pt pt-meta --help)",
            )
        tree["optimizer"] = {"optimizer": {"param_groups": [dict(groups[kind].items()) for kind in wanted]}}
    prefix = "model{}" if layout.virtual > 1 else "model"
    return RankFiles(
        tp=tp,
        pp=pp,
        tree=tree,
        path=base.path,
        storages=cast("dict[str, bytes]", storages),
        buffers=tuple(
            _buffers(Template(path=base.path, tree=tree, storages={}), args, layout, rank, bucket_size).values()
        ),
        names=tuple(
            tuple(f"{prefix.format(vpp)}.{parameter.name}" for parameter in reversed(parameters))
            for vpp, parameters in chunks.items()
        ),
    )


def _parameters(args: Mapping[str, Argument], layout: Topology, pp: int) -> dict[int, Sequence[Parameter]]:
    dtype: object = args.get("params_dtype")
    spelled = dtype.name if isinstance(dtype, Global) else "bfloat16"
    return {vpp: chunk_parameters(args, layout, pp=pp, vpp=vpp, dtype=spelled) for vpp in range(layout.virtual)}


def _buffers(
    template: Template, args: Mapping[str, Argument], layout: Topology, rank: Rank, size: int | None
) -> dict[int, tuple[Buffer, ...]]:
    overlap, divisor = args.get("overlap_grad_reduce") is True, data_parallel_size(template) or 1
    limits = {vpp: bucket_numel(overlap=overlap, pp=rank[1], chunk=vpp, size=size) for vpp in range(layout.virtual)}
    chunks = _parameters(args, layout, rank[1])
    return {vpp: lay_out(found, divisor=divisor, bucket_numel=limits[vpp]) for vpp, found in chunks.items()}


def _of(changes: Mapping[str, Value], name: str) -> int:
    value = changes.get(name)
    return value if isinstance(value, int) else 1
