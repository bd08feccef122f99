"""Trainings on the cluster: an Indexed Job whose ranks save as MindSpore does (support/trainer.py), and what waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trainer
from harness.golden import document, owner_of
from harness.pods import HARDENED, host_path

RANKS = 4
AFTER = {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}


def training(
    image: str, folder: Path, volume: Path, *, steps: str = "2", pause: float = 0.5, ending: str = "", asks: str = ""
) -> dict[str, Any]:
    """A training of the four ranks of a golden set, which saves below ``volume/ms`` at these steps.

    ``asks`` is the ConfigMap of the conversion that is to follow it.
    """
    annotations = {"ckpt2pt.dev/convert-on-success": asks} if asks else {}
    words = ["/volumes/data/ms", "/volumes/model", steps, str(pause), *([ending] if ending else [])]
    container = {
        "name": "train",
        "image": image,
        "command": ["python3", "-c", Path(trainer.__file__).read_text(encoding="utf-8")],
        "args": words,
        "securityContext": HARDENED,
        "volumeMounts": [
            {"name": "data", "mountPath": "/volumes/data"},
            {"name": "model", "mountPath": "/volumes/model", "readOnly": True},
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsUser": owner_of(folder)},
        "containers": [container],
        "volumes": [{"name": "data", **host_path(volume)}, {"name": "model", **host_path(folder / "ms")}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "pretrain", "annotations": annotations},
        "spec": {
            "completionMode": "Indexed",
            "completions": RANKS,
            "parallelism": RANKS,
            "backoffLimit": 0,
            "template": {"spec": pod},
        },
    }


def waiting(folder: Path, volume: Path, *, after: dict[str, str] | None = AFTER, **spec: Any) -> dict[str, Any]:
    """The conversion of what that training saves."""
    spec = {"source": {"volume": host_path(volume), "path": "ms"}, **spec}
    spec.setdefault("metadata", {"volume": host_path(folder), "path": "pt_meta"})
    if after:
        spec["startAfter"] = after
    return document(folder, volume, **spec)
