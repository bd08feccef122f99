"""Measure whole processes.  Imports nothing large: a child's peak memory starts at that of its parent."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One process with all of its children: ``rss`` is the largest of any single one, ``read`` and ``written`` are bytes
    that passed through system calls, whoever served them.
    """

    wall: float
    user: float
    system: float
    rss: int
    read: int
    written: int
    resident_before: int | None = None

    @property
    def cpu(self) -> float:
        """Seconds of processor time."""
        return self.user + self.system


def run(command: Sequence[str | Path], *, inside: Path | None = None) -> Sample:
    """Run a command to its end; ``inside`` is a cgroup it enters first."""
    words = [str(word) for word in command]
    if inside:
        words = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(inside / "cgroup.procs"), *words]
    before, began = _passed(), time.perf_counter()
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=installed())
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{words[:4]} ended with {child.returncode}")
    read, written = (after - count for after, count in zip(_passed(), before, strict=True))
    return Sample(
        wall=wall, user=usage.ru_utime, system=usage.ru_stime, rss=usage.ru_maxrss << 10, read=read, written=written
    )


def installed() -> dict[str, str]:
    """The environment of an installed program, which has its bytecode: without it a start takes twice as long."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def _passed() -> tuple[int, int]:
    """Bytes read and written by this process and by its children that it has waited for."""
    reported = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(reported["rchar"]), int(reported["wchar"])


def summary(samples: Sequence[Sample]) -> dict[str, object]:
    """Medians, and every sample."""
    return {
        "wall": round(median(s.wall for s in samples), 3),
        "cpu": round(median(s.cpu for s in samples), 3),
        "rss": max(s.rss for s in samples),
        "read": round(median(s.read for s in samples)),
        "written": round(median(s.written for s in samples)),
        "samples": [
            {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(s).items()}
            for s in samples
        ],
    }


def warm(files: Iterable[Path]) -> None:
    """Read files so that the page cache holds them."""
    buffer = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cool(files: Sequence[Path]) -> int | None:
    """Drop files from the page cache; the bytes of them that are still in it, None where `fincore` is missing."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    try:
        reported = subprocess.run(
            ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, files)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return sum(map(int, reported.stdout.split()))


@contextmanager
def memory_limit(nbytes: int) -> Iterator[Path | None]:
    """A memory cgroup (v1 or v2) with this limit; None where this user may not make one."""
    root = Path("/sys/fs/cgroup")
    v2 = (root / "cgroup.controllers").exists()
    folder = (root if v2 else root / "memory") / f"ckpt2pt-bench-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        yield None
        return
    try:
        try:
            (folder / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(nbytes))
            found: Path | None = folder
        except OSError:
            found = None
        yield found
    finally:
        for _ in range(50):
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def host() -> dict[str, object]:
    """What the numbers depend on; nothing that names the machine."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "memory": int(memory[1]) << 10 if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def commit() -> str:
    """The commit that was measured; ``+`` says that the tree held changes."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "../converter", ".")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def today() -> str:
    """The date in UTC."""
    return datetime.now(UTC).date().isoformat()
