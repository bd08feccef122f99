"""Kubernetes and the pause program, built from source once and kept."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

from harness.machine import ClusterError, UnavailableError, cache_folder, require_go, run

MODULE = Path(__file__).parents[1] / "kubernetes"
PAUSE_IMAGE = "ckpt2pt.test/pause:1"


def version() -> str:
    """The version of Kubernetes that go.mod requires, as ``v1.36.3``."""
    found = re.search(r"^\tk8s\.io/kubernetes (v\S+)$", (MODULE / "go.mod").read_text(), re.MULTILINE)
    assert found, "go.mod does not name k8s.io/kubernetes"
    return found[1]


def kubernetes() -> Path:
    """One binary of etcd, the control plane and the kubelet; about ten minutes the first time, then at once."""
    stamp = f"-X k8s.io/component-base/version.gitVersion={version()}"
    return _built("kubernetes", "main.go", ".", f"-s -w {stamp}", {})


def pause_image() -> Path:
    """An archive of the image that every pod's sandbox runs: one static program."""
    program = _built("pause", "pause/main.go", "./pause", "-s -w", {"CGO_ENABLED": "0"})
    return _kept(program.with_suffix(".tar"), lambda partial: _archive(program.read_bytes(), partial))


def _built(name: str, source: str, package: str, ldflags: str, env: dict[str, str]) -> Path:
    digest = hashlib.sha256(b"".join((MODULE / file).read_bytes() for file in ("go.mod", "go.sum", source))).hexdigest()
    target = cache_folder() / "kubernetes" / f"{version()}-{digest[:12]}" / name

    def build(partial: Path) -> None:
        go = require_go()
        try:
            run(go, "-C", MODULE, "mod", "download", seconds=900)
        except ClusterError as error:
            raise UnavailableError(f"the source of Kubernetes cannot be downloaded: {error}") from error
        run(go, "-C", MODULE, "build", "-mod=readonly", "-buildvcs=false", "-ldflags", ldflags, "-o", partial, package,
            env=env, seconds=3600)  # fmt: skip

    return _kept(target, build)


def _kept(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, made unless it is there; it appears by rename."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        make(partial)
        partial.rename(target)
    return target


def _archive(program: bytes, target: Path) -> None:
    """Write an image of one file in the form of ``docker save``, which containerd reads."""
    layer = _tar({"pause": program})
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE_IMAGE], "Layers": ["layer.tar"]}]
    files = {"config.json": json.dumps(config).encode(), "layer.tar": layer}
    target.write_bytes(_tar({**files, "manifest.json": json.dumps(manifest).encode()}))


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()
