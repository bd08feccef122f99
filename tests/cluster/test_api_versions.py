"""docs/api-policy.md on a real API server: the CRD upgraded by hand, and what happens to objects that are stored."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest

from documents import crd, minimal
from harness.images import REPOSITORY
from harness.kubectl import Kubectl
from harness.machine import ClusterError, run, wait_until

BLOCKS = re.findall(
    r"^ *```sh\n(.*?)^ *```", (REPOSITORY / "docs" / "api-policy.md").read_text(), re.MULTILINE | re.DOTALL
)
GROUP = "policy.example.com"
"""Of a copy of the CRD, which no operator looks after."""
NAME = f"checkpointconversions.{GROUP}"
Change = Callable[[dict[str, Any]], None]


def types(kubectl: Kubectl, words: str) -> None:
    """Run commands of the page, in a checkout."""
    run("bash", "-euo", "pipefail", "-c", f"cd '{REPOSITORY}'; {words}", env={"KUBECONFIG": str(kubectl.kubeconfig)})


@pytest.fixture
def definition(kubectl: Kubectl) -> Iterator[Callable[..., None]]:
    """Apply the copy with a change to its one version, and with others beside it."""

    def apply(change: Change = lambda version: None, *further: Change) -> None:
        found = deepcopy(crd())
        found["metadata"]["name"], found["spec"]["group"] = NAME, GROUP
        found["spec"]["names"]["shortNames"] = ["policy"]
        found["spec"]["versions"] = [deepcopy(found["spec"]["versions"][0]) for _ in (change, *further)]
        for version, each in zip(found["spec"]["versions"], (change, *further), strict=True):
            each(version)
        kubectl.apply(found)
        wanted = [version["name"] for version in found["spec"]["versions"]]
        wait_until("the versions to be served", lambda: wanted == served(kubectl), seconds=30)

    kubectl("delete", "crd", NAME, "--ignore-not-found")
    yield apply
    kubectl("delete", "crd", NAME, "--ignore-not-found")


def served(kubectl: Kubectl) -> list[str]:
    found = json.loads(kubectl("get", "--raw", "/apis"))["groups"]
    names = [version["version"] for group in found if group["name"] == GROUP for version in group["versions"]]
    return sorted(names)


def stored(namespace: Kubectl, version: str = "v1alpha1") -> dict[str, Any]:
    return namespace.get(f"checkpointconversions.{version}.{GROUP}", "stored")


def an_object(**spec: Any) -> dict[str, Any]:
    found = minimal()
    return {
        **found,
        "apiVersion": f"{GROUP}/v1alpha1",
        "metadata": {"name": "stored"},
        "spec": {**found["spec"], **spec},
    }


def spec_of(version: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


def test_the_definition_is_upgraded_by_hand_where_the_chart_leaves_it(kubectl: Kubectl, crd: None) -> None:
    name = "checkpointconversions.ckpt2pt.dev"
    earlier = [{"op": "remove", "path": "/spec/versions/0/additionalPrinterColumns/0"}]
    kubectl("patch", "crd", name, "--type=json", f"--patch={json.dumps(earlier)}")
    types(kubectl, BLOCKS[-1])
    [version] = kubectl.get("crd", name)["spec"]["versions"]
    assert version["additionalPrinterColumns"][0]["name"] == "Phase"


def test_what_an_upgrade_does_with_objects(namespace: Kubectl, definition: Callable[..., None]) -> None:
    def earlier(version: dict[str, Any]) -> None:
        spec_of(version)["properties"]["gone"] = {"type": "string"}

    def later(version: dict[str, Any]) -> None:
        spec_of(version)["properties"]["fresh"] = {"type": "string", "default": "new"}
        spec_of(version).setdefault("x-kubernetes-validations", []).append(
            {"rule": "self.model.numLayers > 1000", "message": "stricter"}
        )

    definition(earlier)
    namespace.create(an_object(gone="soon"))
    definition(later)
    wait_until("the new schema", lambda: "fresh" in stored(namespace)["spec"], seconds=30)
    assert "gone" not in stored(namespace)["spec"]
    assert stored(namespace)["spec"]["fresh"] == "new"
    namespace("annotate", f"{NAME}/stored", "edited=yes")
    with pytest.raises(ClusterError, match="stricter"):
        namespace.create({**an_object(), "metadata": {"name": "another"}})
    with pytest.raises(ClusterError, match=r'unknown field "spec\.gone"'):
        namespace.create({**an_object(gone="again"), "metadata": {"name": "another"}})


def test_a_second_version_and_the_end_of_the_first(
    kubectl: Kubectl, namespace: Kubectl, definition: Callable[..., None]
) -> None:
    def deprecated(version: dict[str, Any]) -> None:
        version |= {"storage": False, "deprecated": True, "deprecationWarning": "write v1beta1 instead"}

    def beta(version: dict[str, Any]) -> None:
        version["name"] = "v1beta1"

    definition()
    namespace.create(an_object())
    definition(deprecated, beta)
    words = ["get", f"checkpointconversions.v1alpha1.{GROUP}", "--namespace", str(namespace.namespace)]
    reported = subprocess.run(["kubectl", *words], env={**os.environ, "KUBECONFIG": str(kubectl.kubeconfig)},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert "Warning: write v1beta1 instead" in reported.stderr
    assert stored(namespace)["spec"] == stored(namespace, "v1beta1")["spec"]
    assert kubectl.get("crd", NAME)["status"]["storedVersions"] == ["v1alpha1", "v1beta1"]
    with pytest.raises(ClusterError, match="storedVersions"):
        definition(beta)

    [page] = [block for block in BLOCKS if "storedVersions" in block]
    types(kubectl, page.replace("ckpt2pt.dev", GROUP))
    definition(beta)
    assert stored(namespace, "v1beta1")["apiVersion"] == f"{GROUP}/v1beta1"
