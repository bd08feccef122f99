"""kubectl, as the tests speak to a cluster."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.machine import ClusterError, run, wait_until


@dataclass(frozen=True, slots=True)
class Kubectl:
    """kubectl with a kubeconfig, in one namespace or in none."""

    kubeconfig: Path
    namespace: str | None = None

    def __call__(self, *words: str | Path, stdin: str | None = None, seconds: float = 120) -> str:
        """Run it; its standard output.  A failure is raised with what it said."""
        where = ["--namespace", self.namespace] if self.namespace else []
        return run("kubectl", "--kubeconfig", self.kubeconfig, *where, *words, stdin=stdin, seconds=seconds)

    def within(self, namespace: str) -> Kubectl:
        """The same in another namespace."""
        return Kubectl(self.kubeconfig, namespace)

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Apply objects."""
        self("apply", "--filename", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))

    def create(self, thing: Mapping[str, Any]) -> dict[str, Any]:
        """Create an object; as the server has it."""
        created: dict[str, Any] = json.loads(
            self("create", "--filename", "-", "--output=json", stdin=json.dumps(thing))
        )
        return created

    def get(self, *words: str) -> dict[str, Any]:
        """One object, or a list, as JSON: ``get("job", "demo-1")``."""
        found: dict[str, Any] = json.loads(self("get", *words, "--output=json"))
        return found

    def exists(self, *words: str) -> bool:
        """Whether an object is there."""
        return bool(self("get", *words, "--ignore-not-found", "--output=name").strip())

    def condition(self, kind: str, name: str) -> dict[str, str]:
        """Type -> status of the conditions of an object."""
        conditions = self.get(kind, name).get("status", {}).get("conditions", [])
        return {condition["type"]: condition["status"] for condition in conditions}

    def wait(self, kind: str, name: str, condition: str, *, seconds: float = 120) -> None:
        """Wait for a condition; a failure shows the object and the pods with it."""
        try:
            self(
                "wait",
                f"--for=condition={condition}",
                f"--timeout={seconds:.0f}s",
                f"{kind}/{name}",
                seconds=seconds + 30,
            )
        except ClusterError as error:
            story = self("describe", f"{kind}/{name}") + self("get", "pods", "--output=wide")
            raise ClusterError(f"{error}\n{story}") from error

    def wait_gone(self, *words: str, seconds: float = 60) -> None:
        """Wait until an object is no longer there."""
        wait_until(f"{' '.join(words)} to be gone", lambda: not self.exists(*words), seconds=seconds)
