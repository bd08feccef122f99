"""Metadata that was made for a conversion, read as if a ``pt_meta`` had it; nothing is written to a disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt2pt.core.buckets import Buffer, ChunkMap
from ckpt2pt.errors import FormatError, aside
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.ptmeta.files import RankFiles, arguments_file
from ckpt2pt.formats.ptmeta.metadata import RankMeta, read_template
from ckpt2pt.io.files import write_all


def meta_of_files(made: RankFiles, where: Path) -> RankMeta:
    """Metadata that was made for a rank, as if it had been read."""
    names = [tuple(name.partition(".")[2] for name in reversed(chunk)) for chunk in made.names]
    return RankMeta(template=template_of_files(made, where), chunks=chunks_of(names, made.buffers, where))


def template_of_files(made: RankFiles, where: Path) -> Template:
    """The template as a file of the metadata would give it; it lies in memory: a pod's root may be read-only.

    ``where`` is the checkpoint that it was made from, which errors name.
    """
    memory = _Memory(os.memfd_create(f"args_tp{made.tp:02d}_pp{made.pp:03d}"))
    content, path = arguments_file(made, with_maps=True), Path(f"/proc/self/fd/{memory.fd}")
    write_all(memory.fd, memoryview(content), 0)
    return replace(read_template(path), file=memory, origin=str(where))


@dataclass(slots=True)
class _Memory:
    """A file in memory, which is there for as long as this is."""

    fd: int

    def __del__(self) -> None:
        os.close(self.fd)


def chunks_of(
    names: Sequence[tuple[str, ...]], buffers: Sequence[Sequence[Buffer]], where: Path
) -> tuple[ChunkMap, ...]:
    """Chunks that have parameters, each with its buffer where there is one."""
    if any(len(chunk) > 1 for chunk in buffers):
        raise FormatError(
            "parameters of several types in one chunk",
            where=where,
            hint=f"convert weights alone{aside('mode')}; the optimizer of such a model is not supported",
        )
    return tuple(
        ChunkMap(vpp=vpp, names=listed, buffer=buffers[vpp][0] if buffers and buffers[vpp] else None)
        for vpp, listed in enumerate(names)
        if listed
    )
