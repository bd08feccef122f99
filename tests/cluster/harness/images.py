"""The project's images, built from the Dockerfile by buildah on a base of Debian's packages; kept by their content.

No registry is needed: the base is made by debootstrap.  ``CKPT2PT_BASE_IMAGE`` names another.
"""

from __future__ import annotations

import configparser
import fcntl
import hashlib
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.machine import IMAGE_PACKAGES, ClusterError, UnavailableError, cache_folder, require, run

REPOSITORY = Path(__file__).parents[3]
TARGETS = ("converter", "operator")

_SOURCES = (
    "Dockerfile",
    ".dockerignore",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "requirements",
    "converter",
    "operator",
    "crds",
)
_SUITE, _MIRROR = "bookworm", "http://deb.debian.org/debian"
_PYTHON = ("python3", "python3-venv")
_KEPT_ARCHIVES, _KEPT_IMAGES = 4, 40


def reference(target: str) -> str:
    """The name of an image of this checkout: its tag is the digest of what goes in, so no two checkouts collide."""
    digest = hashlib.sha256(os.environ.get("CKPT2PT_BASE_IMAGE", "").encode())
    for name in _SOURCES:
        top = REPOSITORY / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix != ".pyc":
                digest.update(f"{path.relative_to(REPOSITORY)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return f"ckpt2pt.test/{target}:{digest.hexdigest()[:12]}"


def archive(target: str) -> Path:
    """The image as an archive of ``docker save``'s form, built unless it is kept already."""
    name = reference(target)
    folder = cache_folder() / "images"
    kept = folder / f"{name.rpartition('/')[2].replace(':', '-')}.tar"
    with _alone(folder):
        if not kept.exists():
            base = _base_image()
            with _pip_secrets() as secrets:
                for fresh in ((), ("--no-cache",)):
                    _buildah("bud", "--isolation", "chroot", "--layers", *fresh, "--quiet", *secrets, "--target", target, "--tag", name,
                             "--build-arg", f"BASE_IMAGE={base}", *_labels(), REPOSITORY)  # fmt: skip
                    # buildah 1.28 also takes a layer that `make push` has left of the other architecture.
                    if (
                        _buildah("inspect", "--type", "image", "--format", "{{.OCIv1.Architecture}}", name).strip()
                        == _native()
                    ):
                        break
            partial = kept.with_suffix(".partial")
            partial.unlink(missing_ok=True)
            _buildah("push", "--quiet", name, f"docker-archive:{partial}:{name}")
            partial.rename(kept)
            _prune(folder, target)
    return kept


@contextmanager
def building(registry: str) -> Iterator[dict[str, str]]:
    """What `make push` is reported here in its environment: this machine's base image and package index, a registry without TLS."""
    given = os.environ.get("CKPT2PT_BASE_IMAGE")
    store = cache_folder() / "buildah"
    with _alone(cache_folder() / "images"), _pip_secrets() as secrets, tempfile.TemporaryDirectory() as scratch:
        storage, registries = Path(scratch) / "storage.conf", Path(scratch) / "registries.conf"
        driver = os.environ.get("STORAGE_DRIVER", "overlay")
        storage.write_text(f'[storage]\ndriver = "{driver}"\ngraphroot = "{store}"\nrunroot = "{store}/run"\n')
        registries.write_text(f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n')
        yield {
            "CONTAINERS_STORAGE_CONF": str(storage),
            "CONTAINERS_REGISTRIES_CONF": str(registries),
            "BUILDAH_ISOLATION": "chroot",
            "BASE_IMAGE": given or _push_base(f"{registry}/base:1"),
            "BUILD_FLAGS": " ".join(secrets),
            "PUSH_FLAGS": "--tls-verify=false",
        }


def _push_base(name: str) -> str:
    """Push the base for both architectures; that of the other one is empty, as nothing of it is run and nothing of it is read."""
    base = _base_image()
    [other] = {"amd64", "arm64"} - {_native()}
    with tempfile.TemporaryDirectory() as context:
        (Path(context) / "Dockerfile").write_text("FROM scratch\nLABEL architecture=other\n")
        _buildah("bud", "--quiet", "--platform", f"linux/{other}", "--tag", f"{base}-{other}", context)
    _buildah("manifest", "create", name)
    for image in (base, f"{base}-{other}"):
        _buildah("manifest", "add", name, image)
    _buildah("manifest", "push", "--quiet", "--tls-verify=false", "--rm", "--all", name, f"docker://{name}")
    return name


def _native() -> str:
    """This machine's architecture, as images call it."""
    return run("buildah", "info", "--format", "{{.host.arch}}").strip()


def _labels() -> list[str]:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    try:
        revision = run("git", "-C", REPOSITORY, "rev-parse", "HEAD").strip()
    except (ClusterError, OSError):
        revision = "unknown"
    return ["--build-arg", f"VERSION={version}", "--build-arg", f"REVISION={revision}"]


def _base_image() -> str:
    """A base with Debian's python3, made once."""
    given = os.environ.get("CKPT2PT_BASE_IMAGE")
    if given:
        require({"buildah": IMAGE_PACKAGES["buildah"]})
        return given
    require(IMAGE_PACKAGES)
    name = f"localhost/ckpt2pt-base:{_SUITE}"
    if name not in _buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        with tempfile.TemporaryDirectory() as scratch:
            root, context = Path(scratch) / "root", Path(scratch) / "context"
            mirror = os.environ.get("CKPT2PT_DEBIAN_MIRROR", _MIRROR)
            try:
                run(
                    "debootstrap",
                    "--variant=minbase",
                    f"--include={','.join(_PYTHON)}",
                    _SUITE,
                    root,
                    mirror,
                    seconds=1800,
                )
            except ClusterError as error:
                raise UnavailableError(f"debootstrap cannot make a base image from {mirror}: {error}") from error
            for litter in ("var/lib/apt/lists", "var/cache/apt", "usr/share/doc", "usr/share/man", "usr/share/locale"):
                shutil.rmtree(root / litter)
            context.mkdir()
            run("tar", "--directory", root, "--create", "--file", context / "base.tar", ".")
            (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
            _buildah("bud", "--isolation", "chroot", "--quiet", "--tag", name, context)
    return name


def _buildah(command: str, *words: str | Path) -> str:
    # overlay is what containerd's own snapshots need as well.
    store = cache_folder() / "buildah"
    driver = os.environ.get("STORAGE_DRIVER", "overlay")
    return run(
        "buildah",
        "--root",
        store,
        "--runroot",
        store / "run",
        "--storage-driver",
        driver,
        command,
        *words,
        seconds=1800,
    )


@contextmanager
def _pip_secrets() -> Iterator[list[str]]:
    """What the build has to know of this machine's pip, as the Dockerfile's secrets: its index and its certificates."""
    files = ("/etc/pip.conf", "~/.config/pip/pip.conf", "~/.pip/pip.conf", os.environ.get("PIP_CONFIG_FILE", ""))
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(Path(file).expanduser() for file in files if file)
    known = dict(parser["global"]) if parser.has_section("global") else {}
    known |= {
        name[4:].lower().replace("_", "-"): value for name, value in os.environ.items() if name.startswith("PIP_")
    }
    wanted: dict[str, str] = {
        name: known[name] for name in ("index-url", "extra-index-url", "trusted-host", "proxy") if name in known
    }
    with tempfile.TemporaryDirectory() as scratch:
        words: list[str] = []
        if "cert" in known:
            wanted["cert"] = "/run/ca.crt"
            words += ["--secret", f"id=ca.crt,src={known['cert']}"]
        file = Path(scratch) / "pip.conf"
        file.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in wanted.items()))
        yield [*words, "--secret", f"id=pip.conf,src={file}"]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One build at a time on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prune(folder: Path, target: str) -> None:
    archives = sorted(folder.glob(f"{target}-*.tar"), key=lambda path: path.stat().st_mtime)
    for old in archives[:-_KEPT_ARCHIVES]:
        old.unlink()
    if len(_buildah("images", "--quiet").split()) > _KEPT_IMAGES:
        _buildah("rmi", "--all", "--force")
