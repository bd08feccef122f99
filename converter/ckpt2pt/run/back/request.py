"""What an import was asked for: one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ckpt2pt.core.moves import OPTIM_KINDS
from ckpt2pt.core.names import Rules
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Pace, Verify


@dataclass(frozen=True, slots=True, kw_only=True)
class BackRequest:
    """All options of ``ckpt2pt import``; None is what the checkpoint itself says.

    ``target_tensor`` and its like are the degrees of the result where they are others.
    ``contents`` are the kinds of ``distrib_optim.pt`` to be taken; ``copies`` writes a file for every data- and
    context-parallel rank instead of the first alone.
    """

    source: Path
    target: Path
    iteration: int | None = None
    maps: Path | None = None
    num_layers: int | None = None
    tensor: int | None = None
    pipeline: int | None = None
    virtual: int | None = None
    data: int = 1
    context: int = 1
    target_tensor: int | None = None
    target_pipeline: int | None = None
    target_virtual: int | None = None
    noop: frozenset[int] | None = None
    layers_per_stage: tuple[int, ...] | None = None
    full: bool = True
    contents: tuple[str, ...] = OPTIM_KINDS
    prefix: str = "network"
    format: Literal["ckpt", "safetensors"] = "ckpt"
    copies: bool = False
    rules: Rules = Rules()  # noqa: RUF009 - frozen
    overwrite: bool = False
    verify: Verify = "digest"
    pace: Pace = Pace()  # noqa: RUF009 - frozen

    @property
    def workers(self) -> int:
        """Ranks imported at a time."""
        return self.pace.workers

    def layout(self, cut: Topology) -> Topology:
        """How the result is laid out."""
        return replace(
            cut,
            tensor=self.target_tensor or cut.tensor,
            pipeline=self.target_pipeline or cut.pipeline,
            virtual=self.target_virtual or cut.virtual,
            layers_per_stage=cut.layers_per_stage if self.target_pipeline is self.target_virtual is None else None,
        )

    def identity_options(self, cut: Topology) -> dict[str, object]:
        """What decides what is written, for the identity and the manifest; ``cut`` is the layout of the result."""
        return {
            "direction": "import",
            "mode": "Full" if self.full else "ParamsOnly",
            "format": self.format,
            "prefix": self.prefix,
            "contents": list(self.contents),
            "copies": self.copies,
            "numLayers": cut.num_layers,
            "noopLayers": sorted(cut.noop),
            "layersPerStage": list(cut.layers_per_stage) if cut.layers_per_stage else None,
            "tensor": cut.tensor,
            "pipeline": cut.pipeline,
            "virtualPipeline": cut.virtual,
            "data": cut.data,
            "context": cut.context,
            "rules": {
                "layer_modules": dict(self.rules.layer_modules),
                "modules": dict(self.rules.modules),
            },
        }
