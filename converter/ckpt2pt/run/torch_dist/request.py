"""What a conversion into ``torch_dist`` was asked for: one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt2pt.core.names import Rules
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Pace, Request, Verify
from ckpt2pt.run.targets.request import McoreRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class DistRequest:
    """All options of it; None is what the checkpoint itself says.

    ``topology`` divides the work and with it the files, not what is in them: the result has no layout, and a stage of it is
    any part of the layers.
    """

    topology: Topology
    source: Path
    target: Path
    source_format: str = "auto"
    metadata: Path | None = None
    iteration: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    full: bool = True
    zero_samples: bool = False
    rules: Rules = Rules()  # noqa: RUF009 - frozen
    overwrite: bool = False
    verify: Verify = "digest"
    workers: int = 1
    in_process: bool = False
    timeout: float | None = None

    @property
    def pace(self) -> Pace:
        """How its ranks are worked on."""
        return Pace(workers=self.workers, in_process=self.in_process, timeout=self.timeout)

    def identity_options(self) -> dict[str, object]:
        """What decides what is written, for the identity and the manifest."""
        return {
            "mode": "Full" if self.full else "ParamsOnly",
            "format": "TorchDist",
            "tensor": self.topology.tensor,
            "pipeline": self.topology.pipeline,
            "virtualPipeline": 1,
            "zeroConsumedSamples": self.zero_samples,
            "rules": {
                "layer_modules": dict(self.rules.layer_modules),
                "modules": dict(self.rules.modules),
            },
        }


AnyRequest = Request | DistRequest | McoreRequest
