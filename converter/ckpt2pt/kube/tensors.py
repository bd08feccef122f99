"""The request of a conversion by global tensors, of a Spec: what each kind of result is asked for besides what all are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from ckpt2pt.core.names import Rules
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Verify
from ckpt2pt.errors import UsageError, ref
from ckpt2pt.formats.huggingface.config import Choices
from ckpt2pt.kube.conversion.schema import RELEASE, Spec, TargetFormat
from ckpt2pt.kube.conversion.usable import check_used, framework_of
from ckpt2pt.kube.sources import flags_of, is_mindformers, refuse_target
from ckpt2pt.run.targets.request import (
    AnyRequest,
    DistRequest,
    HuggingFaceRequest,
    McoreRequest,
    MindFormersRequest,
    RepairRequest,
    TargetRequest,
)

T = TypeVar("T", bound=TargetRequest)


def resolve_mcore(spec: Spec, *, in_process: bool = False) -> McoreRequest:
    """The request of a conversion into the torch format of Megatron-LM 0.7 to 0.19; headers are read for sizes that are not said."""
    target = spec.target
    version = target.megatron_version or "0.19"
    if not re.match(RELEASE, version):
        raise UsageError(
            f"{ref('target.megatronVersion')} is {version}",
            where=ref("spec"),
            hint="give a release from 0.7 to 0.19; for 0.6 choose another format of the target",
            field="target.megatronVersion",
        )
    return by_tensors(
        McoreRequest,
        spec,
        in_process=in_process,
        target_virtual=target.parallelism.virtual_pipeline or spec.parallelism.virtual_pipeline,
        layers_per_stage=spec.model.layers_per_stage or None,
        data=target.data_parallel or 1,
        release=(0, int(version.partition(".")[2])),
        names=_NAMES[target.names],
        transformer=_TRANSFORMERS[target.transformer_impl],
    )


_NAMES: Mapping[str, Literal["auto", "mcore", "legacy"]] = {"Auto": "auto", "Mcore": "mcore", "Legacy": "legacy"}
_TRANSFORMERS: Mapping[str, Literal["auto", "local", "transformer_engine"]] = {
    "Auto": "auto", "Local": "local", "TransformerEngine": "transformer_engine",
}  # fmt: skip


def resolve_dist(spec: Spec, *, in_process: bool = False) -> DistRequest:
    """The request of a conversion into torch_dist; where it is not said how work is divided, headers are read."""
    return by_tensors(DistRequest, spec, in_process=in_process)


def resolve_huggingface(spec: Spec, *, in_process: bool = False) -> HuggingFaceRequest:
    """The request of a conversion into weights for Hugging Face transformers, which have no optimizer: as ``mode`` ParamsOnly says."""
    files = spec.target.huggingface
    return by_tensors(
        HuggingFaceRequest,
        msgspec.structs.replace(spec, mode="ParamsOnly"),
        in_process=in_process,
        choices=Choices(vocabulary=files.vocab_size, rope_scaling_factor=files.rope_scaling_factor),
        tokenizer=None if files.tokenizer_path is None else Path(files.tokenizer_path),
    )


def resolve_mindformers(spec: Spec, *, in_process: bool = False) -> MindFormersRequest:
    """The request of a conversion into weights for MindFormers: as ``mode`` ParamsOnly says.

    Raises :class:`UsageError` for a source of MindFormers, which needs no conversion.
    """
    if is_mindformers(spec):
        refuse_target(spec, "mindformers")
    return by_tensors(
        MindFormersRequest,
        msgspec.structs.replace(spec, mode="ParamsOnly"),
        in_process=in_process,
        trainer="graph" if spec.target.trainer == "Graph" else "pynative",
    )


def by_tensors(kind: Callable[..., T], spec: Spec, **own: object) -> T:
    """What every conversion by global tensors is asked for, and what only this one is.

    Tensor and pipeline parallel size are those of the source, which is read as far as its headers, where nobody says them.
    """
    sizes, result, noop = spec.parallelism, spec.target.parallelism, spec.model.noop_layers
    said = spec.source.format
    check_used(spec, framework_of(said))
    source_format = said.lower()
    if said == "Megatron" and of_iteration(spec)[1]:
        source_format = "torch_dist"
    tensor, pipeline = result.tensor or sizes.tensor, result.pipeline or sizes.pipeline
    request = kind(
        topology=Topology(num_layers=pipeline or 1, tensor=tensor or 1, pipeline=pipeline or 1),
        target_expert=result.expert,
        source=Path(spec.source.path),
        target=Path(spec.target.path),
        source_format=source_format,
        metadata=Path(spec.metadata.path) if spec.metadata.path else None,
        iteration=spec.source.iteration,
        tensor=sizes.tensor,
        pipeline=sizes.pipeline,
        num_layers=spec.model.num_layers,
        noop=None if noop is None else frozenset(noop),
        full=spec.mode == "Full",
        zero_samples=spec.target.zero_consumed_samples,
        mindformers=flags_of(spec),
        rules=rules_in(spec),
        overwrite=spec.target.overwrite,
        verify=level_in(spec),
        workers=spec.workers.processes,
        timeout=spec.workers.rank_timeout_seconds,
        **own,
    )
    if tensor and pipeline:
        return request
    found = request.read()
    tensor, pipeline = tensor or found.tensor, pipeline or found.pipeline
    return replace(request, topology=Topology(num_layers=pipeline, tensor=tensor, pipeline=pipeline), found=found)


def of_iteration(spec: Spec) -> tuple[Path, bool]:
    """The folder of the iteration of a Megatron checkpoint, and whether it is distributed."""
    from ckpt2pt.formats.folders import source_folder  # noqa: PLC0415 - for Megatron sources
    from ckpt2pt.formats.torch_dist.metadata import is_distributed  # noqa: PLC0415

    folder = source_folder(Path(spec.source.path), spec.source.iteration)
    return folder, is_distributed(folder)


def rules_in(spec: Spec) -> Rules:
    """The rules for names."""
    asked = spec.model.rules
    return Rules(
        layer_modules=asked.layer_modules,
        modules=asked.modules,
        ignore=asked.ignore,
        pickle_globals=asked.pickle_globals,
    )


def level_in(spec: Spec) -> Verify:
    """How the result is verified."""
    return "none" if spec.verify == "None" else "full" if spec.verify == "Full" else "digest"


BY_TENSORS: Mapping[TargetFormat, Callable[..., AnyRequest]] = {
    "TorchDist": resolve_dist,
    "Megatron": resolve_mcore,
    "Safetensors": resolve_huggingface,
    "MindFormers": resolve_mindformers,
    "Torch": partial(by_tensors, RepairRequest),
}
"""The results that are made by global tensors, and what asks for each."""
