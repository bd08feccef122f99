"""One rank of a result, in either direction: its files are written, proved and published, and then its manifest.

files, moves --engine.write--> temporary files --reading.prove_result--> names --> metadata --> manifest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.moves import Move
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.request import Verify
from ckpt2pt.engine.write import ReadPieces, Stop, Written, write_files
from ckpt2pt.io.checksums import crc32
from ckpt2pt.io.framing import Payload
from ckpt2pt.io.records import Json
from ckpt2pt.publish import Target, make_folder, publish_bytes, sweep_partials
from ckpt2pt.publish.ledger import file_entry


class Reading(Protocol):
    """What a rank is read from, and how it is known that what was read is right."""

    def prove_unchanged(self) -> None:
        """Refuse files that are not those any more whose headers were read."""
        ...

    def prove_read(self, read: ReadPieces) -> Mapping[str, int]:
        """Compare what was read with the source's own checksums: how many files were verified, not checked, or state none."""
        ...

    def prove_result(self, partials: Mapping[str, Path], heed: Callable[[], None]) -> Mapping[str, int]:
        """Compare complete temporary files, by name, with the source, element by element; the CRC-32 of each."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTask:
    """A rank, planned completely and sized.

    ``directory`` is where its ``files`` lie below the target's folder, ``metadata`` small files by their place there.
    ``copies`` are pairs of source tensors that must hold the same bytes, of which only the first is converted.  ``facts``
    go into the manifest.  ``remarks`` are warnings in sentences, ``unused_rules`` rules that match no name of the rank.
    """

    rank: Rank
    target: Target
    reading: Reading
    verify: Verify
    repair: bool
    files: Sequence[Payload]
    moves: Callable[[], Sequence[Move]]
    source_bytes: int
    directory: str = ""
    metadata: Mapping[str, bytes] = field(default_factory=dict[str, bytes])
    copies: Sequence[tuple[TensorRef, TensorRef]] = ()
    facts: Json = field(default_factory=dict[str, object])
    remarks: tuple[str, ...] = ()
    unused_rules: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return sum(file.lay_out().nbytes for file in self.files) + sum(map(len, self.metadata.values()))

    @property
    def paths(self) -> list[str]:
        """Files to write, from the target's folder on."""
        inside = f"{self.directory}/" if self.directory else ""
        return [*(f"{inside}{file.name}" for file in self.files), *self.metadata]

    def run(self, stop: Stop, advance: Callable[[int], None]) -> None:
        """Write the files and publish them, then the metadata, then the manifest."""
        with self.target.guarded():
            self._run(stop, advance)

    def _run(self, stop: Stop, advance: Callable[[int], None]) -> None:
        target, ledger = self.target, self.target.ledger(self.rank, repair=self.repair)
        check_copies(self.copies)
        for folder in dict.fromkeys(Path(path).parent for path in self.paths):
            make_folder(target.folder / folder, target.root)
        for path in self.paths:  # what a killed run left: the stage's lock is held
            sweep_partials((target.folder / path).parent, Path(path).name)
        described: list[Json] = [
            {"path": path, "nbytes": len(content), "crc32": f"{crc32(content, 0):08x}"}
            for path, content in self.metadata.items()
        ]
        checksums: dict[str, int] = {}

        def prove(read: ReadPieces) -> None:
            self.reading.prove_unchanged()  # first: a source that was written meanwhile is not a damaged one
            checksums.update(self.reading.prove_read(read))

        def examine(partials: Mapping[str, Path]) -> Mapping[str, int]:
            return self.reading.prove_result(partials, stop.check)

        def announce(files: Sequence[Written], _: Mapping[str, int]) -> None:
            self.reading.prove_unchanged()
            ledger.announce([*(file.entry(target.folder) for file in files), *described])

        files, digests = write_files(
            target.folder / self.directory,
            self.files,
            self.moves(),
            stop=stop,
            advance=advance,
            check=self.verify != "none",
            prove=prove,
            examine=examine if self.verify == "full" else None,
            announce=announce,
            fence=ledger.fence,
        )
        for path, content in self.metadata.items():
            publish_bytes(target.folder / path, content, fence=ledger.fence)
        tp, pp = self.rank
        target.publish_rank(
            tp,
            pp,
            {
                "tp": tp,
                "pp": pp,
                "verified": self.verify,
                "sourceChecksums": checksums,
                "files": [
                    *(file.entry(target.folder) for file in files),
                    *(
                        file_entry(target.folder / path, target.folder, crc32(content, 0))
                        for path, content in self.metadata.items()
                    ),
                ],
                "tensors": {label: f"{crc:08x}" for label, crc in sorted(digests.items())},
                **self.facts,
            },
        )


def check_copies(copies: Sequence[tuple[TensorRef, TensorRef]]) -> None:
    """Compare copies of which only one is converted: tied weights, and what several ranks hold where the layout changes."""
    if not copies:
        return
    from ckpt2pt.verification.compare import same_bytes  # noqa: PLC0415 - rare
    from ckpt2pt.verification.gather import Files  # noqa: PLC0415 - the same

    with Files() as files:
        for kept, copy in copies:
            same_bytes(kept, copy, files)
