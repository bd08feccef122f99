"""What a conversion by global tensors was asked for: one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ckpt2pt.core.names import Rules
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Pace, Request, Verify
from ckpt2pt.formats.checkpoint import Checkpoint, Selection
from ckpt2pt.formats.huggingface.config import Choices
from ckpt2pt.formats.mindformers.flags import Flags
from ckpt2pt.formats.mindformers.write import Trainer
from ckpt2pt.formats.registry import read
from ckpt2pt.formats.repaired import Repairable, find_repairable
from ckpt2pt.formats.safetensors import SHARD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRequest:
    """Where from and where to; None is what the checkpoint or the metadata says.

    ``metadata`` is a ``pt_meta`` folder, or the launch script (or a YAML description) of the Megatron run to come.
    """

    source: Path
    target: Path
    source_format: str = "auto"
    metadata: Path | None = None
    iteration: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    topology: Topology
    """Tensor and pipeline parallel size of the result; the layers are not counted yet."""
    target_expert: int | None = None
    """Expert parallel size of the run to come; None is that of the source."""
    num_layers: int | None = None
    noop: frozenset[int] | None = None
    full: bool = True
    zero_samples: bool = False
    mindformers: Flags = Flags()  # noqa: RUF009 - frozen
    """What is said of the fused weights of a MindFormers source, or of the result."""
    rules: Rules = Rules()  # noqa: RUF009 - frozen
    overwrite: bool = False
    verify: Verify = "digest"
    workers: int = 1
    in_process: bool = False
    timeout: float | None = None
    reread: bool = False
    found: Checkpoint | None = field(default=None, compare=False, repr=False)
    """The source, where its headers had to be read for what is asked for."""

    @property
    def pace(self) -> Pace:
        """How its ranks are worked on."""
        return Pace(workers=self.workers, in_process=self.in_process, timeout=self.timeout, reread=self.reread)

    def read(self) -> Checkpoint:
        """The source as far as its headers, which are read once; of a large one only types and shapes (``Checkpoint.locate``)."""
        return self.found or read(
            self.source,
            source_format=self.source_format,
            tensor=self.tensor,
            pipeline=self.pipeline,
            iteration=self.iteration,
            rules=self.rules,
            weights_alone=not self.full,
            mindformers=Flags() if isinstance(self, MindFormersRequest) else self.mindformers,
            described=True,
        )

    def identity_options(self) -> dict[str, object]:
        """What decides what is written, whatever the target."""
        return {
            "mode": "Full" if self.full else "ParamsOnly",
            "tensor": self.topology.tensor,
            "pipeline": self.topology.pipeline,
            "zeroConsumedSamples": self.zero_samples,
            "rules": {
                "layer_modules": dict(self.rules.layer_modules),
                "modules": dict(self.rules.modules),
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class McoreRequest(TargetRequest):
    """All options of a conversion into the ``torch`` format of Megatron-LM 0.7 to 0.19.

    ``release`` is (0, 19) of 0.19, ``data`` the data x context parallel size of the run to come.
    """

    target_virtual: int | None = None
    layers_per_stage: tuple[int, ...] | None = None
    data: int = 1
    release: tuple[int, int] = (0, 19)
    names: Literal["auto", "mcore", "legacy"] = "auto"
    transformer: Literal["auto", "local", "transformer_engine"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistRequest(TargetRequest):
    """All options of a conversion into ``torch_dist``.

    ``topology`` divides the work and with it the files, not what is in them: the result has no layout, and a stage of it is
    any part of the layers.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairRequest(TargetRequest):
    """All options of a conversion of what MSAdapter wrote into files of torch: the layout stays, and whatever the model is."""

    def read(self) -> Checkpoint:
        """The source by its folders and the arguments of its first rank."""
        return self.found or self.source_found().checkpoint()

    def source_found(self) -> Repairable:
        """The folders of its ranks."""
        return find_repairable(
            self.source,
            Selection(tensor=self.tensor, pipeline=self.pipeline, iteration=self.iteration, rules=self.rules),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceRequest(TargetRequest):
    """All options of a conversion into weights for Hugging Face transformers; ``full`` is false, as optimizer state has no place there.

    ``topology`` divides the files among stages.  ``tokenizer`` is a folder with the files of one, which are copied.
    """

    choices: Choices = Choices()  # noqa: RUF009 - frozen
    tokenizer: Path | None = None
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class MindFormersRequest(TargetRequest):
    """All options of a conversion into weights for MindFormers; ``full`` is false, as optimizer state is not written.

    ``topology`` divides the files among stages; ``mindformers`` says how the training to come orders the rows of fused weights.
    """

    trainer: Trainer = "pynative"
    shard_bytes: int = SHARD_BYTES


AnyRequest = Request | McoreRequest | DistRequest | RepairRequest | HuggingFaceRequest | MindFormersRequest
