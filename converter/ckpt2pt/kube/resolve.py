"""What is asked for, completed by what the metadata and the source state: a Spec becomes a Request."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from ckpt2pt.core.names import Rules
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import MindSporeFiles, Request
from ckpt2pt.errors import Ckpt2ptError, MissingInputError, TopologyError, UsageError, aside, ref, refs
from ckpt2pt.formats.families import refuse_unsupported
from ckpt2pt.formats.mindspore.filenames import is_passed_by, rank_of_name
from ckpt2pt.formats.msadapter import check_msadapter
from ckpt2pt.formats.ptmeta.metadata import Given, learn, read_stated, require
from ckpt2pt.io.paths import is_file
from ckpt2pt.kube.conversion.schema import CONTENTS, MEGATRON, Degrees, Spec
from ckpt2pt.kube.conversion.usable import USES, check_used
from ckpt2pt.kube.sources import looks_like, refuse_target
from ckpt2pt.kube.tensors import BY_TENSORS, level_in, of_iteration, rules_in
from ckpt2pt.run.targets.request import AnyRequest

log = logging.getLogger("ckpt2pt")


def resolve_any(spec: Spec, *, in_process: bool = False) -> AnyRequest:
    """The request of a spec with folders of this machine, whose kind is that of the target.

    Raises :class:`UsageError` for options that source or target cannot use, :class:`UnsupportedFormatError` for a source of a
    family that is not read, beside what :func:`resolve` raises.
    """
    refuse_unsupported(Path(spec.source.path), contents=spec.source.format == "Auto")
    if looks_like(spec, "HuggingFace"):  # which has weights alone, whatever is asked for
        spec = msgspec.structs.replace(spec, mode="ParamsOnly")
    by_tensors = BY_TENSORS.get(spec.target.format)
    return by_tensors(spec, in_process=in_process) if by_tensors else resolve(spec, in_process=in_process)


def resolve(spec: Spec, *, in_process: bool = False) -> Request:
    """The request of a spec with folders of this machine; only ``pt_meta``, names of folders and Megatron's arguments are read.

    Raises :class:`UsageError` or :class:`TopologyError` for sizes that contradict what is there, or that nothing states, and
    for names of files that a conversion would pass by.
    """
    rules, files = rules_in(spec), _files(spec)
    source, target = Path(spec.source.path), Path(spec.target.path)
    check_used(spec, None)
    megatron, distributed = is_megatron(spec), False
    check_used(spec, "Megatron" if megatron else "MindSpore")
    if megatron:
        source, distributed = of_iteration(spec)  # whatever the tracker names meanwhile
        if spec.source.format == "MSAdapter":
            check_msadapter(source)
        topology, saved = _of_megatron(spec, source, rules, distributed=distributed)
    elif files:
        topology, saved = _to_mindspore(spec, rules)
    else:
        topology, saved = _of_mindspore(spec, rules)
    info = spec.source.opt_shard_info_path
    return Request(
        topology=topology,
        source_topology=saved,
        source=source,
        metadata=Path(spec.metadata.path) if spec.metadata.path else None,
        target=target,
        files=files,
        full=spec.mode == "Full",
        source_format="torch_dist" if distributed else "megatron" if megatron else _FILES.get(spec.source.format),
        iteration=spec.source.iteration,
        shard_info=None if info is None else Path(info),
        target_data=spec.target.data_parallel,
        rules=rules,
        reference_samples=spec.target.zero_consumed_samples,
        overwrite=spec.target.overwrite,
        verify=level_in(spec),
        workers=spec.workers.processes,
        in_process=in_process,
        timeout=spec.workers.rank_timeout_seconds,
    )


def _files(spec: Spec) -> MindSporeFiles | None:
    if spec.target.format != "MindSpore":
        return None
    asked = spec.target.mindspore
    _check_prefix(asked.prefix, asked.format.lower())
    return MindSporeFiles(
        format="safetensors" if asked.format == "Safetensors" else "ckpt",
        prefix=asked.prefix,
        copies=asked.all_replicas,
        contents=tuple(kind for kind, content in CONTENTS.items() if content in asked.contents),
    )


_OTHER = refs("target.parallelism.tensor", "target.parallelism.pipeline", "target.parallelism.virtualPipeline")
_FILES = {"Ckpt": "ckpt", "Safetensors": "safetensors"}
"""Formats of MindSpore's files, where one of them is asked for."""


def is_megatron(spec: Spec) -> bool:
    """Whether the source is a Megatron checkpoint, as it is said or as it looks.

    A source to come has to be said, but for a MindSpore result, which is made from Megatron unless MindSpore's files are there.
    Raises :class:`UsageError` for a MindSpore source of a Megatron result without metadata, :class:`MissingInputError` where
    nothing is there either that would tell.
    """
    megatron, imported = spec.source.format in MEGATRON, spec.target.format == "MindSpore"
    found = ""
    if spec.source.format == "Auto":
        from ckpt2pt.formats.registry import detect  # noqa: PLC0415 - only where it is not said

        megatron = imported
        try:
            found = detect(Path(spec.source.path))
            megatron = found in {"megatron", "torch_dist", "msadapter"}
        except MissingInputError as error:
            if not imported and not spec.metadata.path:
                raise MissingInputError(
                    error.what,
                    where=error.where,
                    hint=f"check the path; of a Megatron checkpoint that is yet to come say so{aside('source.format')}",
                    field="source.path",
                ) from error
        except Ckpt2ptError:  # what is wrong with it, its reader says
            if is_file(Path(spec.source.path)):
                raise
    refuse_target(spec, found)
    if not megatron and not imported and not spec.metadata.path:
        raise UsageError(
            f"{ref('metadata.path')} is missing, and the source is no Megatron checkpoint",
            where=spec.source.path,
            hint="give the pt_meta folder, or a Megatron checkpoint",
            field="metadata.path",
        )
    return megatron


def _to_mindspore(spec: Spec, rules: Rules) -> tuple[Topology, Topology | None]:
    """From MindSpore to MindSpore: the same ranks, or another layout of the model that ``pt_meta`` describes."""
    from ckpt2pt.formats.mindspore.degrees import source_layout  # noqa: PLC0415 - for this alone

    own, result, path = spec.parallelism, spec.target.parallelism, Path(spec.source.path)
    sizes = own.tensor, own.pipeline, own.data, own.context
    source = source_layout(path, sizes, Topology(num_layers=1), rules)
    tensor, pipeline = result.tensor or source.tensor, result.pipeline or source.pipeline
    if (tensor, pipeline) == (source.tensor, source.pipeline) and not result.virtual_pipeline:
        _check_own_layout(spec, source, rules)
        return source, None
    if not spec.metadata.path:
        raise UsageError(
            f"{ref('metadata.path')} is missing, which says where layers and heads of another layout may be cut",
            where=path,
            hint=f"give the pt_meta folder of the model, or leave {_OTHER} out",
            field="metadata.path",
        )
    noop, layers = spec.model.noop_layers, spec.model.num_layers
    given = Given(num_layers=layers, data=1, noop=None if noop is None else frozenset(noop))
    model = learn(
        given, source=path, metadata=Path(spec.metadata.path), target=Path(spec.target.path), allow=rules.pickle_globals
    )
    target = replace(
        model,
        tensor=tensor,
        pipeline=pipeline,
        virtual=result.virtual_pipeline or own.virtual_pipeline or 1,
        data=source.data,
        context=source.context,
        layers_per_stage=spec.model.layers_per_stage,
    )
    return target, source


def _refuse_unused(spec: Spec) -> None:
    """Refuse what decides nothing where the layout stays."""
    for field in ("model.layersPerStage", "parallelism.virtualPipeline"):
        if not USES[field].given(spec):
            continue
        hint = f"leave it out; another layout is asked for by {_OTHER}"
        what = f"{ref(field)} is given, and decides nothing where the layout stays"
        raise UsageError(what, where=ref("spec"), hint=hint, field=field)


def _check_own_layout(spec: Spec, layout: Topology, rules: Rules) -> None:
    """Of a layout that stays nothing is needed; what is given has to be what ``pt_meta`` and the files say.

    Files are looked at unless somebody waits for them, who asks again when they are complete.
    """
    from ckpt2pt.formats.checkpoint import Selection, check_layers  # noqa: PLC0415 - for this alone
    from ckpt2pt.formats.mindspore.degrees import source_layout  # noqa: PLC0415 - the same
    from ckpt2pt.formats.mindspore.read import open_mindspore  # noqa: PLC0415 - the same

    model, own, source = spec.model, spec.parallelism, Path(spec.source.path)
    _refuse_unused(spec)
    stated = None
    if spec.metadata.path:
        metadata = Path(spec.metadata.path)
        require(metadata, source=source, target=Path(spec.target.path))
        stated = read_stated(metadata, allow=rules.pickle_globals)
    if stated and (stated.tensor, stated.pipeline) != (layout.tensor, layout.pipeline):
        raise TopologyError(
            f"{stated}, the source has tp {layout.tensor}, pp {layout.pipeline}",
            where=source,
            hint=f"give the pt_meta of this training, or none: its layout stays; or another layout by {_OTHER}",
            field="metadata.path",
        )
    if stated and stated.num_layers and model.num_layers not in {None, stated.num_layers}:
        raise TopologyError(
            f"{ref('model.numLayers')} is {model.num_layers}; {stated}",
            where=stated.folder,
            hint=f"leave it out, or give {stated.num_layers}",
            field="model.numLayers",
        )
    given = (own.tensor, own.pipeline, model.num_layers, model.noop_layers, stated)
    if spec.readiness.timeout_seconds or given == (None,) * len(given):
        return
    with suppress(UsageError):  # where files do not tell, reading them by what is given proves it
        found = source_layout(source, (None, None, own.data, own.context), layout, rules)
        if (found.tensor, found.pipeline) != (layout.tensor, layout.pipeline):
            raise TopologyError(
                f"{ref('parallelism')} are tp {layout.tensor}, pp {layout.pipeline}, and the files are of tp {found.tensor}, pp {found.pipeline}",
                where=source,
                hint=f"leave them out, or give those of the files; another layout is asked for by {_OTHER}",
                field="parallelism",
            )
    info = spec.source.opt_shard_info_path
    wanted = Selection(tensor=layout.tensor, pipeline=layout.pipeline, iteration=spec.source.iteration, rules=rules)
    checkpoint = open_mindspore(
        source, wanted, wanted_format=_FILES.get(spec.source.format), info=None if info is None else Path(info)
    )
    noop = None if model.noop_layers is None else frozenset(model.noop_layers)
    check_layers(checkpoint, model.num_layers, noop, stated.num_layers if stated else None)


def _of_mindspore(spec: Spec, rules: Rules) -> tuple[Topology, Topology | None]:
    """The layout of the result, and that of the source where it is another one, by ``pt_meta`` and names of folders."""
    model, own, result = spec.model, spec.parallelism, spec.target.parallelism
    relaid = result != Degrees()
    given = Given(
        num_layers=model.num_layers,
        tensor=result.tensor or own.tensor,
        pipeline=result.pipeline or own.pipeline,
        virtual=result.virtual_pipeline or own.virtual_pipeline,
        data=1 if relaid else own.data,
        context=1 if relaid else own.context,
        noop=None if model.noop_layers is None else frozenset(model.noop_layers),
        layers_per_stage=model.layers_per_stage,
    )
    source, metadata, target = Path(spec.source.path), Path(spec.metadata.path), Path(spec.target.path)
    topology = learn(given, source=source, metadata=metadata, target=target, allow=rules.pickle_globals)
    if topology.remark:
        log.warning("%s", topology.remark)
    return _layouts(spec, topology, rules) if relaid else (topology, None)


def _of_megatron(spec: Spec, folder: Path, rules: Rules, *, distributed: bool) -> tuple[Topology, Topology | None]:
    """The same by the checkpoint itself; what is given has to agree with it.  A distributed one is always cut anew."""
    model, own, result = spec.model, spec.parallelism, spec.target.parallelism
    listed, imported = model.layers_per_stage or None, spec.target.format == "MindSpore"
    found = _of_distributed(spec, folder, rules) if distributed else _of_ranks(spec, folder, rules)
    if imported and (result.pipeline or result.virtual_pipeline):  # those of an import are the checkpoint's
        listed = None
    if model.noop_layers:
        replace(found, noop=frozenset(model.noop_layers))  # which refuses numbers that no layer can have
    given = {
        "model.numLayers": (model.num_layers, found.num_layers),
        "parallelism.tensor": (own.tensor, found.tensor),
        "parallelism.pipeline": (own.pipeline, found.pipeline),
        "parallelism.virtualPipeline": (own.virtual_pipeline, found.virtual),
        "model.noopLayers": (
            None if model.noop_layers is None else {layer for layer in model.noop_layers if layer < found.num_layers},
            set(found.noop),
        ),
    }
    for field, (asked, there) in given.items():
        if asked not in (None, there):
            shown = [
                ", ".join(map(str, sorted(one))) or "none" if isinstance(one, set) else one for one in (asked, there)
            ]
            raise TopologyError(
                f"{ref(field)} is {shown[0]}, the checkpoint has {shown[1]}",
                where=folder,
                hint=f"leave it out, or give {shown[1]}; another layout of the result is asked for by {_OTHER}",
                field=field,
            )
    pipeline, virtual = result.pipeline or found.pipeline, result.virtual_pipeline or found.virtual
    if listed is None and (pipeline, virtual) == (found.pipeline, found.virtual):
        listed = found.layers_per_stage
    if listed and len(set(listed)) == 1:
        listed = None
    found = replace(found, data=own.data or 1, context=own.context or 1) if imported else found
    target = replace(
        found, tensor=result.tensor or found.tensor, pipeline=pipeline, virtual=virtual, layers_per_stage=listed
    )
    if target.remark:
        log.warning("%s", target.remark)
    return target, None if target == found and not distributed else found


def _of_distributed(spec: Spec, folder: Path, rules: Rules) -> Topology:
    from ckpt2pt.discover.distributed import layout_of  # noqa: PLC0415 - for such sources

    return layout_of(folder, rules, full=spec.mode == "Full")


def _of_ranks(spec: Spec, folder: Path, rules: Rules) -> Topology:
    from ckpt2pt.discover.stored import layout_of  # noqa: PLC0415 - for such sources

    result, listed = spec.target.parallelism, spec.model.layers_per_stage or None
    imported = spec.target.format == "MindSpore"
    try:
        return layout_of(folder, rules, listed if imported else None)
    except TopologyError:  # uneven stages with no-op layers are distinguished by who knows them
        if imported or not listed or result.pipeline or result.virtual_pipeline:
            raise
        return layout_of(folder, rules, listed)


def _check_prefix(prefix: str, suffix: str) -> None:
    option, name = ref("target.mindspore.prefix"), f"{prefix}.{suffix}"
    if not prefix or prefix.startswith(".") or "/" in prefix:
        what, hint = f"{option} is {prefix!r}", "give a plain file name"
    elif is_passed_by(name):
        what = f"{option} is {prefix!r}: convert passes by {name}, which is no checkpoint by its name"
        hint = "give another name, such as network; not that of a strategy, a breakpoint or a best checkpoint"
    elif rank_of_name(name):
        what = f"{option} is {prefix!r}, which names a rank, and every rank's file gets this name"
        hint = "give another name, such as network"
    else:
        return
    raise UsageError(what, where=ref("spec"), hint=hint, field="target.mindspore.prefix")


def _layouts(spec: Spec, target: Topology, rules: Rules) -> tuple[Topology, Topology | None]:
    """That of the result, and that of the source where a rank of the result is not read from one rank of the source."""
    from ckpt2pt.formats.mindspore.degrees import source_layout  # noqa: PLC0415 - only for another layout

    own = spec.parallelism
    source = source_layout(Path(spec.source.path), (own.tensor, own.pipeline, own.data, own.context), target, rules)
    sizes = source.tensor, source.pipeline, own.virtual_pipeline
    if sizes != (target.tensor, target.pipeline, target.virtual) or target.layers_per_stage:
        return target, source
    return replace(target, data=source.data, context=source.context), None
