"""Which options a conversion can use, by the formats of its source and its target: what is given and decides nothing is refused.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from ckpt2pt.errors import UsageError, ref
from ckpt2pt.kube.conversion.schema import MEGATRON, MindSporeFiles, SourceFormat, Spec, TargetFormat

Framework = Literal["MindSpore", "Megatron", "MindFormers", "HuggingFace"]

TARGETS: Mapping[TargetFormat, str] = {
    "Megatron06": "Megatron-LM 0.6",
    "Megatron": "Megatron-LM 0.7 to 0.19 (torch)",
    "TorchDist": "torch_dist, which has no layout of its own",
    "MindSpore": "MindSpore",
    "Torch": "Torch, which keeps the layout and everything else",
    "Safetensors": "safetensors of Hugging Face transformers, which is weights alone and has no layout of its own",
    "MindFormers": "MindFormers, which is weights alone, and is loaded at any parallel sizes",
}
"""The formats of results, in words."""


FROM_MINDFORMERS = frozenset({"Megatron", "TorchDist", "Safetensors"})
"""The results that are made of a MindFormers checkpoint."""
FROM_HUGGINGFACE = frozenset({"Megatron", "TorchDist", "Safetensors", "MindFormers"})
"""The results that are made of a model for transformers."""
FOLLOWED = frozenset({"Megatron", "TorchDist"})
"""Results that each new checkpoint of a MindFormers training becomes: those that have a folder for each iteration."""


class _Use(NamedTuple):
    """Which results an option decides something of, by the framework of the source."""

    given: Callable[[Spec], bool]
    by_source: Mapping[Framework, frozenset[str]]


def _uses(given: Callable[[Spec], bool], targets: str, *, from_megatron: str | None = None) -> _Use:
    """``from_megatron`` are the results where they are others of a Megatron source, and of those that are read as one."""
    megatron = frozenset((targets if from_megatron is None else from_megatron).split())
    return _Use(
        given,
        {
            "MindSpore": frozenset(targets.split()),
            "Megatron": megatron,
            "MindFormers": megatron & FROM_MINDFORMERS,
            "HuggingFace": megatron & FROM_HUGGINGFACE,
        },
    )


def _of_mindformers(given: Callable[[Spec], bool]) -> _Use:
    """An option that says what nothing in a checkpoint of MindFormers tells, be it source or result."""
    result = frozenset({"MindFormers"})
    return _Use(
        given, {"MindFormers": FROM_MINDFORMERS, "Megatron": result, "MindSpore": result, "HuggingFace": result}
    )


_FILES = MindSporeFiles()
_BUT_TORCH = "Megatron06 Megatron TorchDist MindSpore"
USES: Mapping[str, _Use] = {
    "mode":                     _uses(lambda spec: spec.mode != "Full", f"{_BUT_TORCH} Safetensors MindFormers"),
    "target.parallelism.tensor": _uses(lambda spec: spec.target.parallelism.tensor is not None, _BUT_TORCH),
    "target.parallelism.pipeline": _uses(lambda spec: spec.target.parallelism.pipeline is not None, _BUT_TORCH),
    "model.layersPerStage":     _uses(lambda spec: bool(spec.model.layers_per_stage), "Megatron06 Megatron MindSpore"),
    # 1 is what a document means that says nothing.
    "parallelism.virtualPipeline": _uses(
        lambda spec: (spec.parallelism.virtual_pipeline or 1) > 1, "Megatron06 Megatron MindSpore"
    ),
    "parallelism.data":         _uses(
        lambda spec: (spec.parallelism.data or 1) > 1, "Megatron06 MindSpore", from_megatron="MindSpore"
    ),
    "parallelism.context":      _uses(
        lambda spec: (spec.parallelism.context or 1) > 1, "Megatron06 MindSpore", from_megatron="MindSpore"
    ),
    "source.optShardInfoPath":  _uses(
        lambda spec: spec.source.opt_shard_info_path is not None, "Megatron06 MindSpore", from_megatron=""
    ),
    "source.mindformers.config": _of_mindformers(lambda spec: spec.source.mindformers.config is not None),
    "source.mindformers.useInterleavedWeightLayoutMlp": _of_mindformers(
        lambda spec: spec.source.mindformers.use_interleaved_weight_layout_mlp is not None
    ),
    "source.mindformers.useContiguousWeightLayoutAttention": _of_mindformers(
        lambda spec: spec.source.mindformers.use_contiguous_weight_layout_attention is not None
    ),
    "target.trainer":           _uses(lambda spec: spec.target.trainer != "PyNative", "MindFormers"),
    "target.names":             _uses(lambda spec: spec.target.names != "Auto", "Megatron"),
    "target.transformerImpl":   _uses(lambda spec: spec.target.transformer_impl != "Auto", "Megatron"),
    "target.megatronVersion":   _uses(lambda spec: spec.target.megatron_version is not None, "Megatron"),
    "target.parallelism.virtualPipeline": _uses(
        lambda spec: spec.target.parallelism.virtual_pipeline is not None, "Megatron06 Megatron MindSpore"
    ),
    "target.parallelism.expert": _uses(lambda spec: spec.target.parallelism.expert is not None, "Megatron TorchDist"),
    "target.dataParallel":      _uses(lambda spec: spec.target.data_parallel is not None, "Megatron06 Megatron"),
    "target.zeroConsumedSamples": _uses(
        lambda spec: spec.target.zero_consumed_samples, "Megatron06 Megatron TorchDist"
    ),
    "target.mindspore.format":  _uses(lambda spec: spec.target.mindspore.format != _FILES.format, "MindSpore"),
    "target.mindspore.prefix":  _uses(lambda spec: spec.target.mindspore.prefix != _FILES.prefix, "MindSpore"),
    "target.mindspore.allReplicas": _uses(lambda spec: spec.target.mindspore.all_replicas, "MindSpore"),
    "target.mindspore.contents": _uses(lambda spec: spec.target.mindspore.contents != _FILES.contents, "MindSpore"),
    "target.huggingface.vocabSize": _uses(lambda spec: spec.target.huggingface.vocab_size is not None, "Safetensors"),
    "target.huggingface.ropeScalingFactor": _uses(
        lambda spec: spec.target.huggingface.rope_scaling_factor is not None, "Safetensors"
    ),
    "target.huggingface.tokenizerPath": _uses(
        lambda spec: spec.target.huggingface.tokenizer_path is not None, "Safetensors"
    ),
}  # fmt: skip
"""By field.  Fields that are not listed decide something of every result, or have to agree with what is found."""


def framework_of(source: SourceFormat) -> Framework | None:
    """The framework of a source as it is said; None where its reader finds out."""
    if source == "Auto":
        return None
    if source == "MindFormers" or source == "HuggingFace":
        return source
    return "Megatron" if source in MEGATRON else "MindSpore"


def unused(spec: Spec, source: Framework | None) -> Iterator[tuple[str, str]]:
    """The fields that are given and decide nothing, each with why; without ``source`` what no source would use."""
    target = spec.target.format
    for field, use in USES.items():
        used = [targets for framework, targets in use.by_source.items() if source in {None, framework}]
        if not use.given(spec) or any(target in targets for targets in used):
            continue
        what = f"a result of the format {TARGETS[target]}"
        if source and target in frozenset().union(*use.by_source.values()):
            what += f", made of a {source} checkpoint"
        yield field, f"is given, and decides nothing of {what}"


def check_used(spec: Spec, source: Framework | None) -> None:
    """Raise :class:`UsageError` for the first of them."""
    for field, why in unused(spec, source):
        raise UsageError(f"{ref(field)} {why}", where=ref("spec"), hint="leave it out", field=field)
