"""The chart in the life of a cluster: installed, tested, upgraded, taken away; in all namespaces and in a few."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.golden import KIND, document, reach, status
from harness.kubectl import Kubectl
from harness.machine import wait_until
from harness.release import CHART, Release

CRD = "checkpointconversions.ckpt2pt.dev"
CLUSTER_WIDE = "clusterroles,clusterrolebindings"
POLICIES = "validatingadmissionpolicies,validatingadmissionpolicybindings"
pytestmark = pytest.mark.usefixtures("cluster")  # one that is ours to disturb

Releases = Callable[..., Release]


@pytest.fixture
def release(releases: Releases) -> Iterator[Release]:
    """A release that goes with the test."""
    made = releases()
    yield made
    made.uninstall()


@pytest.fixture
def elsewhere(kubectl: Kubectl) -> Iterator[Kubectl]:
    """A namespace that nobody was asked to serve."""
    name = f"elsewhere-{os.urandom(4).hex()}"
    kubectl("create", "namespace", name)
    yield kubectl.within(name)
    kubectl("delete", "namespace", name, "--wait=false")


def columns(kubectl: Kubectl) -> list[str]:
    """Names of the printer columns that the API server has."""
    [version] = kubectl.get("crd", CRD)["spec"]["versions"]
    return [column["name"] for column in version["additionalPrinterColumns"]]


def owned(release: Release, kinds: str) -> list[str]:
    """Objects of the release, of kinds that have no namespace."""
    found = release.cluster("get", kinds, f"--selector=app.kubernetes.io/instance={release.name}", "--output=name")
    return found.split()


def older(folder: Path) -> Path:
    """The chart as one of its predecessors was: the CustomResourceDefinition has a column less."""
    chart = Path(shutil.copytree(CHART, folder / "older"))
    crd = chart / "files" / "crds" / "checkpointconversions.yaml"
    text, number = re.subn(r"        - name: Phase\n( {10}.*\n)+", "", crd.read_text())
    assert number == 1
    crd.write_text(text)
    about = chart / "Chart.yaml"
    about.write_text(re.sub(r"(?m)^version: .*$", "version: 0.0.1", about.read_text()))
    return chart


@pytest.mark.parametrize(("first", "then"), [("v3", "v3"), ("v4", "v4"), ("v3", "v4")])
def test_installed_tested_upgraded_and_taken_away(
    releases: Releases,
    kubectl: Kubectl,
    checkpoint: Path,
    namespace: Kubectl,
    volume: Path,
    tmp_path: Path,
    first: str,
    then: str,
) -> None:
    """What users have made outlives all of it, and so does the CustomResourceDefinition."""
    release = releases(major=first)
    release.chart = older(tmp_path)
    try:
        notes = release.install()
        assert f"kubectl -n {release.namespace} rollout status deployment/ckpt2pt-operator" in notes
        assert "Phase:          Succeeded" in release.helm("test", release.name)
        namespace.apply(document(checkpoint, volume, dryRun=True))
        planned = reach(namespace, "Planned")

        assert "Phase" not in columns(kubectl)
        release.major, release.chart = then, CHART
        release.upgrade(operator={"logLevel": "debug"}, worker={"defaults": {"nodeSelector": {"disk": "fast"}}})
        release.kubectl("rollout", "status", release.deployment, "--timeout=60s")
        assert columns(kubectl)[0] == "Phase"
        [pod] = release.pods()
        assert "--log-level=debug" in pod["spec"]["containers"][0]["args"]
        assert status(namespace) == planned, "the new operator finds nothing to do"
        namespace.apply(document(checkpoint, volume, name="later", dryRun=True, suspend=True))
        wait_until("a Job", lambda: namespace.exists("job", "later-1"))
        template = namespace.get("job", "later-1")["spec"]["template"]
        assert template["spec"]["nodeSelector"] == {"disk": "fast"}, "the new defaults of workers"

        release.helm("uninstall", release.name, "--wait")
        assert owned(release, f"{CLUSTER_WIDE},{POLICIES}") == []
        assert not release.kubectl.get("deployments,services,configmaps,serviceaccounts", "-l", "helm.sh/chart")[
            "items"
        ]
        assert kubectl.exists("crd", CRD)
        assert status(namespace) == planned
    finally:
        release.uninstall()


def test_it_takes_up_again_what_an_earlier_installation_left(
    release: Release, checkpoint: Path, namespace: Kubectl, volume: Path
) -> None:
    """Uninstalled with a conversion at work, and installed again, in the same namespace, with no flag besides."""
    release.install()
    namespace.apply(document(checkpoint, volume, full=False, suspend=True))
    reach(namespace, "Suspended")
    release.helm("uninstall", release.name, "--wait")
    namespace("patch", KIND, "golden", "--type=merge", "--patch", '{"spec":{"suspend":false}}')
    values = release.values()
    release.helm("install", release.name, CHART, "--values", "-", "--wait", "--timeout=120s", stdin=json.dumps(values))
    assert reach(namespace, "Succeeded")["attempt"] == 1


@pytest.mark.parametrize(("major", "flags"), [("v3", ()), ("v4", ("--force-conflicts",))])
def test_a_definition_that_was_applied_by_hand_is_taken_over(
    releases: Releases, kubectl: Kubectl, tmp_path: Path, major: str, flags: tuple[str, ...]
) -> None:
    """As the chart's README says it."""
    release = releases(major=major)
    kubectl("delete", "crd", CRD, "--ignore-not-found")
    kubectl("apply", "--filename", older(tmp_path) / "files" / "crds")
    try:
        release.installed = True
        values = json.dumps(release.values(operator={"replicas": 0}))
        words = ("--create-namespace", "--take-ownership", *flags, "--values", "-")
        release.helm("install", release.name, release.chart, *words, stdin=values)
        assert columns(kubectl)[0] == "Phase"
    finally:
        release.uninstall()


def test_in_some_namespaces_without_any_right_in_the_cluster(
    release: Release, kubectl: Kubectl, checkpoint: Path, namespace: Kubectl, elsewhere: Kubectl, volume: Path
) -> None:
    """And under the strictest Pod Security Standard, as far as the operator's own pods go."""
    kubectl("create", "namespace", release.namespace)
    kubectl("label", "namespace", release.namespace, "pod-security.kubernetes.io/enforce=restricted")
    notes = release.install(watchNamespaces=[namespace.namespace])
    assert f"It serves the namespaces {namespace.namespace}" in notes
    assert owned(release, CLUSTER_WIDE) == []
    assert "Phase:          Succeeded" in release.helm("test", release.name)
    elsewhere.apply(document(checkpoint, volume, full=False))
    namespace.apply(document(checkpoint, volume, full=False))
    reach(namespace, "Succeeded")
    assert status(elsewhere) == {"observedGeneration": -1}, "nobody has looked at it"
    assert elsewhere.get("jobs")["items"] == []
    assert '"level": "ERROR"' not in release.logs()


# ------------------------------------------------------------------------------------------------------- more than one


def holder(release: Release) -> str:
    """Name of the pod that has the Lease."""
    [lease] = release.kubectl.get("leases")["items"]
    return str(lease["spec"].get("holderIdentity", "")).partition("_")[0]


def test_of_two_operators_one_works_and_the_other_takes_over(
    release: Release, checkpoint: Path, namespace: Kubectl, volume: Path
) -> None:
    release.install(operator={"replicas": 2, "leaderElection": {"enabled": True}})
    names = {pod["metadata"]["name"] for pod in release.pods()}
    assert len(names) == 2
    wait_until("one to lead", lambda: holder(release) in names)
    first = holder(release)
    namespace.apply(document(checkpoint, volume, full=False, suspend=True))
    reach(namespace, "Suspended")
    release.kubectl("delete", "pod", first, "--grace-period=0", "--force")
    namespace("patch", KIND, "golden", "--type=merge", "--patch", '{"spec":{"suspend":false}}')
    reach(namespace, "Succeeded")
    assert holder(release) != first
    assert len(namespace.get("jobs")["items"]) == 1
