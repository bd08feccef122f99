"""CheckpointConversion documents to begin tests from, and the CRD."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from goldens import REPOSITORY

CRD_PATH = REPOSITORY / "crds" / "checkpointconversions.yaml"
EXAMPLE_PATH = REPOSITORY / "examples" / "conversion.yaml"
ABSENT = object()
HOSTILE_NAMES = ("../../other/x", "..", "a/b", "a?limit=1", "a#b", "a%2fb", "..%2f..%2fother", "A", "a b", "-x", "a\n")
"""What no object is called: most of it would become another path or a query in the URL of a request."""
NAMED_FIELDS: dict[str, Callable[[str], tuple[str, object]]] = {
    "spec.source.volume.persistentVolumeClaim.claimName": lambda name: ("spec.source.volume", claim(name)),
    "spec.metadata.volume.persistentVolumeClaim.claimName": lambda name: ("spec.metadata.volume", claim(name)),
    "spec.target.volume.persistentVolumeClaim.claimName": lambda name: ("spec.target.volume", claim(name)),
    "spec.target.volume.csi.nodePublishSecretRef.name": lambda name: (
        "spec.target.volume", {"csi": {"driver": "d", "nodePublishSecretRef": {"name": name}}},
    ),
    "spec.startAfter.name": lambda name: ("spec.startAfter", {"apiVersion": "batch/v1", "kind": "Job", "name": name}),
    "spec.follow.until.name": lambda name: (
        "spec.follow", {"until": {"apiVersion": "batch/v1", "kind": "Job", "name": name}},
    ),
    "spec.workers.imagePullSecrets[0].name": lambda name: ("spec.workers.imagePullSecrets", [{"name": name}]),
    "spec.workers.schedulerName": lambda name: ("spec.workers.schedulerName", name),
    "spec.workers.priorityClassName": lambda name: ("spec.workers.priorityClassName", name),
    "spec.workers.runtimeClassName": lambda name: ("spec.workers.runtimeClassName", name),
    "spec.workers.queueName": lambda name: ("spec.workers.queueName", name),
}  # fmt: skip
"""Every field that names an object -> the change that gives it that name."""


@cache
def crd() -> dict[str, Any]:
    """The CustomResourceDefinition."""
    found: dict[str, Any] = yaml.safe_load(CRD_PATH.read_bytes())
    return found


def root_schema() -> dict[str, Any]:
    """The schema of the whole object."""
    found: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def minimal() -> dict[str, Any]:
    """The shortest document: 4 layers, everything on one claim."""
    return {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": "demo"},
        "spec": {
            "model": {"numLayers": 4},
            "source": {"volume": claim("training"), "path": "ms"},
            "metadata": {"path": "pt_meta"},
            "target": {"path": "out"},
        },
    }


def claim(name: str) -> dict[str, Any]:
    """A volume."""
    return {"persistentVolumeClaim": {"claimName": name}}


def changed(*changes: tuple[str, object]) -> dict[str, Any]:
    """The minimal document with fields set, or taken out by ``ABSENT``: ``("spec.model.numLayers", 8)``."""
    document = deepcopy(minimal())
    for path, value in changes:
        node = document
        *parents, leaf = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        if value is ABSENT:
            node.pop(leaf, None)
        else:
            node[leaf] = deepcopy(value)
    return document


def write(path: Path, document: dict[str, Any]) -> Path:
    """A document as a file."""
    path.write_text(yaml.safe_dump(document))
    return path
