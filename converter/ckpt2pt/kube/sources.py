"""What a spec says of its source or how that looks: its format, results that are not made of it, and of MindFormers when it is complete."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.core.foldernames import mindformers_iteration_of
from ckpt2pt.errors import Ckpt2ptError, UsageError, aside
from ckpt2pt.formats.mindformers.flags import Flags
from ckpt2pt.formats.mindformers.legacy import is_legacy
from ckpt2pt.formats.mindformers.ready import Iterations
from ckpt2pt.kube.conversion.schema import SourceFormat, Spec
from ckpt2pt.kube.conversion.usable import FOLLOWED, TARGETS


def flags_of(spec: Spec) -> Flags:
    """What is said of the fused weights."""
    said = spec.source.mindformers
    return Flags.of(said.config, said.use_interleaved_weight_layout_mlp, said.use_contiguous_weight_layout_attention)


def refuse_target(spec: Spec, found: str) -> None:
    """Refuse a result of a format that is not made of a source that was ``found``, or is said, to be of MindFormers or transformers."""
    kinds = {"mindformers": "a MindFormers checkpoint", "huggingface": "a model for transformers"}
    kind = kinds.get(found) or kinds.get(spec.source.format.lower())
    if kind:
        raise UsageError(
            f"the source is {kind}, of which no result for {TARGETS[spec.target.format]} is made",
            where=spec.source.path,
            hint=f"choose Megatron, TorchDist or Safetensors{aside('target.format')}",
            field="target.format",
        )


def is_mindformers(spec: Spec) -> bool:
    """Whether the source is of MindFormers."""
    return looks_like(spec, "MindFormers")


def looks_like(spec: Spec, wanted: SourceFormat) -> bool:
    """Whether the source has this format, as it is said, or as it looks where that is not said."""
    if spec.source.format != "Auto":
        return spec.source.format == wanted
    from ckpt2pt.formats.registry import detect  # noqa: PLC0415 - only where it is not said

    try:
        return detect(Path(spec.source.path)) == wanted.lower()
    except Ckpt2ptError:  # nothing is there yet, or its reader says what is wrong
        return False


def may_follow(spec: Spec) -> bool:
    """Whether a training is followed on its way to a result that is made by global tensors."""
    return spec.target.format in FOLLOWED and is_mindformers(spec)


def iterations_of(spec: Spec) -> Iterations | None:
    """What looks for the iteration that is asked for, or for the newest; None where the path is that of one, or of ranks."""
    root = Path(spec.source.path)
    if mindformers_iteration_of(root.name) is not None or not is_mindformers(spec) or is_legacy(root):
        return None
    return Iterations(
        root,
        weights_alone=spec.mode == "ParamsOnly" or spec.target.format == "Safetensors",
        settle_seconds=spec.readiness.settle_seconds,
        wanted=spec.source.iteration,
    )
