"""The images, as they are: small, without frameworks, compiled; and run as the strictest cluster would run them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Iterator

import pytest

from ckpt2pt import __version__
from harness import images
from harness.kubectl import Kubectl
from harness.machine import UnavailableError
from harness.pods import finished, pod

MAX_BYTES_ABOVE_BASE = {"ckpt2pt": 120 << 20, "ckpt2pt-operator": 300 << 20}
"""Half of the converter is numpy; half of the operator is the Kubernetes client."""


class Image:
    """An archive of ``docker save``'s form."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar
        [self.manifest] = json.loads(self.read("manifest.json"))
        self.config = json.loads(self.read(self.manifest["Config"]))

    def read(self, name: str) -> bytes:
        file = self.tar.extractfile(name)
        assert file
        return file.read()

    def above_base(self) -> Iterator[bytes]:
        """The layers that the Dockerfile adds to its base, which is one layer."""
        yield from (self.read(name) for name in self.manifest["Layers"][1:])


@pytest.fixture(scope="module", params=images.TARGETS)
def built(request: pytest.FixtureRequest) -> Iterator[Image]:
    try:
        archive = images.archive(request.param)
    except UnavailableError as error:
        pytest.skip(f"no images: {error}")
    with tarfile.open(archive) as tar:
        yield Image(tar)


@pytest.fixture(scope="module")
def files(built: Image) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    found: dict[str, tuple[tarfile.TarInfo, bytes]] = {}
    for layer in built.above_base():
        with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
            for entry in tar:
                content = tar.extractfile(entry) if entry.isfile() else None
                # Of a compiled file the header is enough.
                found[entry.name] = (entry, content.read(16) if content else b"")
    return found


def test_the_user_is_a_number_that_is_not_root(built: Image) -> None:
    assert built.config["config"]["User"] == "65532:65532"


def test_the_program_is_started_without_a_shell(built: Image, files: dict[str, tuple[tarfile.TarInfo, bytes]]) -> None:
    [program] = built.config["config"]["Entrypoint"]
    entry, head = files[f"opt/ckpt2pt/bin/{program}"]
    assert entry.mode & 0o005 == 0o005
    assert head.startswith(b"#!/opt/ckpt2pt/b")


def test_labels_say_what_it_is(built: Image) -> None:
    labels = built.config["config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == __version__
    assert {f"org.opencontainers.image.{name}" for name in ("title", "description", "licenses", "revision")} <= set(
        labels
    )


def test_size_above_the_base(built: Image) -> None:
    [program] = built.config["config"]["Entrypoint"]
    assert 10 << 20 < sum(map(len, built.above_base())) < MAX_BYTES_ABOVE_BASE[program]


def test_no_framework_and_no_installer_inside(files: dict[str, tuple[tarfile.TarInfo, bytes]]) -> None:
    packages = {name.split("/site-packages/")[1].split("/")[0] for name in files if "/site-packages/" in name}
    assert {"ckpt2pt", "yaml"} <= packages
    assert not packages & {"torch", "mindspore", "pip", "uv", "setuptools", "pytest"}


def test_every_module_of_ours_is_compiled_and_python_will_use_it(
    files: dict[str, tuple[tarfile.TarInfo, bytes]],
) -> None:
    ours = [name for name in files if "/site-packages/ckpt2pt" in name and name.endswith(".py")]
    assert len(ours) > 20
    for name in ours:
        folder, _, module = name.rpartition("/")
        [compiled] = [
            head for other, (_, head) in files.items() if other.startswith(f"{folder}/__pycache__/{module[:-3]}.")
        ]
        source = files[name][0]
        # PEP 552: magic, flags, then seconds and size of the source it was compiled from.
        assert struct.unpack("<III", compiled[4:16]) == (0, int(source.mtime), source.size), name


@pytest.mark.parametrize("target", images.TARGETS)
def test_the_program_runs_with_nothing_it_could_write_to_and_no_shell(
    target: str, request: pytest.FixtureRequest, namespace: Kubectl, cluster: object
) -> None:
    nothing = {"name": "nothing", "hostPath": {"path": "/dev/null", "type": "CharDevice"}}
    shells = [{"name": "nothing", "mountPath": f"/usr/bin/{shell}", "readOnly": True} for shell in ("dash", "bash")]
    reference = request.getfixturevalue(f"{target}_image")
    code, said = finished(
        namespace, pod("version", reference, "--version", volumes=[nothing], container={"volumeMounts": shells})
    )
    assert (code, said.split()[-1]) == (0, __version__)


def test_the_root_file_system_is_read_only_and_the_user_has_no_rights(namespace: Kubectl, converter_image: str) -> None:
    namespace("label", "namespace", str(namespace.namespace), "pod-security.kubernetes.io/enforce=restricted")
    probe = (
        "import os; print(os.getuid(), os.statvfs('/').f_flag & os.ST_RDONLY,"
        " open('/proc/self/status').read().split('CapEff:')[1].split()[0])"
    )
    code, said = finished(namespace, pod("probe", converter_image, "-c", probe, command=["python3"]))
    assert (code, said.split()) == (0, ["65532", "1", "0000000000000000"])
