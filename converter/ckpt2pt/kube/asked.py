"""From options to what they ask for: a Spec, its Request, and the stages of it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.errors import UsageError, ref
from ckpt2pt.io.flags import check_numbers, joined, target_sizes

if TYPE_CHECKING:
    from ckpt2pt.kube.conversion.schema import (
        Names,
        Parallelism,
        Source,
        SourceFormat,
        Spec,
        Target,
        TargetFormat,
        TransformerImpl,
    )
    from ckpt2pt.run.targets.request import AnyRequest

_FORMATS: Mapping[str, SourceFormat] = {
    "auto": "Auto", "mindspore": "MindSpore", "ckpt": "Ckpt", "safetensors": "Safetensors", "megatron": "Megatron",
    "msadapter": "MSAdapter",
    "mindformers": "MindFormers",
    "huggingface": "HuggingFace",
}  # fmt: skip
TARGET_FORMATS: Mapping[str, TargetFormat] = {
    "megatron06": "Megatron06", "megatron": "Megatron", "torch_dist": "TorchDist", "mindspore": "MindSpore",
    "torch": "Torch", "safetensors": "Safetensors", "mindformers": "MindFormers",
}  # fmt: skip
NAMES: Mapping[str, Names] = {"auto": "Auto", "mcore": "Mcore", "legacy": "Legacy"}
TRANSFORMER_IMPLS: Mapping[str, TransformerImpl] = {
    "auto": "Auto", "local": "Local", "transformer_engine": "TransformerEngine",
}  # fmt: skip
"""Words of the flags, and of the document."""


def source_format_of(word: str) -> SourceFormat:
    """The format of a source, by the word of a flag."""
    if word not in _FORMATS:
        raise UsageError(
            f"no format {word}", where="the format of the source", hint=f"give one of {', '.join(_FORMATS)}"
        )
    return _FORMATS[word]


def target_format_of(word: str) -> TargetFormat:
    """The format of a result, by the word of a flag."""
    if word not in TARGET_FORMATS:
        listed = " or ".join(TARGET_FORMATS)
        raise UsageError(f"no format {word}", where="the format of the target", hint=f"give {listed}")
    return TARGET_FORMATS[word]


def spec_of(options: argparse.Namespace) -> Spec:
    """What the flags ask for, or the JSON of ``--spec`` in their place."""
    from ckpt2pt.discover.request import rules_of  # noqa: PLC0415
    from ckpt2pt.kube.conversion import schema  # noqa: PLC0415

    if getattr(options, "spec", None):
        return schema.from_json(options.spec, "--spec")
    source, metadata, target = _places(options)
    check_numbers(
        {
            "--process-limit": getattr(options, "process_limit", 1),
            "--process_timeout": getattr(options, "process_timeout", None),
            **target_sizes(options),
            "--target-dp-size": options.target_dp_size,
            "--iteration": options.iteration,
            "--vocab-size": getattr(options, "vocab_size", None),
        }
    )
    return schema.Spec(
        mode="ParamsOnly" if options.convert_param_only else "Full",
        model=schema.Model(
            num_layers=options.num_layers,
            noop_layers=None if options.noop is None else tuple(options.noop),
            layers_per_stage=joined(options.stage_list),
            rules=schema.rules_of(rules_of(options.rules)),
        ),
        parallelism=_parallelism(options),
        source=_source(options, source),
        metadata=schema.Place(path=metadata or ""),
        target=_target(options, target),
        verify=schema.LEVELS[getattr(options, "verify", None) or "digest"],
        workers=schema.Processes(
            processes=getattr(options, "process_limit", 1),
            rank_timeout_seconds=getattr(options, "process_timeout", None),
        ),
        readiness=schema.Readiness(
            timeout_seconds=getattr(options, "readiness_timeout", 0.0),
            settle_seconds=getattr(options, "readiness_settle", 10.0),
        ),
    )


def _places(options: argparse.Namespace) -> tuple[str, str, str]:
    """The folders of source, metadata and target; no metadata where the source may be one that says it itself."""
    metadata: Path | None = options.param_map_path
    if options.target_format == "mindspore":
        source = _one_of({"--source": options.source, "--megatron-path": options.megatron_path})
        target = _one_of({"--target": options.target, "--ms-path": options.ms_path})
        return str(source), "" if metadata is None else str(metadata), str(target)
    if options.source is options.ms_path is options.target is None and options.source_format in {
        "megatron",
        "msadapter",
    }:
        raise UsageError(
            "both sides are of Megatron, and --megatron-path does not say which of them it is",
            where="the command line",
            hint="give --source and --target",
        )
    source = _one_of({"--source": options.source, "--ms-path": options.ms_path})
    target = _one_of({"--target": options.target, "--megatron-path": options.megatron_path})
    needed = options.source is None or options.source_format not in {"auto", "megatron", "msadapter"}
    if metadata is None and needed and options.target_format == "megatron06":
        raise UsageError("--param-map-path is missing", where="the command line", hint="give --param-map-path")
    return str(source), "" if metadata is None else str(metadata), str(target)


def _one_of(given: Mapping[str, Path | None]) -> Path:
    """The one folder that flags of the same meaning give."""
    found = [value for value in given.values() if value is not None]
    if len(found) != 1:
        what = f"{' and '.join(given)} are both given" if found else f"{' or '.join(given)} is missing"
        raise UsageError(what, where="the command line", hint=f"give {' or '.join(given)}")
    return found[0]


def _parallelism(options: argparse.Namespace) -> Parallelism:
    from ckpt2pt.kube.conversion.schema import Parallelism  # noqa: PLC0415

    return Parallelism(
        tensor=options.tp_size,
        pipeline=options.pp_size,
        virtual_pipeline=options.vpp_size,
        data=options.dp_size,
        context=options.cp_size,
    )


def _source(options: argparse.Namespace, path: str) -> Source:
    from ckpt2pt.kube.conversion.schema import MindFormers, Source  # noqa: PLC0415

    config: Path | None = getattr(options, "mindformers_config", None)  # an import has none
    info, word = options.opt_shard_info_path, options.source_format
    if word == "auto" and options.ms_path and options.target_format != "mindspore":
        word = "mindspore"  # as the flag says
    return Source(
        path=path,
        format=source_format_of(word),
        opt_shard_info_path=None if info is None else str(info),
        iteration=options.iteration,
        mindformers=MindFormers(
            config=None if config is None else str(config),
            use_interleaved_weight_layout_mlp=getattr(options, "use_interleaved_weight_layout_mlp", None),
            use_contiguous_weight_layout_attention=getattr(options, "use_contiguous_weight_layout_attention", None),
        ),
    )


def _target(options: argparse.Namespace, path: str) -> Target:
    from ckpt2pt.kube.conversion.schema import (  # noqa: PLC0415
        CONTENTS,
        Degrees,
        HuggingFaceFiles,
        MindSporeFiles,
        Target,
    )

    tokenizer: Path | None = getattr(options, "tokenizer_from", None)  # an import has none
    files = MindSporeFiles(
        format="Safetensors" if options.format == "safetensors" else "Ckpt",
        prefix=options.file_prefix,
        all_replicas=options.generate_all_dp_cp,
        contents=tuple(CONTENTS[word] for word in dict.fromkeys(options.dist_opt_content)),
    )
    return Target(
        path=path,
        format=target_format_of(options.target_format),
        names=NAMES.get(getattr(options, "names", "auto"), "Auto"),  # a plan may list them
        megatron_version=getattr(options, "megatron_version", None),
        transformer_impl=TRANSFORMER_IMPLS[getattr(options, "transformer_impl", "auto")],
        mindspore=files,
        huggingface=HuggingFaceFiles(
            vocab_size=getattr(options, "vocab_size", None),
            rope_scaling_factor=getattr(options, "rope_scaling_factor", None),
            tokenizer_path=None if tokenizer is None else str(tokenizer),
        ),
        trainer="Graph" if getattr(options, "mindformers_trainer", "pynative") == "graph" else "PyNative",
        overwrite=getattr(options, "overwrite", False),
        parallelism=Degrees(
            tensor=options.target_tp_size,
            pipeline=options.target_pp_size,
            virtual_pipeline=options.target_vpp_size,
            expert=getattr(options, "target_ep_size", None),  # an import has none
        ),
        data_parallel=options.target_dp_size,
        zero_consumed_samples=options.zero_consumed_samples,
    )


def stages_of(options: argparse.Namespace, request: AnyRequest) -> tuple[int, ...]:
    """The pipeline stages to work on: ``--stage``, else this pod's completion index, else all."""
    count = request.topology.pipeline
    stages: list[int] | None = options.stage
    index = os.environ.get("JOB_COMPLETION_INDEX", "")
    origin = "--stage"
    if stages is None and index:
        origin = "$JOB_COMPLETION_INDEX"
        if not index.isdecimal():
            raise UsageError(
                f"{origin} is {index!r}", where="the environment", hint="run it in an Indexed Job, or unset it"
            )
        stages = [_stage_of(int(index))]
    if stages is None:
        return tuple(range(count))
    wrong = [stage for stage in stages if not 0 <= stage < count]
    if wrong:
        raise UsageError(
            f"{origin} {wrong[0]} does not exist among {count} stages",
            where="the command line",
            hint=f"give a stage from 0 to {count - 1}, or check {ref('parallelism.pipeline')}",
        )
    return tuple(sorted(set(stages)))


def _stage_of(index: int) -> int:
    """The stage of a completion index: itself, unless the Job does only some stages and lists them."""
    listed = os.environ.get("CKPT2PT_STAGES", "")
    if not listed:
        return index
    try:
        return [int(stage) for stage in listed.split(",")][index]
    except (ValueError, IndexError):
        raise UsageError(
            f"$CKPT2PT_STAGES is {listed!r}, and has no stage for index {index}",
            where="the environment",
            hint="list a stage for each completion index, as 3,7, or unset it",
        ) from None
