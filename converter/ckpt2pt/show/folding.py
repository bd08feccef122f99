"""Long tables made short for a person: ranks that are alike share a line.  Documents keep every rank."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

from ckpt2pt.core.topology import Rank
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import Document, spans

_OF_RANKS = ("ranks", "paramMaps")
"""Tables of ``inspect`` that have a row for every rank."""


def fold(
    cells: Iterable[tuple[Rank, tuple[object, ...]]], *, details: bool = False
) -> list[tuple[tuple[object, ...], list[Rank]]]:
    """Equal cells with the ranks that have them; with ``details`` each rank's own.

    Every stage of a line has it for the same tensor-parallel ranks, so that two ranges tell all ranks.
    """
    if details:
        return [(cell, [rank]) for rank, cell in cells]
    of_stage: dict[tuple[int, tuple[object, ...]], list[int]] = {}
    for (tp, pp), cell in cells:
        of_stage.setdefault((pp, cell), []).append(tp)
    folded: dict[tuple[tuple[int, ...], tuple[object, ...]], list[Rank]] = {}
    for (pp, cell), tensor in of_stage.items():
        folded.setdefault((tuple(tensor), cell), []).extend((tp, pp) for tp in tensor)
    return [(cell, ranks) for (_, cell), ranks in folded.items()]


def spanned(ranks: Iterable[Rank]) -> tuple[str, str]:
    """Stages and tensor-parallel ranks, as ``0-7``."""
    return spans({pp for _, pp in ranks}), spans({tp for tp, _ in ranks})


def folded(document: Document) -> Document:
    """A document of ``inspect`` whose tables of ranks are folded; names of files keep what they share."""
    found = [key for key in _OF_RANKS if isinstance(document.get(key), list)]
    return {**document, **{key: _folded(cast("list[Json]", document[key])) for key in found}}


def _folded(rows: list[Json]) -> list[Json]:
    cells = (
        (
            (cast("int", row["tp"]), cast("int", row["pp"])),
            tuple(_shared(value) for key, value in row.items() if key not in {"tp", "pp"}),
        )
        for row in rows
    )
    heads = [key for key in rows[0] if key not in {"tp", "pp"}] if rows else []
    return [dict(zip(("pp", "tp", *heads), (*spanned(ranks), *cell), strict=True)) for cell, ranks in fold(cells)]


def _shared(value: object) -> object:
    return re.sub(r"(?<=tp|pp)\d+", "*", value) if isinstance(value, str) else value
