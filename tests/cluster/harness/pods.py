"""Pods as the tests write them: as restricted as a cluster asks for, run to their end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.kubectl import Kubectl
from harness.machine import ClusterError, wait_until

HARDENED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
NON_ROOT = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def host_path(folder: Path) -> dict[str, Any]:
    """A volume: a folder of this machine."""
    return {"hostPath": {"path": str(folder), "type": "Directory"}}


def pod(name: str, image: str, *args: str, command: list[str] | None = None, **spec: Any) -> dict[str, Any]:
    """A pod that PodSecurity's ``restricted`` admits."""
    container: dict[str, Any] = {"name": "main", "image": image, "args": [*args], "securityContext": HARDENED}
    if command:
        container["command"] = command
    container |= spec.pop("container", {})
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": NON_ROOT,
            "terminationGracePeriodSeconds": 1,
            "containers": [container],
            **spec,
        },
    }


def finished(kubectl: Kubectl, manifest: dict[str, Any], *, seconds: float = 90) -> tuple[int, str]:
    """Create a pod and wait for its end: exit code and log."""
    name = manifest["metadata"]["name"]
    kubectl.create(manifest)
    state: dict[str, Any] = {}

    def ended() -> bool:
        statuses = kubectl.get("pod", name)["status"].get("containerStatuses", [{}])
        state.update(statuses[0].get("state", {}))
        return "terminated" in state

    try:
        wait_until(f"pod {name} to end", ended, seconds=seconds)
    except ClusterError as error:
        raise ClusterError(f"{error}\n{kubectl('describe', 'pod', name)}") from error
    return state["terminated"]["exitCode"], kubectl("logs", name)


def processes_of(pod: Mapping[str, Any], program: str) -> list[int]:
    """Processes of a pod on this machine that run a program, the first one first."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                groups, words = (folder / "cgroup").read_text(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if pod["metadata"]["uid"] in groups and program.encode() in words:
                found.append(int(folder.name))
    return sorted(found)
