"""``pt_meta`` from a model description and the headers of the MindSpore checkpoint; nothing of Megatron is needed.

Everything that neither of them says is an assumption: it is listed, has to be accepted, and goes into the manifest.
Every name and shape of the MindSpore files is checked against the description, both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt2pt.core.buckets import Buffer, ChunkMap
from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.layout import Parameter, bucket_numel, lay_out
from ckpt2pt.core.names import NameTable, Rules, nearest
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.topology import Topology
from ckpt2pt.core.training_step import TrainingStep, read_training_step
from ckpt2pt.errors import InputError
from ckpt2pt.formats.megatron.legacy import check_layers, plan_rank
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.mindspore import facts_of, index_file, statement_of
from ckpt2pt.formats.mindspore.ranks import SourceFile, choose, find_groups, find_sources, index_source, last_saved
from ckpt2pt.formats.mindspore.shards import has_shards
from ckpt2pt.formats.mindspore.source import held_in
from ckpt2pt.formats.ptmeta.arguments import Arguments, complete, integer, topology_of
from ckpt2pt.formats.ptmeta.defaults import reported_by_checkpoint
from ckpt2pt.formats.ptmeta.describe import Description, known
from ckpt2pt.formats.ptmeta.files import RankFiles
from ckpt2pt.formats.ptmeta.gpt import EMBEDDING, Argument, chunk_parameters
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.formats.ptmeta.rng import rng_state
from ckpt2pt.formats.ptmeta.schedule import param_groups, scheduler
from ckpt2pt.formats.torchfile.trees import Call, Global, Value, namespace

_SET_HERE = ("rank", "model_type", "iteration", "consumed_train_samples")
_MODEL_TYPE = Call(Global("megatron.core.enums", "ModelType"), (1,))  # encoder_or_decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the caller knows besides the description: the cut of the MindSpore training and of the run to come."""

    source: Path
    data: int = 1
    context: int = 1
    target_data: int | None = None
    noop: frozenset[int] = frozenset()
    layers_per_stage: tuple[int, ...] | None = None
    bucket_size: int | None = None
    shard_info: Path | None = None
    rules: Rules = Rules()  # noqa: RUF009 - frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesized:
    """Metadata of all ranks, what proves it, what was assumed, and what contradicts the description."""

    ranks: tuple[RankFiles, ...]
    evidence: tuple[str, ...]
    assumed: Mapping[str, object]
    warnings: tuple[str, ...]


def synthesize(said: Description, wanted: Wanted) -> Synthesized:
    """Make the metadata of every rank, checked against the headers of the newest MindSpore checkpoint."""
    data = wanted.target_data or wanted.data * wanted.context
    # The degrees find the files, and only the files tell the learning rate that the description may leave out.
    cut = _topology(complete(replace(said, given={"lr": 0.0, **said.given}), data=data, vocabulary=None), wanted)
    files = _files(wanted, cut)
    index = index_source(files[0, 0], cut.group(0, 0))
    vocabulary, statement = _vocabulary(index, cut.tensor, wanted), statement_of(index)
    stated = reported_by_checkpoint(said.given, statement, facts_of(index))
    arguments = complete(replace(said, given={**said.given, **stated}), data=data, vocabulary=vocabulary)
    _check_vocabulary(arguments, vocabulary, files[0, 0], cut.tensor)
    training_step = _training_step(files[0, 0], arguments)
    ranks: list[RankFiles] = []
    compared = 0
    for tp, pp in cut.ranks():
        chunks = {
            vpp: chunk_parameters(arguments.values, cut, pp=pp, vpp=vpp, dtype=str(arguments.values["params_dtype"]))
            for vpp in range(cut.virtual)
        }
        buffers = _buffers(chunks, arguments, pp, wanted.bucket_size)
        ranks.append(_rank(arguments, training_step, chunks, buffers, tp, pp, wanted))
        compared += _check(files, chunks, ranks[-1], cut, wanted.rules)
    evidence = f"{compared} parameters of {len(ranks)} ranks have the names and shapes that the description gives"
    return Synthesized(
        ranks=tuple(ranks),
        evidence=(evidence,),
        assumed={**({"args from the checkpoint": stated} if stated else {}), **_assumed(said, arguments, wanted)},
        warnings=(*([cut.remark] if cut.remark else []), *_warnings(said, statement, training_step, ranks[0])),
    )


def _warnings(
    said: Description, statement: Statement, training_step: TrainingStep, first: RankFiles
) -> tuple[str, ...]:
    """What the checkpoint contradicts, and arguments that Megatron-LM does not know: they may be misspelt."""
    template = Template(path=said.path, tree=dict(first.tree.items()), storages={})
    conflicts = [*template.carried(statement).conflicts, *training_step.conflicts]
    found: list[str] = []
    if conflicts:
        found.append(
            f"the checkpoint contradicts the description: {', '.join(conflicts)}\n"
            "  hint: correct the description or leave these out; a conversion takes what the checkpoint says"
        )
    if said.unknown:
        names = sorted(known().arguments)
        near = {name: nearest(name, names) for name in said.unknown}
        listed = ", ".join(f"{name} (nearest is {other})" if other else name for name, other in near.items())
        found.append(f"not an argument of Megatron-LM 0.6, and kept as it is: {listed}")
    return tuple(found)


def _topology(arguments: Arguments, wanted: Wanted) -> Topology:
    return topology_of(
        arguments.values,
        data=wanted.data,
        context=wanted.context,
        noop=wanted.noop,
        layers_per_stage=wanted.layers_per_stage,
    )


def _files(wanted: Wanted, cut: Topology) -> Mapping[tuple[int, int], SourceFile]:
    """The newest checkpoint: a file for each rank, or its group's shards."""
    sources = find_groups(
        wanted.source,
        cut,
        find_sources(wanted.source, cut),
        sharded=lambda path: has_shards(index_file(path)),
        info=wanted.shard_info,
    )
    return sources[choose(sources, last_saved(wanted.source, cut))]


def _vocabulary(index: Mapping[str, TensorRef], tensor: int, wanted: Wanted) -> int | None:
    """The padded vocabulary: rows of the first stage's embedding on all tensor-parallel ranks."""
    table = NameTable(wanted.rules)
    known, _ = table.classify_all(index, where=str(wanted.source))
    refs = {what.name: index[entry] for entry, what in known.items() if what.role == "param"}
    for name in table.to_mindspore(EMBEDDING, lambda layer: layer):
        if name in refs and refs[name].shape:
            return refs[name].shape[0] * tensor
    return None


def _check_vocabulary(arguments: Arguments, rows: int | None, file: SourceFile, tensor: int) -> None:
    """The rows are the vocabulary, padded: there cannot be fewer."""
    size = arguments.values["vocab_size"]
    if rows is not None and isinstance(size, int) and size > rows:
        raise InputError(
            f"the description does not fit the checkpoint: vocab_size is {size}, the embedding has {rows} rows on "
            f"{tensor} tensor-parallel ranks",
            where=file.path,
            hint="correct vocab_size or tensor_model_parallel_size of the description, or leave vocab_size out",
        )


def _training_step(file: SourceFile, arguments: Arguments) -> TrainingStep:
    batch = arguments.number("global_batch_size")
    return read_training_step(
        facts_of(index_file(file.path)), global_batch_size=batch, named=file.named, where=str(file.path)
    )


def _buffers(
    chunks: Mapping[int, tuple[Parameter, ...]], arguments: Arguments, pp: int, size: int | None
) -> tuple[tuple[Buffer, ...], ...]:
    overlap = arguments.values["overlap_grad_reduce"] is True
    divisor = arguments.number("data_parallel_size") * arguments.number("context_parallel_size")
    return tuple(
        lay_out(parameters, divisor=divisor, bucket_numel=bucket_numel(overlap=overlap, pp=pp, chunk=vpp, size=size))
        for vpp, parameters in chunks.items()
    )


def _check(
    files: Mapping[tuple[int, int], SourceFile],
    chunks: Mapping[int, tuple[Parameter, ...]],
    made: RankFiles,
    cut: Topology,
    rules: Rules,
) -> int:
    """Plan a conversion of parameters with this metadata: it refuses what is missing, left over or of another shape."""
    maps = [
        ChunkMap(vpp=vpp, names=tuple(p.name for p in parameters), buffer=made.buffers[vpp][0])
        for vpp, parameters in chunks.items()
        if parameters
    ]
    rank, table = (made.tp, made.pp), NameTable(rules)
    file, first = files[rank], files[rank[0], 0]
    template = Template(path=made.path, tree={"args": made.tree["args"]}, storages={})
    meta, where = RankMeta(template=template, chunks=tuple(maps)), str(file.path)
    first_stage = index_source(first, cut.group(rank[0], 0)) if meta.tied and rank[1] else None
    entries = index_source(file, cut.group(*rank))
    try:
        check_layers(maps, cut, pp=rank[1], where=where)
        held = held_in(entries, table, where, full=False, first_stage=first_stage)
        plan = plan_rank(held, meta, rank[1], cut, table, full=False, where=where)
    except InputError as error:
        raise type(error)(
            f"the description does not fit the checkpoint: {error.what}", where=error.where, hint=error.hint
        ) from error
    return sum(1 for _ in plan.parameters)


def _rank(
    arguments: Arguments,
    training_step: TrainingStep,
    chunks: Mapping[int, tuple[Parameter, ...]],
    buffers: tuple[tuple[Buffer, ...], ...],
    tp: int,
    pp: int,
    wanted: Wanted,
) -> RankFiles:
    args = arguments.values
    samples = (
        training_step.samples
        if training_step.samples is not None
        else training_step.iteration * arguments.number("global_batch_size")
    )
    state = scheduler(args, samples)
    flat = [parameter for parameters in chunks.values() for parameter in parameters]
    rng, storages = rng_state(integer(args, "seed"), tp=tp, pp=pp)
    groups = param_groups(args, state, flat, step=training_step.iteration)
    tree: dict[str, Value] = {
        "args": namespace(_namespace(arguments, training_step, samples, tp, pp)),
        "checkpoint_version": 3.0,
        "iteration": training_step.iteration,
        "optimizer": {"optimizer": {"param_groups": groups}},
        "opt_param_scheduler": dict(state.items()),
        "rng_state": rng,
        "num_floating_point_operations_so_far": 0.0,
    }
    key = "model{}" if len(chunks) > 1 else "model"
    return RankFiles(
        tp=tp,
        pp=pp,
        tree=tree,
        path="the description",
        storages=dict(storages),
        buffers=buffers,
        names=tuple(
            tuple(f"{key.format(vpp)}.{parameter.name}" for parameter in reversed(parameters))
            for vpp, parameters in chunks.items()
        ),
    )


def _namespace(arguments: Arguments, training_step: TrainingStep, samples: int, tp: int, pp: int) -> dict[str, Value]:
    data = arguments.number("data_parallel_size") * arguments.number("context_parallel_size")
    values: dict[str, Argument | Value] = dict(arguments.values)
    values |= {
        "rank": pp * data * arguments.number("tensor_model_parallel_size") + tp,
        "params_dtype": Global("torch", str(arguments.values["params_dtype"])),
        "model_type": _MODEL_TYPE,
        "iteration": training_step.iteration,
        "consumed_train_samples": samples,
    }
    return values  # type: ignore[return-value]  # lists of plain values are trees as well


def _assumed(said: Description, arguments: Arguments, wanted: Wanted) -> dict[str, object]:
    size = wanted.bucket_size or "40000000 elements"
    overlap = arguments.values["overlap_grad_reduce"] is True
    return {
        "parameter order": "the built-in order of a legacy GPT model of Megatron-LM 0.6",
        "buckets": f"end after {size}" if overlap else "one for each chunk (no --overlap-grad-reduce)",
        "data x context parallel size": arguments.number("data_parallel_size")
        * arguments.number("context_parallel_size"),
        "optimizer.param_groups": "two groups, by the rules of Adam in Megatron-LM 0.6 and the arguments",
        "opt_param_scheduler": "worked out from the arguments",
        "rng_state": f"as at the start of a run with seed {arguments.values['seed']}; the MindSpore run's has no counterpart",
        "num_floating_point_operations_so_far": 0.0,
        "args at their default": {k: v for k, v in arguments.defaults.items() if k not in _SET_HERE},
        "args worked out": dict(arguments.derived) | {"rank": "the first rank of each stage", "model_type": 1},
        **({"args unknown to Megatron-LM 0.6, kept": dict(said.unknown)} if said.unknown else {}),
    }
