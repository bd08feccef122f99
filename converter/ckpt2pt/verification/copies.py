"""Tensor-parallel ranks that hold the same bits: one file was copied into the folder of another rank.

Every rank holds another part of each matrix that is split, so those of two ranks are equal only by mistake; norms and
positions are equal on all of them, and what is constant (zeros of a new model) says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from sys import intern
from typing import cast

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.names import is_split
from ckpt2pt.core.topology import Rank
from ckpt2pt.discover import Discovered, Prepared, prepare
from ckpt2pt.discover.request import Request
from ckpt2pt.io.checksums import crc32
from ckpt2pt.io.records import Json
from ckpt2pt.publish import Target
from ckpt2pt.verification.gather import Files, spans, width
from ckpt2pt.verification.leaves import leaf_of

_SAMPLE = 256
"""Elements of a weight that a plan looks at."""


def copies_of(request: Request, chosen: Discovered, target: Target, pp: int) -> tuple[str, ...]:
    """A warning for each group of ranks of a finished stage that hold the same bits, by its ranks' manifests."""
    digests: dict[Rank, Json] = {}
    for rank in ((tp, pp) for tp in range(target.tensor)):
        tensors = cast("Json", (target.rank_manifest(*rank) or {}).get("tensors", {}))
        digests[rank] = {n.removeprefix("param:"): crc for n, crc in tensors.items() if n.startswith("param:")}
    weights, place = partial(_split_weights, request, chosen), partial(_place, request, chosen)
    return tuple(remark(group, place) for group in copied_ranks(digests, weights))


def _split_weights(request: Request, chosen: Discovered, rank: Rank) -> list[TensorRef]:
    if not request.files:
        return split_weights(prepare(request, chosen, rank))
    from ckpt2pt.discover.mindspore import prepare_mindspore  # noqa: PLC0415 - for MindSpore results alone

    return [ref for name, ref in prepare_mindspore(request, chosen, rank).weights() if is_split(name)]


def sample_weights(prepared: Prepared) -> dict[str, int]:
    """A checksum of a few bytes of each split weight of a rank, by name."""
    with Files() as files:
        return {intern(ref.name): crc32(_sample(ref, files), 0) for ref in split_weights(prepared)}


def suspected_copies(
    request: Request, chosen: Discovered, samples: Mapping[Rank, Mapping[str, int]]
) -> tuple[str, ...]:
    """The same before anything is converted, by :func:`sample_weights` of each rank."""
    found = copied_ranks(samples, lambda rank: split_weights(prepare(request, chosen, rank)))
    return tuple(remark(group, partial(_place, request, chosen), "begin with") for group in found)


def _place(request: Request, chosen: Discovered, rank: Rank) -> object:
    return f"tp {rank[0]} of the result" if request.source_topology else chosen.origin(rank, request)


def split_weights(prepared: Prepared) -> list[TensorRef]:
    """The source tensors of which each tensor-parallel rank holds another part."""
    return [prepared.plan.held.ref(one.tensor.key) for one in prepared.plan.parameters if is_split(one.name)]


def _sample(ref: TensorRef, files: Files) -> bytes:
    leaf = leaf_of(ref)
    return leaf.elements.block(files, 0, min(leaf.numel, _SAMPLE)).tobytes()


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


def remark(ranks: Iterable[Rank], file: Callable[[Rank], object], verb: str = "hold") -> str:
    """The warning for one group, which names their files."""
    names = " and ".join(str(file(rank)) for rank in ranks)
    return (
        f"{names} {verb} the same bits in every weight that tensor parallelism splits: one may be a copy of the other"
    )


def _is_constant(ref: TensorRef) -> bool:
    leaf = leaf_of(ref)
    size = width(leaf.dtype)
    with Files() as files:
        blocks = (leaf.elements.block(files, start, stop).tobytes() for start, stop in spans(leaf.numel, size))
        return all(block == block[:size] * (len(block) // size) for block in blocks)
