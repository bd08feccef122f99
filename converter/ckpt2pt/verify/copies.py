"""Tensor-parallel ranks that hold the same bits: one file was copied into the folder of another rank.

Every rank holds another part of each matrix that is split, so those of two ranks are equal only by mistake; norms and
positions are equal on all of them, and what is constant (zeros of a new model) says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from ckpt2pt.mapping.names import is_split
from ckpt2pt.mapping.topology import Rank
from ckpt2pt.records import Json
from ckpt2pt.request import Request
from ckpt2pt.survey import Survey, prepare, target_of
from ckpt2pt.tensors import TensorRef
from ckpt2pt.verify.leaves import Files, leaf_of, spans, width


def copies_in_stage(request: Request, chosen: Survey, pp: int) -> tuple[str, ...]:
    """A warning for each group of ranks of a converted stage that hold the same bits, by its ranks' manifests."""
    target = target_of(request, chosen)
    ranks = [(tp, pp) for tp in range(request.topology.tensor)]
    digests: dict[Rank, Json] = {}
    for rank in ranks if len(ranks) > 1 else ():
        tensors = cast("Json", (target.rank_manifest(*rank) or {}).get("tensors", {}))
        digests[rank] = {n.removeprefix("param:"): crc for n, crc in tensors.items() if n.startswith("param:")}

    def weights(rank: Rank) -> list[TensorRef]:
        return [weight.source for weight in prepare(request, chosen, rank).plan.weights if is_split(weight.name)]

    def named(rank: Rank) -> object:
        return f"tensor-parallel rank {rank[0]} of the result" if request.source_topology else chosen.files[rank].path

    return tuple(remark(group, named) for group in copied_ranks(digests, weights))


def copied_ranks(
    digests: Mapping[Rank, Mapping[str, object]], weights: Callable[[Rank], Iterable[TensorRef]]
) -> list[tuple[Rank, ...]]:
    """Ranks of one stage whose split weights are all equal, grouped; none where these are constant.

    ``digests`` are the checksums of a rank's parameters by name, ``weights`` its source tensors, of which a few are read.
    """
    alike: dict[tuple[int, frozenset[tuple[str, object]]], list[Rank]] = {}
    for rank, tensors in digests.items():
        split = frozenset((name, crc) for name, crc in tensors.items() if is_split(name))
        if split:
            alike.setdefault((rank[1], split), []).append(rank)
    return [
        tuple(ranks) for ranks in alike.values() if len(ranks) > 1 and not all(map(_is_constant, weights(ranks[0])))
    ]


def remark(ranks: Iterable[Rank], file: Callable[[Rank], object]) -> str:
    """The warning for one group, which names their files."""
    names = " and ".join(str(file(rank)) for rank in ranks)
    return f"{names} hold the same bits in every weight that tensor parallelism splits: one may be a copy of the other"


def _is_constant(ref: TensorRef) -> bool:
    leaf = leaf_of(ref)
    size = width(leaf.dtype)
    with Files() as files:
        blocks = (leaf.elements.block(files, start, stop).tobytes() for start, stop in spans(leaf.numel, size))
        return all(block == block[:size] * (len(block) // size) for block in blocks)
