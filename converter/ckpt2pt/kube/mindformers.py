"""What a spec says of a MindFormers source, and which results are not made of one."""

from __future__ import annotations

from ckpt2pt.errors import UsageError, aside
from ckpt2pt.formats.mindformers.flags import Flags
from ckpt2pt.kube.conversion.schema import Spec
from ckpt2pt.kube.conversion.usable import TARGETS


def flags_of(spec: Spec) -> Flags:
    """What is said of the fused weights."""
    said = spec.source.mindformers
    return Flags.of(said.config, said.use_interleaved_weight_layout_mlp, said.use_contiguous_weight_layout_attention)


def refuse_target(spec: Spec, found: str) -> None:
    """Refuse a result of a format that is not made of a source that was ``found``, or is said, to be of MindFormers."""
    if found == "mindformers" or spec.source.format == "MindFormers":
        raise UsageError(
            f"the source is a MindFormers checkpoint, of which no result for {TARGETS[spec.target.format]} is made",
            where=spec.source.path,
            hint=f"choose Megatron, TorchDist or Safetensors{aside('target.format')}",
            field="target.format",
        )
