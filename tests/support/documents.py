"""CheckpointConversion documents to begin tests from, and the CRD."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from goldens import REPOSITORY

CRD_PATH = REPOSITORY / "crds" / "checkpointconversions.yaml"
EXAMPLE_PATH = REPOSITORY / "examples" / "conversion.yaml"
ABSENT = object()


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
