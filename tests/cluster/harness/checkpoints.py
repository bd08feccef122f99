"""Checkpoints that keep workers busy or waiting, so that something can happen meanwhile."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ckpt2pt.core.topology import Topology
from harness.golden import document, owner_of
from harness.pods import host_path
from synthetic import Model, build


class Unfinished:
    """A golden set on a volume, whose last rank has not saved yet: workers wait for it as for any straggler."""

    def __init__(self, folder: Path, volume: Path) -> None:
        self.folder, self.volume = folder, volume
        shutil.copytree(folder / "pt_meta", volume / "pt_meta")
        shutil.copytree(folder / "ms", volume / "ms")
        ranks = sorted((volume / "ms").iterdir(), key=lambda path: int(path.name.removeprefix("rank_")))
        self.last = int(ranks[-1].name.removeprefix("rank_"))
        self._saved = volume / "not-yet"
        ranks[-1].rename(self._saved)
        self._own(volume)

    @property
    def target(self) -> Path:
        """What the conversion writes."""
        return self.volume / "out"

    def document(self, **spec: Any) -> dict[str, Any]:
        """Its conversion."""
        volume = host_path(self.volume)
        return document(
            self.folder, self.volume, source={"volume": volume, "path": "ms"}, target={"path": "out"}, **spec
        )

    def finish(self, *, spoilt: tuple[bytes, bytes] | None = None) -> None:
        """The last rank saves; ``spoilt`` puts the second text in the place of the first."""
        partial = self.volume / "saving"
        place = self.volume / "ms" / f"rank_{self.last}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self._saved, partial)
        for file in partial.iterdir():
            if spoilt:
                mode = file.stat().st_mode
                file.chmod(0o600)
                file.write_bytes(file.read_bytes().replace(*spoilt))
                file.chmod(mode)
        self._own(partial)
        partial.rename(place)

    def _own(self, folder: Path) -> None:
        owner = owner_of(self.folder)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, owner, -1)


class Large:
    """Two stages of 100 MB each, converted by workers that get a tenth of a processor."""

    def __init__(self, volume: Path) -> None:
        self.volume = volume
        self.topology = Topology(num_layers=4, pipeline=2)
        build(volume, Model(topology=self.topology, hidden=1024, ffn=2816))
        for path in (volume, *volume.rglob("*")):
            os.chown(path, 0, -1)

    @property
    def target(self) -> Path:
        """What the conversion writes."""
        return self.volume / "out"

    def document(self, **spec: Any) -> dict[str, Any]:
        """Its conversion, ``large``."""
        return {
            "apiVersion": "ckpt2pt.dev/v1alpha1",
            "kind": "CheckpointConversion",
            "metadata": {"name": "large"},
            "spec": {
                "model": {"numLayers": self.topology.num_layers},
                "parallelism": {"pipeline": 2},
                "source": {"volume": host_path(self.volume), "path": "ms"},
                "metadata": {"path": "pt_meta"},
                "target": {"path": "out"},
                "workers": {
                    "processes": 1,
                    "security": {"runAsUser": 0},
                    "resources": {"limits": {"cpu": "100m", "memory": "256Mi"}},
                },
                **spec,
            },
        }

    def partials(self) -> list[Path]:
        """Files that are being written, under their temporary names."""
        return sorted(self.target.rglob("*.partial"))

    def is_writing(self) -> bool:
        """Whether payload has gone into one of them."""
        return any(path.stat().st_blocks * 512 > 1 << 20 for path in self.partials())
