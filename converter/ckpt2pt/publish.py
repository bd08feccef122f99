"""The target folder: claim, locks, manifests, tracker.  A name appears only when its bytes are whole.

megatron_pt/latest_checkpointed_iteration.txt      last of all, and never back
megatron_pt/iter_0000500/.ckpt2pt/claim.json       whose folder this is
/rank-01-003.json both files of a rank are there
/stage-003.json   every rank of a stage is there and verified
/report.json      written with the tracker
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import socket
import stat
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from ckpt2pt.errors import TargetConflictError, TryAgainError
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.records import Json, load, seal, seal_joined, unseal
from ckpt2pt.system.access import access_error
from ckpt2pt.system.files import read_bytes, write_all

TRACKER = "latest_checkpointed_iteration.txt"
STATE = ".ckpt2pt"
PARTIAL = ".partial"
_MAX_DIGITS, _CLAIMED = 19, ("identity", "purpose", "base", "full")


def host() -> str:
    """Who we are, for whoever finds our lock: the pod's name, which its host name cuts short, else the machine's."""
    return os.environ.get("CKPT2PT_POD_NAME") or socket.gethostname()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Some network file systems do not sync folders and say so.
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def read_tracker(folder: Path) -> str:
    """What Megatron's tracker says: digits or ``release``; empty when there is none."""
    try:
        return (folder / TRACKER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def rank_name(tp: int, pp: int) -> str:
    """Name of a rank's manifest."""
    return f"rank-{tp:02d}-{pp:03d}.json"


def partial_name(path: Path) -> Path:
    """A name beside ``path`` that no reader of either framework picks up."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")


def publish_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a small file, given whole or in pieces, whole or not at all."""
    partial = partial_name(path)
    try:
        with partial.open("xb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise access_error(error, path, "writing") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, what: str, *, wait: bool) -> Generator[None]:
    """Hold a lock file; whoever is second waits, or is told who is at it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise access_error(error, path, "opening the lock file") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = read_bytes(fd, 200, 0).decode(errors="replace").strip() or "another process"
            raise TryAgainError(
                f"another run is {what}: {holder}",
                where=path,
                mend="wait for it to finish, or stop it; then run the same command again",
            ) from None
        except OSError as error:
            # A file system without locks (ENOLCK, ENOTSUP): renames keep the result whole all the same.
            if error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}:
                raise access_error(error, path, "locking") from error
        with suppress(OSError):  # only whoever is second reads it; a full disk is told by what needs the room
            os.ftruncate(fd, 0)
            write_all(fd, memoryview(f"{host()} pid {os.getpid()}\n".encode()), 0)
        yield
    finally:
        os.close(fd)


def read_record(path: Path) -> Json | None:
    """A sealed document; None when it is not there, or not as it was written."""
    return unseal(_read(path))


def read_json(path: Path) -> Json | None:
    """A small document of anybody's; None when it is not there or not whole."""
    return load(_read(path))


def _read(path: Path) -> bytes:
    """Nothing where there is no regular file: a named pipe would be waited for."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            return file.read() if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    except (FileNotFoundError, IsADirectoryError):
        return b""
    except OSError as error:
        raise access_error(error, path, "reading", reading=True) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How a target folder is laid out.

    ``folder`` is the iteration's place below the root (the root itself when empty), ``results`` what a conversion puts
    there, ``alone`` whether nothing else may be there; ``option`` names the folder's option in the user's words.
    """

    reader: str
    folder: str
    results: tuple[str, ...]
    alone: bool
    tracker: bool
    option: str
    replace: str


MEGATRON = Kind(
    reader="Megatron",
    folder="iter_{:07d}",
    results=("mp_rank_*/*.pt",),
    alone=True,
    tracker=True,
    option="spec.target.path (--megatron-path)",
    replace="spec.target.overwrite (--overwrite)",
)
MINDSPORE = Kind(
    reader="MindSpore",
    folder="",
    results=("rank_*/*.ckpt", "rank_*/*.safetensors", "pt_meta/args_tp*.pt", "pt_meta/*.json"),
    alone=False,
    tracker=False,
    option="--ms-path",
    replace="--overwrite",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One iteration's folder, owned by one conversion.

    ``identity`` is the digest of everything that decides what is written, ``purpose`` that of the options alone, and
    ``ranks`` those of the options and what each rank is read from.  Without ``purpose`` any change makes another conversion.
    ``base`` is the digest of the source and of the options but for ``full``: parameters alone, and with the optimizer.
    """

    root: Path
    iteration: int
    identity: str
    stages: int
    tensor: int
    purpose: str = ""
    ranks: Mapping[Rank, str] = field(default_factory=dict[Rank, str])
    kind: Kind = MEGATRON
    base: str = ""
    full: bool = True

    @property
    def reader(self) -> str:
        """The framework that loads it."""
        return self.kind.reader

    @property
    def folder(self) -> Path:
        """``root/iter_0000500``, or the root for MindSpore."""
        return self._at(self.iteration)

    def _at(self, iteration: int) -> Path:
        return self.root / self.kind.folder.format(iteration)

    @property
    def state(self) -> Path:
        """Where claim, manifests and locks lie."""
        return self.folder / STATE

    def check(self, *, overwrite: bool) -> None:
        """Refuse a folder that is somebody else's; touches nothing."""
        data = _read(self.state / "claim.json")  # once: another worker may be about to write it
        claim = unseal(data)
        if overwrite or (claim and self._is_ours(claim)):
            return
        mend = f"choose another {self.kind.option}, or replace it with {self.kind.replace}"
        if data and claim is None:
            raise TargetConflictError(
                "the claim of the conversion there is damaged", where=self.state / "claim.json", mend=mend
            )
        if claim is not None:
            raise TargetConflictError(
                f"iteration {self.iteration} there is the result of another conversion "
                f"(begun {claim.get('begun')} by {claim.get('host')}): other options, another source, or a source that changed since",
                where=self.folder,
                mend=mend,
            )
        with suppress(FileNotFoundError):
            found = self.folder.iterdir() if self.kind.alone else self._results()
            strangers = sorted(p.name for p in found if p.name != STATE)
            if strangers and _read(self.state / "claim.json") != data:
                self.check(overwrite=overwrite)  # another worker has taken the folder meanwhile, and begun
            elif strangers:
                raise TargetConflictError(
                    f"the folder holds {strangers[0]}, which ckpt2pt did not write",
                    where=self.folder,
                    mend=mend,
                )

    def _is_ours(self, claim: Json) -> bool:
        """Whether a claim is of this conversion, or of the parameters of its source, which it extends."""
        extends = self.base and claim.get("base") == self.base and self.full and claim.get("full") is False
        return bool(extends) or claim.get("identity") == self.identity or self._goes_on(claim)

    def _goes_on(self, claim: Json) -> bool:
        """Whether the same was begun with a source that was mended since, and nothing is published yet."""
        return bool(self.purpose) and claim.get("purpose") == self.purpose and not (self.state / "report.json").exists()

    def _results(self) -> Iterator[Path]:
        return (path for pattern in self.kind.results for path in self.folder.glob(pattern))

    def claim(self, facts: Json, *, overwrite: bool) -> None:
        """Take the folder.  A worker of the same conversion finds it taken and goes on."""
        self.check(overwrite=overwrite)
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            with self._lock("claim", wait=True):
                self.check(overwrite=overwrite)
                sweep_partials(self.state, "claim.json")
                old = read_record(self.state / "claim.json")
                if old and old.get("identity") == self.identity:
                    return
                with ExitStack() as alone:
                    if not (old and self._goes_on(old)):
                        alone.enter_context(self._nobody_at_work())
                        self._retire()
                    publish_bytes(
                        self.state / "claim.json",
                        seal({name: getattr(self, name) for name in _CLAIMED} | {"host": host(), **facts}),
                    )
        except OSError as error:
            raise access_error(error, self.folder, "taking the target folder") from error

    @contextmanager
    def _nobody_at_work(self) -> Generator[None]:
        """Hold every stage that a run has begun here, so that none is at it; call with the claim's lock held."""
        with ExitStack() as locks:
            for path in sorted(self.state.glob("stage-*.lock")):
                locks.enter_context(locked(path, "converting a stage of what is to be replaced", wait=False))
            yield

    def _retire(self) -> None:
        """Take back what an older conversion published here: the tracker first, then its manifests."""
        if self.kind.tracker and self._tracked() == str(self.iteration):
            (self.root / TRACKER).unlink(missing_ok=True)
            sync_folder(self.root)
        for path in (*self.state.glob("*.json"), *self._results()):
            path.unlink(missing_ok=True)

    @contextmanager
    def stage_lock(self, pp: int) -> Generator[None]:
        """Hold a stage; a second run on it is told who has it.  Refused when the folder was taken away meanwhile."""
        with self._lock(f"stage-{pp:03d}", wait=False):
            with self._lock("claim", wait=True):
                self.check(overwrite=False)
                claim = read_record(self.state / "claim.json") or {}
            if claim.get("identity") != self.identity:
                raise TryAgainError(
                    f"a conversion of another source, or of this one as it is now, took the folder over ({claim.get('host')})",
                    where=self.folder,
                    mend="run the same command again, if both were not meant for the same place",
                )
            yield

    def _lock(self, name: str, *, wait: bool) -> AbstractContextManager[None]:
        return locked(self.state / f"{name}.lock", "converting this stage", wait=wait)

    def sweep(self, tp: int, pp: int, directory: str) -> None:
        """Remove what a killed run of this rank left behind; call with the stage's lock held."""
        sweep_partials(self.folder / directory, "")
        sweep_partials(self.state, rank_name(tp, pp))
        sweep_partials(self.state, f"stage-{pp:03d}.json")

    def rank_manifest(self, tp: int, pp: int) -> Json | None:
        """The manifest of a finished rank whose files are still there with their sizes; None otherwise."""
        manifest = read_record(self.state / rank_name(tp, pp))
        ours = manifest is not None and self.is_of_rank((tp, pp), manifest) and self.has_files(manifest)
        return manifest if ours else None

    def has_files(self, manifest: Json) -> bool:
        """Whether all files that a manifest lists are there with their sizes."""
        files = cast("list[Json]", manifest.get("files", []))
        try:
            return all((self.folder / str(file["path"])).stat().st_size == file["nbytes"] for file in files)
        except OSError:
            return False

    def file_count(self, tp: int, pp: int) -> int:
        """Files of a finished rank, 0 while it is not finished."""
        return len(cast("list[Json]", (self.rank_manifest(tp, pp) or {}).get("files", [])))

    def publish_rank(self, tp: int, pp: int, manifest: Json) -> None:
        """Say that a rank's files are there."""
        facts = {"identity": self.ranks.get((tp, pp), self.identity), **manifest}
        publish_bytes(self.state / rank_name(tp, pp), seal(facts))

    def stage_manifest(self, pp: int) -> Json | None:
        """The manifest of a finished stage of this conversion, None while a rank is missing."""
        manifest = read_record(self.state / f"stage-{pp:03d}.json")
        if manifest is None or not self.is_of_stage(pp, manifest):
            return None
        return manifest if all(self.rank_manifest(tp, pp) for tp in range(self.tensor)) else None

    def is_of_stage(self, pp: int, manifest: Json) -> bool:
        """Whether a stage's manifest joins ranks of this conversion and of what they read now."""
        return manifest.get("identity") == self._stage_identity(pp)

    def _stage_identity(self, pp: int) -> str:
        ranks = [self.ranks[tp, pp] for tp in range(self.tensor) if (tp, pp) in self.ranks]
        return hashlib.sha256("".join(ranks).encode()).hexdigest() if ranks else self.identity

    def is_of_rank(self, rank: Rank, manifest: Json) -> bool:
        """Whether a rank's manifest is of this conversion and of what it reads now."""
        return manifest.get("identity") == self.ranks.get(rank, self.identity)

    def publish_stage(self, pp: int, facts: Mapping[str, object]) -> None:
        """Join the ranks' manifests.  The ranks' own stay: a rerun looks at them."""
        ranks = [self.rank_manifest(tp, pp) for tp in range(self.tensor)]
        if not all(ranks):
            raise TryAgainError(
                f"files of tp {ranks.index(None)} pp {pp} were removed while the stage was converted",
                where=self.folder,
                mend="keep other programs out of this folder, and run the same command again",
            )
        publish_bytes(
            self.state / f"stage-{pp:03d}.json",
            seal({"identity": self._stage_identity(pp), "stage": pp, **facts, "ranks": ranks}),
        )

    def publish_iteration(self) -> bool:
        """Write report and tracker when every stage is there.  Any worker may; all write the same."""
        there = set(os.listdir(self.state))  # one look for all stages: each worker that ends comes by here
        if any(f"stage-{pp:03d}.json" not in there for pp in range(self.stages)):
            return False
        if not all(self.stage_manifest(pp) for pp in range(self.stages)):
            return False
        with self._lock("publish", wait=True):
            sweep_partials(self.state, "report.json")
            publish_bytes(self.state / "report.json", seal_joined(self._head, "stages", self._briefs()))
            if self.kind.tracker and self.newer is None:
                publish_bytes(self.root / TRACKER, str(self.iteration).encode())
        return True

    @property
    def _head(self) -> Json:
        return {"identity": self.identity, "iteration": self.iteration}

    def _briefs(self) -> Iterator[Json]:
        """One stage after the other: together they may be larger than what a worker needs."""
        for pp in range(self.stages):
            path = self.state / f"stage-{pp:03d}.json"
            manifest = read_record(path)
            if manifest is None:
                raise TryAgainError("the manifest was removed", where=path, mend="run the same command again")
            yield _brief(manifest)

    def report(self, manifests: Iterable[Json]) -> Json:
        """The whole conversion in one document."""
        return {**self._head, "stages": [_brief(manifest) for manifest in manifests]}

    @property
    def newer(self) -> int | None:
        """A later iteration that the tracker names, and that is there: Megatron would go back in time without a word."""
        named = self._tracked() if self.kind.tracker else ""
        return int(named) if named and int(named) > self.iteration and self._at(int(named)).is_dir() else None

    def _tracked(self) -> str:
        """Digits that the tracker holds; empty where it holds something else."""
        named = read_tracker(self.root)
        return named if named.isdecimal() and named.isascii() and len(named) < _MAX_DIGITS else ""


def sweep_partials(folder: Path, name: str) -> None:
    """Remove temporary files that were to become ``name`` (any name when empty)."""
    for path in folder.glob(f".{name}*{PARTIAL}"):
        with suppress(OSError):
            path.unlink()


def _brief(manifest: Json) -> Json:
    """A stage's manifest without the digests of single tensors, which stay in the stage's own file."""
    ranks = cast("list[Json]", manifest.get("ranks", []))
    return {**manifest, "ranks": [{key: value for key, value in rank.items() if key != "tensors"} for rank in ranks]}
