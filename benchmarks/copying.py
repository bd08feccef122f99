"""Ways to copy a file with a CRC-32 of its bytes, side by side: what the engine's way was chosen by.

    .venv/bin/python benchmarks/copying.py [--rounds 5] [--work FOLDER]

Each copies 1 GiB that is in the page cache, from byte 64 on as a payload lies in a checkpoint, and ends with fsync.
The ways take turns; wall and CPU seconds are the medians, also as multiples of `copy_file_range`, which is what cp does.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from ckpt2pt.engine.blocks import Blocks, OutputFile
from ckpt2pt.io.checksums import crc32
from measure import commit, host, today, warm

NBYTES, SHIFT, KIB = 1 << 30, 64, 1 << 10
Way = Callable[[int, Path], None]


def create(target: Path, *, reserve: bool, flags: int = 0) -> int:
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o644)
    if reserve:
        os.posix_fallocate(fd, 0, NBYTES)
    return fd


def copied_by_kernel(size: int, *, look: bool) -> Way:
    """``look`` reads the bytes once more for the CRC."""

    def copy(source: int, target: Path) -> None:
        fd, block = create(target, reserve=False), memoryview(mmap.mmap(-1, size))
        for start in range(0, NBYTES, size):
            done = 0
            while done < size:
                done += os.copy_file_range(source, fd, size - done, start + SHIFT + done, start + done)
            if look:
                os.preadv(source, [block], start + SHIFT)
                crc32(block, 0)
        os.fsync(fd)
        os.close(fd)

    return copy


def buffered(size: int, *, reserve: bool, crc: bool = True) -> Way:
    def copy(source: int, target: Path) -> None:
        fd, block = create(target, reserve=reserve), memoryview(mmap.mmap(-1, size))
        for start in range(0, NBYTES, size):
            os.preadv(source, [block], start + SHIFT)
            if crc:
                crc32(block, 0)
            os.pwrite(fd, block, start)
        os.fsync(fd)
        os.close(fd)

    return copy


def mapped(size: int) -> Way:
    def copy(source: int, target: Path) -> None:
        fd = create(target, reserve=False)
        with mmap.mmap(source, 0, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
            for start in range(0, NBYTES, size):
                with view[start + SHIFT : start + SHIFT + size] as block:
                    crc32(block, 0)
                    os.pwrite(fd, block, start)
        os.fsync(fd)
        os.close(fd)

    return copy


def direct(size: int) -> Way:
    """As the engine does it."""

    def copy(source: int, target: Path) -> None:
        fd = create(target, reserve=True)
        past = os.open(target, os.O_WRONLY | os.O_DIRECT)
        file = OutputFile(path=target, fd=fd, direct=past)
        with Blocks(size) as blocks:
            for start in range(0, NBYTES, size):
                block = blocks.take()
                os.preadv(source, [block[:size]], start + SHIFT)
                crc32(block[:size], 0)
                blocks.write(file, start, block, 0, size)
            blocks.drain()
        os.fsync(fd)
        os.close(past)
        os.close(fd)

    return copy


def direct_alone(size: int) -> Way:
    def copy(source: int, target: Path) -> None:
        fd, block = create(target, reserve=True, flags=os.O_DIRECT), memoryview(mmap.mmap(-1, size))
        for start in range(0, NBYTES, size):
            os.preadv(source, [block], start + SHIFT)
            crc32(block, 0)
            os.pwrite(fd, block, start)
        os.fsync(fd)
        os.close(fd)

    return copy


WAYS: dict[str, Way] = {
    "copy_file_range, no CRC": copied_by_kernel(NBYTES, look=False),
    "read, write 512 KiB, no CRC": buffered(512 * KIB, reserve=False, crc=False),
    "read, CRC, write 128 KiB": buffered(128 * KIB, reserve=False),
    "read, CRC, write 512 KiB": buffered(512 * KIB, reserve=False),
    "read, CRC, write 512 KiB, reserved": buffered(512 * KIB, reserve=True),
    "copy_file_range 512 KiB, read, CRC": copied_by_kernel(512 * KIB, look=True),
    "mmap, CRC, write 512 KiB": mapped(512 * KIB),
    "read, CRC, direct write 1 MiB": direct_alone(1024 * KIB),
    "the same, 2 writers": direct(1024 * KIB),
    "the same, 2 writers, 2 MiB": direct(2048 * KIB),
}


def once(way: Way, source: int, target: Path) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    target.unlink(missing_ok=True)
    os.sync()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    way(source, target)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    source = folder / "source"
    with source.open("wb") as file:
        for _ in range(NBYTES >> 20):
            file.write(os.urandom(1 << 20))
        file.write(bytes(SHIFT))
    warm([source])
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    fd = os.open(source, os.O_RDONLY)
    for _ in range(rounds):
        for name, way in WAYS.items():
            samples[name].append(once(way, fd, folder / "target"))
    os.close(fd)
    middle = {name: [median(column) for column in zip(*found, strict=True)] for name, found in samples.items()}
    base = next(iter(middle.values()))
    return {
        name: {
            "wall": round(wall, 3),
            "cpu": round(cpu, 3),
            "wall_ratio": round(wall / base[0], 2),
            "cpu_ratio": round(cpu / base[1], 2),
        }
        for name, (wall, cpu) in middle.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    facts = host()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        found = measure(Path(folder), options.rounds)
    for name, row in found.items():
        print(f"{name:36}" + "".join(f"{key} {value:7.2f}  " for key, value in row.items()))
    document = {"theme": "copying", "date": today(), "commit": commit(), "host": facts, "rounds": options.rounds}
    path = Path(__file__).parent / "results" / f"copying_{today()}.json"
    path.write_text(json.dumps(document | {"ways": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
