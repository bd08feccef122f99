"""A golden checkpoint as a CheckpointConversion, what came of it, and what the command makes of the same set."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from conversions import flags_for, topology_of
from harness.kubectl import Kubectl
from harness.machine import ClusterError, wait_until
from harness.pods import host_path
from statuses import check_status

KIND = "checkpointconversion"
OVER = frozenset({"Succeeded", "Failed", "Cancelled", "Planned"})


def digests(folder: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file that Megatron reads."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.suffix in {".pt", ".txt"}
    }


def by_command(folder: Path, target: Path, *, full: bool) -> dict[str, str]:
    """The digests of what ``ckpt2pt convert`` makes of a set."""
    words = [sys.executable, "-m", "ckpt2pt", "convert", *flags_for(folder, target, full=full)]
    subprocess.run(words, check=True, capture_output=True)
    return digests(target)


def owner_of(folder: Path) -> int:
    """Who may read a golden set: its files are as MindSpore left them, readable by their owner alone."""
    return folder.stat().st_uid


def document(folder: Path, volume: Path, *, full: bool = True, name: str = "golden", **spec: Any) -> dict[str, Any]:
    """The conversion of a golden set: source as it lies there, result on a volume of its own; ``spec`` adds and replaces."""
    cut, suffix = topology_of(folder), "" if full else "_params"
    return {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": name},
        "spec": {
            "mode": "Full" if full else "ParamsOnly",
            "model": {"numLayers": cut.num_layers, "noopLayers": sorted(cut.noop)},
            "parallelism": {
                "tensor": cut.tensor,
                "pipeline": cut.pipeline,
                "virtualPipeline": cut.virtual,
                "data": cut.data,
            },
            "source": {"volume": host_path(folder), "path": f"ms{suffix}"},
            "metadata": {"path": f"pt_meta{suffix}"},
            "target": {"volume": host_path(volume), "path": "out"},
            "workers": {"security": {"runAsUser": owner_of(folder)}},
            **spec,
        },
    }


def status(namespace: Kubectl, name: str = "golden") -> dict[str, Any]:
    """The status of a conversion, empty before the operator has seen it."""
    found: dict[str, Any] = namespace.get(KIND, name).get("status", {})
    return found


def reach(namespace: Kubectl, phase: str, name: str = "golden", *, seconds: float = 120) -> dict[str, Any]:
    """Wait for a phase; the status then.  Another end than the one waited for fails at once, with the whole story."""
    seen: dict[str, Any] = {}

    def there() -> bool:
        seen.clear()
        seen.update(status(namespace, name))
        return seen.get("phase") in {phase, *OVER}

    try:
        wait_until(f"{name} to be {phase}", there, seconds=seconds)
        assert seen["phase"] == phase
    except Exception as error:
        raise AssertionError(f"{name} is {seen.get('phase')}, not {phase}\n{namespace.story(KIND, name)}") from error
    return seen


def blocker(namespace: Kubectl, reason: str, *, kind: str = "Degraded", seconds: float = 60) -> dict[str, Any]:
    """Wait until a condition of the golden conversion gives this reason; the status then."""
    seen: dict[str, Any] = {}

    def there() -> bool:
        seen.clear()
        seen.update(status(namespace))
        return any(c["type"] == kind and c["reason"] == reason for c in seen.get("conditions", ()))

    try:
        wait_until(f"{kind} to be {reason}", there, seconds=seconds)
    except ClusterError as error:
        raise AssertionError(f"{error}\n{namespace.story(KIND, 'golden')}") from error
    check_status(seen)
    return seen


def reported(found: dict[str, Any], kind: str) -> tuple[str, str]:
    """Status and reason of a condition."""
    [condition] = [condition for condition in found["conditions"] if condition["type"] == kind]
    return condition["status"], condition["reason"]


def message(found: dict[str, Any], kind: str) -> str:
    """The message of a condition."""
    [condition] = [condition for condition in found["conditions"] if condition["type"] == kind]
    return str(condition["message"])


def events(namespace: Kubectl, name: str = "golden") -> list[str]:
    """Reasons of the operator's events about a conversion, oldest first."""
    words = ("events", f"--field-selector=involvedObject.name={name},involvedObject.kind=CheckpointConversion")
    found = namespace.get(*words)["items"]
    # Times have a grain of one second; versions tell what came first within it.
    found.sort(key=lambda event: (event["firstTimestamp"], int(event["metadata"]["resourceVersion"])))
    return [event["reason"] for event in found]
