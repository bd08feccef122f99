"""What is found of a source, of whatever kind it is, and what a reader of a kind has to do."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from ckpt2pt.core.fill import bytes_read, moves_of
from ckpt2pt.core.index import Index
from ckpt2pt.core.moves import Move
from ckpt2pt.core.reshard import RankTensors, Wanted
from ckpt2pt.core.slots import FileSlots
from ckpt2pt.core.stated import Statement
from ckpt2pt.core.topology import Rank
from ckpt2pt.core.training_step import TrainingStep
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import TryAgainError, ref
from ckpt2pt.formats.mindspore import Header
from ckpt2pt.formats.mindspore.ranks import SourceFile
from ckpt2pt.formats.mindspore.source import files_for
from ckpt2pt.formats.ptmeta.metadata import RankMeta
from ckpt2pt.io.access import access_error
from ckpt2pt.io.checksums import Piece
from ckpt2pt.io.framing import Payload
from ckpt2pt.io.inputs import sha256

Inputs = list[dict[str, object]]
INFO = ref("source.optShardInfoPath")


class Found(NamedTuple):
    """The chosen checkpoint: the files of each rank, its time, and headers that need not be read again.

    ``prove_unchanged`` refuses files that were written since their headers were read.
    """

    files: Mapping[Rank, SourceFile]
    training_step: TrainingStep
    headers: Mapping[Path, Header]
    prove_unchanged: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovered:
    """The chosen checkpoint: a file for each rank, the time they agree on, and the identity of the conversion.

    ``options_digest`` is the digest of what is asked for, ``ranks`` adds what each rank is read from, ``identity`` all of it;
    ``base`` that of the source and of the options, but for whether the optimizer is converted too; ``inputs`` are the
    files that each rank is read from.
    """

    files: Mapping[Rank, SourceFile]
    training_step: TrainingStep
    identity: str
    options_digest: str
    base: str
    ranks: Mapping[Rank, str]
    inputs: Mapping[Rank, Inputs]
    headers: Mapping[Path, Header] = field(default_factory=dict[Path, "Header"])
    """What :func:`discover` was asked to keep, so that :func:`prepare` need not read those files again."""

    def origin(self, rank: Rank, request: Request) -> Path:
        """What a rank of the result is read from: a file, the folder of a Megatron rank, or the whole checkpoint."""
        if request.source_topology:
            return request.source
        path = self.files[rank].path
        return path.parent if request.source_format == "megatron" else path

    def only(self, ranks: Collection[Rank], request: Request) -> Discovered:
        """What the given ranks need: a worker of one stage of many holds nothing of the others."""
        inputs = {rank: self.inputs[rank] for rank in ranks}
        if request.source_topology:
            return replace(self, inputs=inputs)
        needed = dict.fromkeys(((0, 0), *ranks, *((tp, 0) for tp, _ in ranks)))  # a tied embedding is the first stage's
        return replace(self, inputs=inputs, files={rank: self.files[rank] for rank in needed if rank in self.files})

    def read_for(self, rank: Rank, request: Request) -> tuple[SourceFile, ...]:
        """The files that a rank of the result is read from."""
        return files_for(rank, self.files, request)


class RankSource(NamedTuple):
    """What the source holds for one rank of the result, and what it states of the optimizer."""

    held: RankTensors
    stated: Statement


@contextmanager
def only_growing() -> Generator[None]:
    """Do not look for cycles: an index and a plan only grow and hold none, and looking again and again takes a fifth longer."""
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looks:
            gc.enable()


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """Files of a rank of the result, and the slots that tensors of ``index`` fill; ``source`` is what these were read from."""

    source: str
    index: Index
    files: Sequence[Payload]
    slots: Sequence[FileSlots]

    @property
    def source_bytes(self) -> int:
        """Bytes to read."""
        return bytes_read(self.index, self.slots, self.source)

    @only_growing()
    def moves(self) -> tuple[Move, ...]:
        """What fills the files: every element is read once."""
        return moves_of(self.index, self.slots, self.source)


class Kind(Protocol):
    """How sources of one kind are read: :mod:`~ckpt2pt.discover.training`, :mod:`~ckpt2pt.discover.stored`, :mod:`~ckpt2pt.discover.distributed`."""

    def find(self, request: Request, keep: Collection[Rank]) -> Found:
        """Choose the checkpoint; the headers of ``keep`` stay in the result, as far as memory allows."""
        ...

    def read(self, request: Request, chosen: Discovered, rank: Rank, meta: RankMeta) -> RankSource:
        """What there is for a rank of the result, which ``meta`` describes."""
        ...

    def stated(self, request: Request, chosen: Discovered, rank: Rank) -> Statement:
        """What the source states of optimizer and scheduler for a rank that is not read."""
        ...

    def prove_read(
        self,
        request: Request,
        chosen: Discovered,
        rank: Rank,
        read: Mapping[str, Sequence[Piece]],
        *,
        every_byte: bool,
    ) -> dict[str, int]:
        """Compare what was read for a rank with the checksums of its files: how many were verified, not checked, or state none."""
        ...


def kind_of(request: Request) -> Kind:
    """What reads the source of a request."""
    if request.source_format == "megatron":
        from ckpt2pt.discover import stored  # noqa: PLC0415 - each kind loads what it needs

        return stored
    if request.source_format == "torch_dist":
        from ckpt2pt.discover import distributed  # noqa: PLC0415

        return distributed
    if request.files and request.files.merged:
        from ckpt2pt.discover import merged  # noqa: PLC0415

        return merged
    from ckpt2pt.discover import training  # noqa: PLC0415

    return training


def changed(path: Path) -> TryAgainError:
    """The error for a source that was written while it was read."""
    return TryAgainError(
        "the source was written while it was read",
        where=path,
        hint="let whatever writes it end, keep the checkpoint from being replaced, and run the same command again",
    )


def prove_same(seen: Mapping[Path, Mapping[str, int]]) -> None:
    """Refuse files that are not those any more of which :func:`stat_of` reported this."""
    for path, before in seen.items():
        if stat_of(path) != before:
            raise changed(path)


def step_of(args: Mapping[str, object], iteration: int, request: Request) -> TrainingStep:
    """The time of a Megatron checkpoint, by its own arguments."""
    samples = args.get("consumed_train_samples")
    return TrainingStep(
        iteration=iteration,
        samples=samples if type(samples) is int else None,
        iteration_source="the checkpoint itself",
        as_saved=request.metadata is None,
    )


def wanted_of(request: Request, meta: RankMeta) -> Wanted:
    """The layout of the result, which the tensors of a checkpoint are cut for."""
    return Wanted(
        topology=request.topology,
        source_tensor=request.source_layout.tensor,
        sizes=meta.sizes,
        tied=meta.tied,
        where=str(request.source),
    )


def inputs_of(file: SourceFile, root: Path) -> Inputs:
    """The files that one rank is read from, those below ``root`` by name, size and time."""
    found: Inputs = [{"source": str(path.relative_to(root)), **stat_of(path)} for path in file.paths]
    if file.info:
        found.append({"shards": file.info.name, "ranks": len(file.peers), "sha256": sha256(file.info, INFO)})
    return found


def stat_of(path: Path) -> dict[str, int]:
    """Size, and time of the last change in nanoseconds."""
    try:
        seen = path.stat()
    except OSError as error:
        raise access_error(error, path, "examining", reading=True) from error
    return {"nbytes": seen.st_size, "mtime_ns": seen.st_mtime_ns}
