"""Whether the files of finished ranks are as they were written: by size and time of the last change, else by their digest.

A result that nobody has touched costs a look at each file and no reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from ckpt2pt.core.topology import Rank
from ckpt2pt.errors import TryAgainError, VerificationError
from ckpt2pt.io.paths import listing
from ckpt2pt.io.records import Json
from ckpt2pt.publish.kinds import stage_name
from ckpt2pt.publish.ledger import Holdings

if TYPE_CHECKING:
    from ckpt2pt.publish.target import Target


def has_all_stages(target: Target) -> bool:
    """Whether every stage has a record, by one look for all: each worker that ends asks."""
    there = {path.name for path in listing(target.state)}
    return there.issuperset(map(stage_name, range(target.stages)))


def changed_file(target: Target, manifest: Json) -> str:
    """The first file that a manifest lists and that is not as it was written; empty where all are."""
    held = Holdings.of(target.folder, [manifest])
    names = (str(file["path"]) for file in cast("list[Json]", manifest.get("files", [])))
    return next((name for name in names if not held.is_ours(name)), "")


def prove_unchanged(target: Target) -> None:
    """Raise :class:`VerificationError` for the first file of a rank that was changed since, or is gone."""
    for rank in _ranks(target):
        name = changed_file(target, target.manifest_of(rank) or {})
        if name:
            raise not_as_written(target, name, rank)


def refuse_lost(target: Target) -> None:
    """Raise :class:`TryAgainError` for a rank whose manifest lists a file that is gone or was cut: nobody would write it again.

    As long as a stage is not there, its worker is still to come, and looks when it ends: if each of them looked at all ranks,
    they would read as many manifests as there are stages times ranks.
    """
    if not has_all_stages(target):
        return
    for rank in _ranks(target):
        manifest = target.manifest_of(rank)
        if manifest and not target.has_files(manifest):
            raise TryAgainError(
                f"the files of tp {rank[0]} pp {rank[1]} were complete, and one of them was removed or cut since",
                where=target.folder,
                hint=_again(target, rank),
            )


def not_as_written(target: Target, name: str, rank: Rank) -> VerificationError:
    """The error for a file of a finished rank with other bytes than those that were written."""
    return VerificationError(
        "the file is not as it was written, though its size is right",
        where=target.folder / name,
        hint=_again(target, rank),
    )


def _again(target: Target, rank: Rank) -> str:
    return f"convert stage {rank[1]} again with {target.kind.replace}, and keep other programs out of this folder"


def _ranks(target: Target) -> Iterator[Rank]:
    return ((tp, pp) for pp in range(target.stages) for tp in range(target.tensor))
