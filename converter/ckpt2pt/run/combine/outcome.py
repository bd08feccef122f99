"""What a merge did, for a person and for a program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckpt2pt.errors import printable
from ckpt2pt.formats.mindspore.filenames import CheckpointId
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import checksums_told, counted, size


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """What a merge did."""

    output: str
    when: CheckpointId
    ranks: int
    written: int
    kept: int
    bytes_written: int
    seconds: float
    source_checksums: Mapping[str, int]

    def document(self) -> Json:
        """For ``--output json``."""
        return {
            "output": self.output,
            "epoch": self.when[0],
            "step": self.when[1],
            "ranksMerged": self.written,
            "ranksKept": self.kept,
            "shardsPerRank": self.ranks,
            "bytesWritten": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "sourceChecksums": dict(self.source_checksums),
        }

    def sentence(self) -> str:
        """For a person."""
        did = f"merged {counted(self.written, 'rank')} of {counted(self.ranks, 'shard')} each ({size(self.bytes_written)}) in {self.seconds:.1f} s"
        if not self.written:
            did = "everything was there already"
        elif self.kept:
            did += f", kept {self.kept} that were there"
        did += checksums_told(self.source_checksums)
        return f"epoch {self.when[0]}, step {self.when[1]}: {did}\n{printable(self.output)}"
