"""Whole .pt archives in one call, and torch's own taken apart, for tests that are not about streaming."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ckpt2pt.formats.torchfile.archive import finish, lay_out


class Parts(NamedTuple):
    """What an archive is made of, as Python's zipfile sees it."""

    stem: str
    pickle: bytes
    payloads: list[bytes]
    serialization_id: str


def write_archive(
    path: Path, stem: str, pickle: bytes, payloads: Sequence[bytes], serialization_id: str | None = None
) -> int:
    """Write an archive; returns the CRC-32 that ``finish`` gives for the file."""
    layout = lay_out(stem, pickle, [len(payload) for payload in payloads])
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for index, payload in enumerate(payloads):
            os.pwrite(fd, payload, layout.storage_offset(index))
        return finish(fd, layout, [zlib.crc32(payload) for payload in payloads], serialization_id=serialization_id)
    finally:
        os.close(fd)


def take_apart(path: Path) -> Parts:
    """The parts of an archive that torch wrote."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        stem = names[0].partition("/")[0]
        storages = [name for name in names if name.startswith(f"{stem}/data/")]
        return Parts(
            stem,
            archive.read(f"{stem}/data.pkl"),
            [archive.read(name) for name in storages],
            archive.read(f"{stem}/.data/serialization_id").decode(),
        )
