"""Objects of a megabyte, or of thousands of levels, from somebody who may create conversions: the operator serves the others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from documents import changed
from harness.cluster import Cluster
from harness.kubectl import Kubectl
from harness.machine import wait_until
from harness.process import Process

MOST = 256 << 20
"""Bytes of memory; the chart allows 512 MiB."""
SHAPES = {
    "flat": "[" + ",".join(["{}"] * 440_000) + "]",
    "deep": "[" * 5000 + "]" * 5000,
    "wide": "{" + ",".join(f'"a{number}":""' for number in range(20_000)) + "}",
}


def of_shape(shape: str, number: int) -> str:
    """The text of a conversion with that inside."""
    after = {"apiVersion": "batch/v1", "kind": "Job", "name": "never"}
    document = changed(("spec.startAfter", after), ("spec.workers", {"podOverrides": {"spec": {"x": "HERE"}}}))
    document["metadata"] = {"name": f"{shape}-{number}"}
    return json.dumps(document).replace('"HERE"', SHAPES[shape])


def phases(namespace: Kubectl) -> dict[str, str]:
    """Name -> phase and reason, without asking for the objects themselves."""
    columns = "--output=custom-columns=A:.metadata.name,B:.status.phase,C:.status.conditions[?(@.type=='Ready')].reason"
    lines = namespace("get", "ckc", columns, "--no-headers", seconds=300).splitlines()
    return {name: f"{phase} {reason}" for name, phase, reason in (line.split() for line in lines)}


def most_memory(process: Process) -> int:
    """Bytes that it has had at most."""
    assert process.child
    status = Path(f"/proc/{process.child.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) << 10


@pytest.fixture
def process(crd: None, cluster: Cluster, namespace: Kubectl, tmp_path: Path) -> Iterator[Process]:
    """An operator that is a process; no worker of it ever starts."""
    found = Process(
        cluster.kubeconfig, str(namespace.namespace), "none:1", tmp_path / "operator.log", ("--allow=hostPath",)
    )
    yield found
    found.kill()


@pytest.mark.timeout(900, func_only=True)
def test_large_objects_are_refused_and_cost_nobody_anything(process: Process, namespace: Kubectl) -> None:
    def add(shape: str, *numbers: int) -> None:
        for number in numbers:
            namespace("create", "--validate=ignore", "--filename", "-", stdin=of_shape(shape, number))

    add("flat", *range(20))
    add("deep", 0)
    process.start()
    add("deep", 1)
    add("wide", 0)
    add("flat", 20)
    refused = "Failed InvalidSpec"
    wait_until("all to be refused", lambda: set(phases(namespace).values()) == {refused}, seconds=300)
    assert len(phases(namespace)) == 24
    assert most_memory(process) < MOST
    process.kill()
    process.start()
    ours: dict[str, Any] = changed(("spec.source.volume", {"hostPath": {"path": "/srv"}}))
    ours["metadata"] = {"name": "ours"}
    namespace.create(ours)
    wait_until("the Job of somebody else", lambda: namespace.exists("job", "ours-1"), seconds=60)
    assert most_memory(process) < MOST
    assert process.ended() is None
    reported = json.loads(namespace("get", "--raw", where(namespace, "flat-0"), seconds=60))
    assert len(reported["spec"]["workers"]["podOverrides"]["spec"]["x"]) == 440_000, (
        "its status was written without its spec"
    )
    [why] = [c["message"] for c in reported["status"]["conditions"] if c["type"] == "Accepted"]
    assert "spec.workers.podOverrides" in why
    assert "keep it to 65,536 bytes" in why


def where(namespace: Kubectl, name: str) -> str:
    """The path of a conversion."""
    return f"/apis/ckpt2pt.dev/v1alpha1/namespaces/{namespace.namespace}/checkpointconversions/{name}"
