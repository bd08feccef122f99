"""The operator as a platform engineer installs it: the project's chart, by real helm, with the images of this checkout."""

from __future__ import annotations

import json
import os
import re
import signal
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.images import REPOSITORY
from harness.kubectl import Kubectl
from harness.machine import ClusterError, run, wait_until
from harness.pods import processes_of
from helm import helm

CHART = REPOSITORY / "charts" / "ckpt2pt"
OPERATOR = "app.kubernetes.io/component=operator"
Values = Mapping[str, Any]
ALLOWED = ("hostPath", "root")
"""What most conversions of these tests need: folders of this machine, and files as their owner left them."""


def image_values(reference: str) -> dict[str, str]:
    """An image as the chart's values name it."""
    registry, _, rest = reference.partition("/")
    repository, _, tag = rest.rpartition(":")
    return {"registry": registry, "repository": repository, "tag": tag}


def merged(base: Values, more: Values) -> dict[str, Any]:
    """``base`` with the fields of ``more``, as helm merges them."""
    found = dict(base)
    for name, value in more.items():
        inner = found.get(name)
        found[name] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return found


@dataclass(slots=True)
class Release:
    """One installation of the chart, in a namespace of its own; ``major`` is helm's version."""

    cluster: Kubectl
    images: tuple[str, str]
    major: str = "v4"
    name: str = "ckpt2pt"
    chart: Path = CHART
    namespace: str = field(default_factory=lambda: f"system-{uuid.uuid4().hex[:6]}")
    allows: tuple[str, ...] = ALLOWED
    """Permissions of ``worker.allow`` that it is installed with; an empty tuple for the chart's own."""
    installed: bool = False

    @property
    def kubectl(self) -> Kubectl:
        """kubectl in the namespace of the operator."""
        return self.cluster.within(self.namespace)

    @property
    def deployment(self) -> str:
        """The operator's Deployment, as kubectl names it."""
        return f"deployment/{self.name}-operator"

    @property
    def account(self) -> str:
        """The operator's service account, as RBAC names its user."""
        return f"system:serviceaccount:{self.namespace}:{self.name}-operator"

    def helm(self, *words: str | Path, stdin: str | None = None, seconds: float = 300) -> str:
        """Run helm; its standard output."""
        return run(helm(self.major), "--kubeconfig", self.cluster.kubeconfig, "--namespace", self.namespace, *words,
                   stdin=stdin, seconds=seconds)  # fmt: skip

    def values(self, **values: Any) -> dict[str, Any]:
        """Values of the chart: the images of this checkout, and these."""
        operator, converter = self.images
        worker = {"image": image_values(converter), "allow": dict.fromkeys(self.allows, True)}
        return merged({"image": image_values(operator), "worker": worker}, values)

    def install(self, **values: Any) -> str:
        """Install the chart, and wait until the operator is ready; what helm says (its notes)."""
        self.installed = True  # what fails half-way is taken away as well
        return self._carry_out("install", "--create-namespace", "--take-ownership", **values)

    def upgrade(self, **values: Any) -> str:
        """Upgrade it to these values."""
        return self._carry_out("upgrade", **values)

    def _carry_out(self, verb: str, *words: str, **values: Any) -> str:
        try:
            return self.helm(verb, self.name, self.chart, *words, "--values", "-", "--wait", "--timeout", "120s",
                             stdin=json.dumps(self.values(**values)))  # fmt: skip
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.kubectl('get', 'pods', '--output=wide')}\n{self.logs()}") from error

    def uninstall(self) -> None:
        """Take it away with everything in its namespace, if it is there."""
        if self.installed:
            self.helm("uninstall", self.name, "--wait", "--ignore-not-found")
            self.cluster("delete", "namespace", self.namespace, "--wait=false")
            self.installed = False

    # ----------------------------------------------------------------------------------------------------- the program

    def pods(self) -> list[dict[str, Any]]:
        """The operator's pods that are not on their way out."""
        found: list[dict[str, Any]] = self.kubectl.get("pods", f"--selector={OPERATOR}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def logs(self) -> str:
        """What it has said, newest start last."""
        return self.kubectl("logs", f"--selector={OPERATOR}", "--tail=-1", "--ignore-errors")

    def scale(self, replicas: int) -> None:
        """Have so many operators, and wait until it is so."""
        self.kubectl("scale", self.deployment, f"--replicas={replicas}")
        if replicas:
            self.kubectl("rollout", "status", self.deployment, "--timeout=120s", seconds=150)
        wait_until("the operators", lambda: len(self._all_pods()) == replicas, seconds=90)

    def _all_pods(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.kubectl.get("pods", f"--selector={OPERATOR}")["items"]
        return found

    def kill(self) -> None:
        """Kill its process as a crash would; the kubelet starts it again."""
        [pod] = self.pods()
        restarts = pod["status"]["containerStatuses"][0]["restartCount"]
        for pid in processes_of(pod, "ckpt2pt-operator"):
            os.kill(pid, signal.SIGKILL)

        def is_back() -> bool:
            [again] = self.pods()
            status = again["status"]["containerStatuses"][0]
            return bool(status["restartCount"] > restarts and status["ready"])

        wait_until("the operator to be back", is_back, seconds=120)

    def metrics(self) -> str:
        """What it tells Prometheus."""
        [pod] = self.pods()
        name = pod["metadata"]["name"]
        return self.kubectl("get", "--raw", f"/api/v1/namespaces/{self.namespace}/pods/{name}:8080/proxy/metrics")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        found = re.findall(rf"^ckpt2pt_operator_{name}(?:{{[^}}]*}})? (\S+)$", self.metrics(), re.MULTILINE)
        return sum(map(float, found))
