"""The cluster, its images and a namespace for each test.  Whatever lies in this folder is an end-to-end test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from documents import CRD_PATH
from harness import images
from harness.checkpoints import Large, Unfinished
from harness.cluster import Cluster
from harness.golden import by_command, owner_of
from harness.kubectl import Kubectl
from harness.machine import UnavailableError
from harness.process import Process
from harness.proxy import Proxy
from harness.release import ALLOWED, Release
from harness.sharing import KUBECONFIG, given_kubeconfig, suite_cluster

WORKER_UID = 65532
"""The images' user."""

REQUIRED = "CKPT2PT_CLUSTER"
"""``required``: a machine that cannot run a cluster fails the tests; otherwise they are skipped and counted as such."""

MISSING = pytest.StashKey[str]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder.  Time spent on bringing the cluster up is not the test's."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.cluster)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300, func_only=True))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say it where nobody overlooks it."""
    missing = config.stash.get(MISSING, None)
    if missing:
        terminalreporter.section("NOT TESTED ON A REAL CLUSTER", red=True)
        terminalreporter.line(missing)


def lacking(config: pytest.Config, why: str) -> None:
    """End a test that cannot run here: in words, counted, and as a failure where a cluster is required."""
    config.stash[MISSING] = why
    if os.environ.get(REQUIRED) == "required":
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="session")
def started(pytestconfig: pytest.Config) -> Iterator[Cluster | None]:
    """The cluster of this machine; ``None`` when another one was named."""
    with ExitStack() as stack:
        if given_kubeconfig():
            yield None
            return
        try:
            found = stack.enter_context(suite_cluster())
        except UnavailableError as error:
            lacking(pytestconfig, f"no cluster: {error}")
        yield found


@pytest.fixture(scope="session")
def cluster(started: Cluster | None) -> Cluster:
    """The cluster of this machine: its daemons can be stopped, and its node sees this machine's folders."""
    if started is None:
        pytest.skip(
            f"the cluster of {KUBECONFIG} is not ours to disturb, and its nodes may not see this machine's folders"
        )
    return started


@pytest.fixture(scope="session")
def kubectl(started: Cluster | None) -> Kubectl:
    """kubectl as administrator, in no namespace."""
    given = given_kubeconfig()
    if given:
        return Kubectl(given)
    assert started
    return started.kubectl


@pytest.fixture
def namespace(kubectl: Kubectl) -> Iterator[Kubectl]:
    """kubectl in a namespace of the test's own, deleted afterwards."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    yield kubectl.within(name)
    kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


@pytest.fixture(scope="session")
def converter_image(started: Cluster | None, pytestconfig: pytest.Config) -> str:
    """The reference of the converter's image; every node has it.  ``CKPT2PT_CONVERTER_IMAGE`` for a cluster that was named."""
    return image("converter", started, pytestconfig)


@pytest.fixture(scope="session")
def operator_image(started: Cluster | None, pytestconfig: pytest.Config) -> str:
    """The same of the operator, ``CKPT2PT_OPERATOR_IMAGE``."""
    return image("operator", started, pytestconfig)


def image(target: str, cluster: Cluster | None, config: pytest.Config) -> str:
    variable = f"CKPT2PT_{target.upper()}_IMAGE"
    if cluster is None:
        if variable not in os.environ:
            lacking(config, f"{variable} does not name an image that the cluster of {KUBECONFIG} can pull")
        return os.environ[variable]
    reference = images.reference(target)
    if not cluster.node.has_image(reference):
        try:
            cluster.node.import_image(images.archive(target))
        except UnavailableError as error:
            lacking(config, f"no images: {error}")
    return reference


@pytest.fixture(scope="session")
def releases(kubectl: Kubectl, operator_image: str, converter_image: str) -> Iterator[Callable[..., Release]]:
    """Install the chart: ``releases(major="v3")`` gives a Release that is not installed yet; what is left goes at the end."""
    made: list[Release] = []

    def make(major: str = "v4", name: str = "ckpt2pt", allows: tuple[str, ...] = ALLOWED) -> Release:
        made.append(Release(kubectl, (operator_image, converter_image), major, name, allows=allows))
        return made[-1]

    yield make
    for release in made:
        release.uninstall()


@pytest.fixture(scope="module")
def operator(releases: Callable[..., Release], request: pytest.FixtureRequest) -> Iterator[Release]:
    """The operator of all namespaces, installed by its chart, while the tests of a module run.

    ``ALLOWS`` of the module are permissions that its conversions need besides the usual ones.
    """
    release = releases(allows=(*ALLOWED, *getattr(request.module, "ALLOWS", ())))
    release.install()
    yield release
    release.uninstall()


@pytest.fixture
def volume(tmp_path: Path, cluster: Cluster) -> Path:
    """A folder that the images' user may write and pods mount as hostPath."""
    folder = tmp_path / "volume"
    folder.mkdir()
    os.chown(folder, WORKER_UID, WORKER_UID)
    return folder


@pytest.fixture
def checkpoint(golden: Path, volume: Path) -> Path:
    """A golden set; its owner may write the volume, since a worker has no capabilities."""
    folder = golden / "megatron06" / "b_tp2pp2"
    os.chown(volume, owner_of(folder), -1)
    return folder


@pytest.fixture
def expected(checkpoint: Path, tmp_path: Path) -> dict[str, str]:
    """What the command makes of it in a full conversion: path -> digest."""
    return by_command(checkpoint, tmp_path / "by-command", full=True)


@pytest.fixture
def unfinished(checkpoint: Path, volume: Path) -> Unfinished:
    """The same on the volume, with one rank that has not saved yet."""
    return Unfinished(checkpoint, volume)


@pytest.fixture
def large(volume: Path) -> Large:
    """A checkpoint of two stages that takes a worker with little processor time a while."""
    return Large(volume)


@pytest.fixture(scope="module")
def crd(kubectl: Kubectl) -> None:
    """The CRD without the chart, for an operator that is a process; another module may have taken it away."""
    kubectl("apply", "--filename", CRD_PATH)
    kubectl("wait", "--for=condition=Established", "crd/checkpointconversions.ckpt2pt.dev", "--timeout=30s")


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    """A network that can be made bad, in front of the API server."""
    with Proxy(cluster.server, cluster.state / "certificates").running() as found:
        yield found


@pytest.fixture
def processes(
    crd: None, cluster: Cluster, namespace: Kubectl, converter_image: str, tmp_path: Path
) -> Iterator[Callable[..., Process]]:
    """Make operators of the test's namespace that are processes of this machine; ``processes(proxy)`` comes through it."""
    made: list[Process] = []

    def make(through: Proxy | None = None, *flags: str) -> Process:
        number = len(made)
        kubeconfig = through.kubeconfig(tmp_path / f"kubeconfig-{number}") if through else cluster.kubeconfig
        log = tmp_path / f"operator-{number}.log"
        made.append(Process(kubeconfig, str(namespace.namespace), converter_image, log, flags))
        return made[-1]

    yield make
    for process in made:
        process.kill()
