"""What a power failure may leave of a folder, from the system calls of a real run.

    strace -f ... command  ->  record()  [Call]  ->  Disk.apply(call)  ->  Disk.crash(dice, folder)

The disk is as weak as POSIX allows: a name is durable only after its directory was synced, bytes only after their file was,
and whatever is not durable may be there, or not, in any combination and order; bytes in sectors, whole or as zeros.  Journalling file systems keep more.  A rename
inside one directory is one change; from one directory to another it is two, which may be kept apart.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

CHANGING = """
    open openat creat write pwrite64 writev pwritev pwritev2 ftruncate truncate fallocate rename renameat renameat2 unlink
    unlinkat mkdir mkdirat rmdir link linkat symlink symlinkat copy_file_range sendfile splice fsync fdatasync sync syncfs lseek
"""
SECTOR = 512
_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += +(-?\d+)")
_HEX = re.compile(r"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One finished system call: its name, its arguments as text, and what it returned."""

    name: str
    args: str
    result: int

    def strings(self) -> list[bytes]:
        """Quoted arguments: paths and data."""
        return [_bytes(found) for found in re.findall(r'"([^"]*)"', self.args)]

    def fd_paths(self) -> list[str]:
        """Paths of the descriptors among the arguments."""
        return [_bytes(found).decode() for found in re.findall(r"(?:\d+|AT_FDCWD)<([^>]*)>", self.args)]

    def numbers(self) -> list[int]:
        """Plain numbers among the arguments, in order."""
        plain = re.sub(r'"[^"]*"', "", self.args)
        return [int(word) for word in re.split(r"\s*,\s*", plain.strip()) if re.fullmatch(r"-?\d+", word)]


def _bytes(text: str) -> bytes:
    return bytes(int(found, 16) for found in _HEX.findall(text))


def record(command: Sequence[str], log: Path, *, tool: str = "strace") -> list[Call]:
    """Run a command and every process that it starts; their system calls that change files, as they ended."""
    trace = [
        tool,
        "-f",
        "-y",
        "-xx",
        "-s",
        str(1 << 24),
        "-o",
        str(log),
        "-e",
        f"trace={','.join(CHANGING.split())}",
        "--",
    ]
    subprocess.run([*trace, *command], check=True, capture_output=True)
    return list(_calls(log))


def _calls(log: Path) -> Iterator[Call]:
    begun: dict[str, str] = {}
    for line in log.read_text().splitlines():
        thread, _, rest = line.partition(" ")
        if rest.endswith("<unfinished ...>"):
            begun[thread] = rest.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r" *<\.\.\. \w+ resumed>(.*)", rest):
            rest = begun.pop(thread) + resumed.group(1)
        if (found := _LINE.match(f"{thread} {rest.strip()}")) and int(found.group(4)) >= 0:
            yield Call(name=found.group(2), args=found.group(3), result=int(found.group(4)))


@dataclass(slots=True, eq=False)
class File:
    """Bytes as they are, as they are on the disk, and the writes in between."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    position: int = 0

    def write(self, offset: int, data: bytes) -> None:
        if len(self.data) < offset + len(data):
            self.data.extend(bytes(offset + len(data) - len(self.data)))
        self.data[offset : offset + len(data)] = data
        self.pending.append((offset, data))

    def resize(self, size: int) -> None:
        self.data = bytearray(self.data[:size]) + bytearray(max(0, size - len(self.data)))
        self.pending.append((size, b""))

    def sync(self) -> None:
        self.durable, self.pending = bytes(self.data), []

    def after_crash(self, dice: Random) -> bytes:
        kept = File(data=bytearray(self.durable))
        for offset, data in self.pending:
            if dice.random() < 0.5:
                written = data[: dice.randint(0, len(data) // SECTOR) * SECTOR] if len(data) > SECTOR else data
                kept.write(offset, written if dice.random() < 0.8 else bytes(len(written)))
        return bytes(kept.data)


Change = dict[str, "File | Folder | None"]


@dataclass(slots=True, eq=False)
class Folder:
    """Names as they are, as they are on the disk, and the changes in between."""

    names: dict[str, File | Folder] = field(default_factory=dict[str, "File | Folder"])
    durable: dict[str, File | Folder] = field(default_factory=dict[str, "File | Folder"])
    pending: list[Change] = field(default_factory=list[Change])

    def change(self, change: Change) -> None:
        _assign(self.names, change)
        self.pending.append(change)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.names), []

    def after_crash(self, dice: Random) -> dict[str, File | Folder]:
        kept = dict(self.durable)
        likely = dice.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for number, change in enumerate(self.pending):
            # The newest change is what a program relies on most: it is kept more often than what it should have waited for.
            if dice.random() < likely or (number == len(self.pending) - 1 and dice.random() < 0.5):
                _assign(kept, change)
        return kept


def _assign(names: dict[str, File | Folder], change: Change) -> None:
    for name, node in change.items():
        names.pop(name, None)
        if node is not None:
            names[name] = node


class Disk:
    """Everything below one directory, which is there and durable from the start."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._top = _load(Path(self._root))

    def apply(self, call: Call) -> bool:
        """Follow one call; whether it changed what a crash may leave."""
        name = call.name
        if name in {"write", "pwrite64", "ftruncate", "fallocate", "lseek", "fsync", "fdatasync"}:
            return self._on_descriptor(call)
        if name in {"open", "openat", "creat"}:
            return self._open(call)
        if name in {"rename", "renameat", "renameat2"}:
            return self._rename(call)
        if name in {"mkdir", "mkdirat"}:
            return self._enter(self._paths(call)[0], Folder())
        if name in {"unlink", "unlinkat", "rmdir"}:
            return self._enter(self._paths(call)[0], None)
        if name in {"sync", "syncfs"} or any(self._below(path) for path in (*self._paths(call), *call.fd_paths())):
            raise NotImplementedError(f"{name}({call.args[:200]})")
        return False

    def crash(self, dice: Random, folder: Path) -> None:
        """Write what the disk may hold after a power failure now into an empty folder."""
        _store(self._top, folder, dice)

    def now(self) -> dict[str, bytes]:
        """Every file by its path below the root, as the programs see it."""
        return dict(_walk(self._top, ""))

    def _below(self, path: str) -> bool:
        return path == self._root or path.startswith(f"{self._root}/")

    def _paths(self, call: Call) -> list[str]:
        """Path arguments, made absolute by the directory descriptors before them."""
        strings = [found.decode() for found in call.strings()]
        bases = call.fd_paths() if call.name.endswith(("at", "at2")) else []
        bases += [os.getcwd()] * (len(strings) - len(bases))
        return [os.path.normpath(os.path.join(base, path)) for base, path in zip(bases, strings, strict=False)]

    def _find(self, path: str) -> File | Folder | None:
        node: File | Folder | None = self._top
        for name in Path(path).relative_to(self._root).parts:
            node = node.names.get(name) if isinstance(node, Folder) else None
        return node

    def _parent(self, path: str) -> Folder:
        folder = self._find(str(Path(path).parent))
        assert isinstance(folder, Folder), f"{path}: its directory was never seen"
        return folder

    def _enter(self, path: str, node: File | Folder | None) -> bool:
        if not self._below(path):
            return False
        self._parent(path).change({Path(path).name: node})
        return True

    def _open(self, call: Call) -> bool:
        path = self._paths(call)[0]
        if not self._below(path):
            return False
        node, made = self._find(path), False
        if node is None and ("O_CREAT" in call.args or call.name == "creat"):
            node, made = File(), True
            self._enter(path, node)
        if isinstance(node, File):
            node.position = 0
            if "O_TRUNC" in call.args and node.data:
                node.resize(0)
                return True
        return made

    def _rename(self, call: Call) -> bool:
        old, new = self._paths(call)
        if not self._below(old):
            assert not self._below(new), f"{old} came from outside"
            return False
        node, other = self._find(old), self._find(new) if "RENAME_EXCHANGE" in call.args else None
        assert node is not None, f"{old} was never seen"
        if self._parent(old) is self._parent(new):
            self._parent(new).change({Path(old).name: other, Path(new).name: node})
        else:
            self._parent(new).change({Path(new).name: node})
            self._parent(old).change({Path(old).name: other})
        return True

    def _on_descriptor(self, call: Call) -> bool:
        path = call.fd_paths()[0] if call.fd_paths() else ""
        node = self._find(path) if self._below(path) else None
        if node is None:
            return False  # not below the root, or a file that has no name any more
        if call.name in {"fsync", "fdatasync"}:
            node.sync()
            return False
        assert isinstance(node, File)
        if call.name == "lseek":
            node.position = call.result
            return False
        if call.name in {"ftruncate", "fallocate"}:
            *_, last = call.numbers()
            size = last if call.name == "ftruncate" else max(len(node.data), sum(call.numbers()[-2:]))
            node.resize(size)
            return True
        offset = node.position if call.name == "write" else call.numbers()[-1]
        node.write(offset, call.strings()[0][: call.result])
        if call.name == "write":
            node.position += call.result
        return True


def _load(path: Path) -> Folder:
    names: dict[str, File | Folder] = {}
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            names[entry.name] = _load(Path(entry.path))
        else:
            data = Path(entry.path).read_bytes()
            names[entry.name] = File(data=bytearray(data), durable=data)
    return Folder(names=names, durable=dict(names))


def _store(folder: Folder, path: Path, dice: Random) -> None:
    path.mkdir(exist_ok=True)
    for name, node in folder.after_crash(dice).items():
        if isinstance(node, Folder):
            _store(node, path / name, dice)
        else:
            (path / name).write_bytes(node.after_crash(dice))


def _walk(folder: Folder, path: str) -> Iterator[tuple[str, bytes]]:
    for name, node in folder.names.items():
        if isinstance(node, Folder):
            yield from _walk(node, f"{path}{name}/")
        else:
            yield f"{path}{name}", bytes(node.data)


def available() -> bool:
    """Whether system calls can be recorded here."""
    return shutil.which("strace") is not None
