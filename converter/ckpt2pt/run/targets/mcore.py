"""A conversion into the ``torch`` format of Megatron-LM 0.7 to 0.19, from any format.

source --run.targets.source--> tensors, state --formats.megatron--> files of each rank --rank.RankTask--> mp_rank_TT_PPP/*.pt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.core.fill import moves_of
from ckpt2pt.core.index import without_gaps
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE
from ckpt2pt.core.params import EMBEDDING, HEAD, expert_count
from ckpt2pt.core.progress import Advance
from ckpt2pt.core.reshard import vocabulary_rows
from ckpt2pt.core.slots import source_of
from ckpt2pt.core.tensor import ROLES, Key
from ckpt2pt.core.topology import Rank, Topology
from ckpt2pt.errors import FormatError, UsageError, aside, ref
from ckpt2pt.formats.folders import keep_apart
from ckpt2pt.formats.megatron.loads import Releases, torch_loads
from ckpt2pt.formats.megatron.order import Style
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.tree import seed_of
from ckpt2pt.formats.megatron.write import McoreLayout
from ckpt2pt.formats.torchfile.trees import Value, namespace
from ckpt2pt.io.records import Json
from ckpt2pt.publish import MEGATRON, Target
from ckpt2pt.run.conversion import Conversion
from ckpt2pt.run.rank import RankTask
from ckpt2pt.run.targets.request import McoreRequest
from ckpt2pt.run.targets.source import Reading, Source, located, paths_of, read_source

if TYPE_CHECKING:
    from ckpt2pt.verification.mcore import Expected
    from ckpt2pt.verification.report import Report

_NO_OPTIMIZER = " and --no-load-optim --no-load-rng (it holds parameters only)"

_SPEC = "layer spec"


@dataclass(frozen=True)
class Found:
    """A source that was read as far as its headers, and how its result is laid out."""

    request: McoreRequest
    source: Source
    layout: McoreLayout
    assumed: Mapping[str, object]

    @cached_property
    def identity_options(self) -> Json:
        """What decides what is written."""
        layout, topology = self.layout, self.layout.topology
        return {
            **self.request.identity_options(),
            "format": "Megatron",
            "release": ".".join(map(str, layout.style.release)),
            "names": layout.style.names,
            "transformerEngine": layout.style.transformer_engine,
            "numLayers": topology.num_layers,
            "noopLayers": sorted(topology.noop),
            "layersPerStage": list(topology.layers_per_stage) if topology.layers_per_stage else None,
            "virtualPipeline": topology.virtual,
            **({"expert": layout.expert} if layout.expert > 1 else {}),
            **({"groupedExperts": True} if layout.style.grouped else {}),
            "targetDataParallel": layout.data,
            "dtype": layout.dtype,
            "vocabulary": layout.rows,
        }

    @property
    def releases(self) -> Releases:
        """Which releases load the result."""
        layout = self.layout
        aligned = all(
            not one.numel % 64
            for pp in range(layout.topology.pipeline)
            for chunk in layout.chunks((0, pp))
            for one in chunk
        )
        return torch_loads(layout.style, full=layout.full, aligned=aligned)

    @property
    def facts(self) -> Json:
        """Where what is no tensor is from."""
        stated = {_SPEC: "the arguments"} | {key: str(why) for key, why in self.assumed.items()}
        if self.request.transformer != "auto":
            stated[_SPEC] = "as asked for"
        return {**self.source.facts, **stated}

    @cached_property
    def target(self) -> Target:
        """The folder that the result goes into."""
        topology, identity = self.layout.topology, self.source.identity(self.identity_options)
        return Target(
            root=self.request.target,
            iteration=self.source.state.iteration,
            identity=identity,
            ranks=dict.fromkeys(self.layout.ranks(), identity),
            stages=topology.pipeline,
            tensor=self.layout.members,
            full=self.request.full,
            kind=MEGATRON,
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know before the result is used."""
        advice = {_SPEC: f"; give {ref('target.transformerImpl')} for a run with Transformer Engine"}
        assumed = (f"{what}: {why}{advice.get(what, '')}" for what, why in self.assumed.items())
        return (*self.source.remarks, *assumed)

    @property
    def expected(self) -> Expected:
        """What has to be in the result."""
        from ckpt2pt.verification.mcore import Expected  # noqa: PLC0415 - numpy, and only when asked for
        from ckpt2pt.verification.tensors import Held  # noqa: PLC0415 - the same

        layout = self.layout
        args: dict[str, Value] = {
            "padded_vocab_size": layout.rows,
            "untie_embeddings_and_output_weights": not layout.tied,
        }
        template = Template(path=layout.where, tree={"args": namespace(args)}, storages={})
        held = Held(
            tensors=layout.index,
            layout=layout.topology,
            expert=layout.expert,
            template=template,
            iteration=layout.state.iteration,
            roles=ROLES if layout.full else ROLES[:1],
        )
        return Expected(held=held, state=layout.state, dtype=layout.dtype, rounds=self.source.checkpoint.rounds)

    def listed(self, rank: Rank) -> list[str]:
        """The files of a rank, below the folder of the result."""
        layout, names = self.layout, [MODEL_FILE]
        if layout.full and layout.saves_optimizer(rank, layout.optimizers(layout.chunks(rank))):
            names.append(OPTIM_FILE)
        return [f"{layout.directory(rank)}/{name}" for name in names]

    def paths(self, rank: Rank) -> tuple[str, ...]:
        """The files that a rank is read from, and those that it compares."""
        return paths_of(self.layout.views(rank))

    def compare(self, rank: Rank, advance: Advance) -> tuple[Report, Mapping[str, int]]:
        """Compare the files of a rank, which are there, with the source; the CRC-32 of each."""
        from ckpt2pt.verification.mcore import compare_files  # noqa: PLC0415 - numpy, and only when asked for

        directory = self.layout.directory(rank)
        results = {Path(name).name: self.target.folder / name for name in self.listed(rank)}
        report, crcs = compare_files(self.expected, rank, results, advance, directory)
        return report, {f"{directory}/{name}": crc for name, crc in crcs.items()}


def find(request: McoreRequest, stages: Sequence[int] | None = None) -> Found:
    """Read the headers of the source, and prove that everything is there that ``stages`` of the result need, or all.

    Nothing is written.
    """
    source = read_source(request)
    state, index = source.state, without_gaps(source.index)
    _check_experts(request, source)
    topology = _topology(request, source)
    style, assumed = _style(request, source)
    held = source_of(index, Key("param", EMBEDDING), source.where).fused[0]
    rows = vocabulary_rows(state.args, held, topology.tensor)
    gradients = _gradients(source)
    untied = state.args.get("untie_embeddings_and_output_weights")
    experts = expert_count(key.name for key in index)
    layout = McoreLayout(
        index=index,
        state=state,
        topology=topology,
        source_tensor=source.checkpoint.tensor,
        style=style,
        dtype=source.dtype,
        gradients=gradients,
        rows=rows,
        tied=Key("param", HEAD) not in index if untied is None else untied is False,
        full=request.full,
        data=request.data,
        expert=request.target_expert or (source.checkpoint.expert if experts else 1),
        where=source.where,
    )
    layout.check()
    gaps = any(key not in source.index for key in index)  # the source counts its layers otherwise
    source = located(source, None if stages is None or gaps else layout.held_by(stages))
    layout = replace(layout, index=without_gaps(source.index))
    assumed["random generators"] = f"as at the start of a run with seed {seed_of(state)}, not those of the source"
    found = Found(replace(request, found=None), source, layout, assumed)
    keep_apart(found.target, {request.source: ref("source.path"), request.metadata: ref("metadata.path")})
    return found


def _check_experts(request: McoreRequest, source: Source) -> None:
    """Refuse experts that a run to come cuts otherwise than dense parameters, as far as the arguments of the source tell."""
    args, tensor = source.state.args, request.topology.tensor
    own = args.get("expert_tensor_parallel_size")
    apart = type(own) is int and own not in {tensor, args.get("tensor_model_parallel_size")}
    if apart and expert_count(key.name for key in source.index):
        raise FormatError(
            f"expert_tensor_parallel_size is {own} and the tensor parallel size of the result {tensor}: experts that are cut "
            "otherwise than dense parameters are not written into this format",
            where=source.state.where,
            hint=f"give {own}{aside('target.parallelism.tensor')} for both, or choose TorchDist in {ref('target.format')}, "
            "which any sizes can load",
            field="target.format",
        )


def _gradients(source: Source) -> str:
    """The type of gradients, which the optimizer's buffers are keyed by (megatron/training/arguments.py)."""
    args = source.state.args
    if source.dtype == "float16":
        return "float32" if args.get("accumulate_allreduce_grads_in_fp32") is True else "float16"
    return source.dtype if args.get("grad_reduce_in_bf16") is True else "float32"


_UNEVEN = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
"""Arguments of a run whose stages have different numbers of layers (megatron/training/arguments.py, 0.9 to 0.19)."""


def _topology(request: McoreRequest, source: Source) -> Topology:
    """How the result is laid out.  Megatron-LM has no no-op layers: what is counted are layers with parameters.

    Raises :class:`UsageError` for a run with uneven stages whose layers nobody counts.
    """
    args = source.state.args
    pipeline = request.topology.pipeline
    virtual = request.target_virtual
    if virtual is None:
        own = args.get("virtual_pipeline_model_parallel_size")
        same = args.get("pipeline_model_parallel_size") == pipeline
        virtual = own if same and type(own) is int and own > 0 else 1
    uneven = next((name for name in _UNEVEN if args.get(name)), None)
    if uneven and pipeline == args.get("pipeline_model_parallel_size") and not request.layers_per_stage:
        raise UsageError(
            f"the run has uneven stages ({uneven})",
            where=source.state.where,
            hint=f"give the layers of each stage{aside('model.layersPerStage')}",
            field="model.layersPerStage",
        )
    return Topology(
        num_layers=source.layers,
        tensor=request.topology.tensor,
        pipeline=pipeline,
        virtual=virtual,
        layers_per_stage=request.layers_per_stage,
    )


def _style(request: McoreRequest, source: Source) -> tuple[Style, dict[str, object]]:
    """How the run to come builds its model, and what nobody said of it."""
    args, assumed, legacy = source.state.args, dict[str, object](), request.names == "legacy"
    if request.names == "auto":
        legacy = args.get("use_legacy_models") is True
    if legacy and request.release >= (0, 18):
        request = replace(request, release=(0, 17))  # the last that has legacy models
    transformer = request.transformer
    if transformer == "auto":
        said = args.get("transformer_impl")
        transformer = "transformer_engine" if said == "transformer_engine" else "local"
        if said is None and not legacy:
            assumed[_SPEC] = "local, as nothing states it"
    style = Style(
        release=request.release,
        names="legacy" if legacy else "mcore",
        transformer_engine=transformer == "transformer_engine",
    )
    grouped = args.get("moe_grouped_gemm") is True and not legacy
    if grouped and request.release < _WITHOUT_TRANSPOSED:
        old = request.release < (0, 8) or args.get("moe_use_legacy_grouped_gemm") is True
        if old or not style.transformer_engine:
            raise FormatError(
                "moe_grouped_gemm of this release and layer spec holds experts transposed in one tensor, which is not written",
                where=source.state.where,
                hint=f"give {ref('target.transformerImpl')} for a run of 0.8 or newer with Transformer Engine, "
                f"or {ref('target.megatronVersion')} 0.18 or newer",
                field="target.megatronVersion",
            )
    return replace(style, grouped=grouped and style.transformer_engine), assumed


_WITHOUT_TRANSPOSED = (0, 18)
"""The first release without ``GroupedMLP`` (megatron/core/transformer/moe/experts.py)."""


def _prove(found: Found, rank: Rank, partials: Mapping[str, Path], heed: Callable[[], None]) -> Mapping[str, int]:
    from ckpt2pt.verification.mcore import prove_files  # noqa: PLC0415 - numpy, and only when asked for

    return prove_files(found.expected, rank, partials, heed=heed)


def _plan(found: Found, rank: Rank, target: Target) -> RankTask:
    request, layout = found.request, found.layout
    files, slots = layout.files(rank)
    moves = moves_of(layout.index, slots, layout.where)
    return RankTask(
        rank=rank,
        target=target,
        reading=Reading(found.source, found.paths(rank), partial(_prove, found, rank)),
        verify=request.verify,
        repair=request.overwrite,
        directory=layout.directory(rank),
        files=files,
        moves=lambda: moves,
        copies=tuple(layout.copies(rank)),
        source_bytes=sum(move.nbytes for move in moves),
        facts={"source": layout.where},
        remarks=layout.remarks(rank),
    )


def conversion_of(request: McoreRequest, stages: Sequence[int]) -> Conversion:
    """What is converted: the given stages of the result."""
    found = find(request, stages)
    members = range(found.layout.members)
    return Conversion(
        target=found.target,
        pace=request.pace,
        verify=request.verify,
        overwrite=request.overwrite,
        identity_options=found.identity_options,
        facts={"assumed": {**found.source.state.assumed, **found.assumed}},
        inputs={(tp, pp): found.source.inputs(found.paths((tp, pp))) for pp in stages for tp in members},
        conflicts=(),
        warnings=found.remarks,
        how_to_load=f" with {found.layout.style.needs}" + ("" if request.full else _NO_OPTIMIZER),
        prepare=partial(_plan, found),
    )
