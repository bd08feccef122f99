"""Installing as README.md writes it: what stands in its blocks is what is run, with another name for the registry."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ckpt2pt import __version__
from conftest import WORKER_UID, lacking
from harness.cluster import Cluster
from harness.golden import document, reach
from harness.images import REPOSITORY, building
from harness.kubectl import Kubectl
from harness.machine import UnavailableError, run
from harness.registry import Registry, checkout, registry
from helm import VERSIONS, helm

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
EXAMPLE = "registry.example.com/team"
CRD = "checkpointconversions.ckpt2pt.dev"
MACHINE = {"amd64": 62, "arm64": 183}
"""Architecture -> e_machine of its programs (elf.h: EM_X86_64, EM_AARCH64)."""


def block(line: str) -> str:
    """The commands of README.md among which a line begins so."""
    [found] = [
        text
        for text in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
        if f"\n{line}" in f"\n{text}"
    ]
    return str(found)


@dataclass(frozen=True, slots=True)
class User:
    """Somebody with a checkout, a registry and a cluster."""

    checkout: Path
    registry: Registry
    kubeconfig: Path
    pushed: str = ""

    @property
    def team(self) -> str:
        """What stands in the place of the README's registry."""
        return f"{self.registry.address}/team"

    def types(self, commands: str, *, major: str = "v4", **environment: str) -> str:
        """Run commands in the checkout; what they say.  The first that fails ends them."""
        path = f"{helm(major).parent}:{os.environ['PATH']}"
        words = {"REGISTRY": self.team, "KUBECONFIG": str(self.kubeconfig), "PATH": path, **environment}
        return run(
            "bash",
            "-euc",
            f"cd '{self.checkout}'; {commands.replace(f'REGISTRY={EXAMPLE}', f'REGISTRY={self.team}')}",
            env=words,
            seconds=1800,
        )

    def digest(self, image: str) -> str:
        """The digest that was printed for an image."""
        [found] = re.findall(
            rf"^pushed {re.escape(self.team)}/{image}:{re.escape(__version__)}@(sha256:\w+)$", self.pushed, re.MULTILINE
        )
        return str(found)


@pytest.fixture(scope="module")
def user(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[User]:
    """Both images are built and pushed, as the README writes it for buildah."""
    try:
        with registry() as found:
            one = User(checkout(tmp_path_factory.mktemp("user") / "ckpt2pt"), found, cluster.kubeconfig)
            with building(found.address) as environment:
                said = one.types(block("make push"), **environment)
            yield User(one.checkout, found, cluster.kubeconfig, said)
    except UnavailableError as error:
        lacking(pytestconfig, f"no images: {error}")


@pytest.fixture
def operator(kubectl: Kubectl) -> Iterator[Kubectl]:
    """kubectl in the README's namespace, of a cluster that has never seen ckpt2pt; gone afterwards."""
    kubectl("delete", "crd", CRD, "--ignore-not-found")
    yield kubectl.within("ckpt2pt")
    kubectl("delete", "namespace", "ckpt2pt", "--ignore-not-found", seconds=300)


def pulled(pods: Kubectl, label: str) -> set[str]:
    """Images of the containers that run or ran in the pods with a label; the node can have them from the registry alone."""
    found = pods.get("pods", f"--selector=app.kubernetes.io/component={label}")["items"]
    statuses = [status for pod in found for status in pod["status"]["containerStatuses"]]
    assert statuses
    assert all("waiting" not in status["state"] for status in statuses)
    return {container["image"] for pod in found for container in pod["spec"]["containers"]}


def convert(namespace: Kubectl, checkpoint: Path, volume: Path) -> None:
    """A conversion with nothing but a claim, which needs no permission."""
    for name in ("ms", "pt_meta"):
        shutil.copytree(checkpoint / name, volume / name)
    run("chown", "--recursive", str(WORKER_UID), volume)
    size = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    name = str(namespace.namespace)
    namespace.apply(
        {
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
            "spec": {**size, "capacity": {"storage": "1Gi"}, "hostPath": {"path": str(volume)}},
        },
        {
            "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "training"},
            "spec": {**size, "volumeName": name, "resources": {"requests": {"storage": "1Gi"}}},
        },
    )  # fmt: skip
    wanted = document(checkpoint, volume)
    claim = {"persistentVolumeClaim": {"claimName": "training"}}
    wanted["spec"] |= {"source": {"volume": claim, "path": "ms"}, "target": {"path": "out"}}
    del wanted["spec"]["workers"]
    namespace.apply(wanted)
    reach(namespace, "Succeeded")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("platform", ["amd64", "arm64"])
@pytest.mark.parametrize("image", ["ckpt2pt", "ckpt2pt-operator"])
def test_every_program_of_an_image_is_of_its_architecture(user: User, image: str, platform: str) -> None:
    assert user.digest(image)
    machines = []
    with tarfile.open(
        fileobj=io.BytesIO(user.registry.export(f"team/{image}:{__version__}", f"linux/{platform}"))
    ) as tar:
        for entry in tar:
            if entry.isfile() and entry.name.startswith("opt/ckpt2pt/"):
                head = tar.extractfile(entry).read(20)  # type: ignore[union-attr]
                machines += [int.from_bytes(head[18:20], "little")] if head.startswith(b"\x7fELF") else []
    assert len(machines) > 20
    assert set(machines) == {MACHINE[platform]}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("major", VERSIONS)
def test_helm_as_the_readme_writes_it(
    user: User, operator: Kubectl, namespace: Kubectl, checkpoint: Path, volume: Path, major: str
) -> None:
    """Nothing but the registry's name is given, and the node pulls what was pushed."""
    try:
        assert "Phase:          Succeeded" in user.types(block("helm install"), major=major)
        assert pulled(operator, "operator") == {f"{user.team}/ckpt2pt-operator:{__version__}"}
        convert(namespace, checkpoint, volume)
        assert pulled(namespace, "worker") == {f"{user.team}/ckpt2pt:{__version__}"}

        digests = {"image": user.digest("ckpt2pt-operator"), "worker.image": user.digest("ckpt2pt")}
        pins = " ".join(f"--set {name}.digest={digest}" for name, digest in digests.items())
        user.types(f"helm upgrade ckpt2pt charts/ckpt2pt --namespace ckpt2pt --reuse-values --wait {pins}", major=major)
        [container] = operator.get("deployment", "ckpt2pt-operator")["spec"]["template"]["spec"]["containers"]
        assert container["image"] == f"{user.team}/ckpt2pt-operator@{digests['image']}"
        assert f"--worker-image={user.team}/ckpt2pt@{digests['worker.image']}" in container["args"]
    finally:
        user.types("helm uninstall ckpt2pt --namespace ckpt2pt --ignore-not-found --wait", major=major)


@pytest.mark.timeout(1800)
def test_static_manifests_as_the_readme_writes_it(
    user: User, operator: Kubectl, namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    try:
        user.types(block("kubectl apply -k"))
        operator("rollout", "status", "deployment/ckpt2pt-operator", "--timeout=120s", seconds=150)
        assert pulled(operator, "operator") == {f"{user.team}/ckpt2pt-operator:{__version__}"}
        convert(namespace, checkpoint, volume)
        assert pulled(namespace, "worker") == {f"{user.team}/ckpt2pt:{__version__}"}
        assert "configmap/images" not in operator("get", "configmaps", "--output=name")
        assert EXAMPLE not in subprocess.check_output(["kubectl", "kustomize", user.checkout / "deploy"], text=True)
        user.types("kubectl diff -k deploy")
    finally:
        user.types("kubectl delete -k deploy --ignore-not-found")
