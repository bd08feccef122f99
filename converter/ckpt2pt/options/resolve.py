"""What is asked for, completed by what the metadata and the source state: a Spec becomes a Request."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from ckpt2pt.conversion.schema import Degrees, Spec
from ckpt2pt.errors import UsageError
from ckpt2pt.mapping.names import Rules
from ckpt2pt.mapping.topology import Topology
from ckpt2pt.meta import Given, learn
from ckpt2pt.request import Request

log = logging.getLogger("ckpt2pt")


def resolve(spec: Spec, *, in_process: bool = False) -> Request:
    """The request of a spec with folders of this machine; only ``pt_meta`` and names of folders are read.

    Raises :class:`UsageError` or :class:`TopologyError` for sizes that contradict the metadata, or that nothing states.
    """
    if spec.source.format == "Megatron" or not spec.metadata.path:
        raise UsageError(
            "a Megatron checkpoint is not converted yet, and any other source needs pt_meta",
            where=spec.source.path,
            hint="give --param-map-path (spec.metadata.path) and a MindSpore training output",
        )
    asked = spec.model.rules
    rules = Rules(
        layer_modules=asked.layer_modules,
        modules=asked.modules,
        ignore=asked.ignore,
        pickle_globals=asked.pickle_globals,
    )
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
    topology, saved = _layouts(spec, topology, rules) if relaid else (topology, None)
    info = spec.source.opt_shard_info_path
    return Request(
        topology=topology,
        source_topology=saved,
        source=source,
        metadata=metadata,
        target=target,
        full=spec.mode == "Full",
        source_format=spec.source.format.lower() if spec.source.format in {"Ckpt", "Safetensors"} else None,
        iteration=spec.source.iteration,
        shard_info=None if info is None else Path(info),
        target_data=spec.target.data_parallel,
        rules=rules,
        reference_samples=spec.target.zero_consumed_samples,
        overwrite=spec.target.overwrite,
        verify="none" if spec.verify == "None" else "full" if spec.verify == "Full" else "digest",
        workers=spec.workers.processes,
        in_process=in_process,
        timeout=spec.workers.rank_timeout_seconds,
    )


def _layouts(spec: Spec, target: Topology, rules: Rules) -> tuple[Topology, Topology | None]:
    """That of the result, and that of the source where a rank of the result is not read from one rank of the source."""
    from ckpt2pt.formats.degrees import source_layout  # noqa: PLC0415 - only for another layout

    own = spec.parallelism
    source = source_layout(Path(spec.source.path), (own.tensor, own.pipeline, own.data, own.context), target, rules)
    sizes = source.tensor, source.pipeline, own.virtual_pipeline
    if sizes != (target.tensor, target.pipeline, target.virtual) or target.layers_per_stage:
        return target, source
    return replace(target, data=source.data, context=source.context), None
