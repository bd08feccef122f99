"""Data-parallel shards of the distributed optimizer, seen as the parameters they are cut from.  Payload is not read.

    dist_opt_shard_info*.json   parameter -> elements [start, stop) of a buffer; buffer -> sizes of its buckets
    N rank files                buffer_i_bucket_j: rank k of N holds elements [k * (size // N), (k + 1) * (size // N))
                                exp_avg.buffer_i_bucket_j, exp_avg_sq.buffer_i_bucket_j: likewise
    join -> {parameter: TensorRef over a few extents of the ranks' files, in place}

From MindSpeed-Core-MS feature-0.1 83d0ef1 (mindspeed_ms/core/distributed/param_and_grad_buffer.py,
core/optimizer/distrib_optimizer.py) and br_master 07c5198 (``zero3_params``).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple, cast

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.core.moves import cut
from ckpt2pt.core.names import SHARD
from ckpt2pt.errors import CoverageError, FormatError, InputError, TopologyError, ref, refs
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.io.inputs import read_whole
from ckpt2pt.io.jsontext import parse_json

MAX_INFO_BYTES = 256 << 20
MAX_GAP = (512 + 30) // 2
"""Elements between two parameters: memory is aligned to 512 bytes with 31 to spare, and an element has 2 or more."""
PREFIXES = ("", "exp_avg.", "exp_avg_sq.")
_OPTION = ref("source.optShardInfoPath")
_HINT = f"point {_OPTION} at the opt_shard_info of the run that wrote these shards"
_SIZES_HINT = f"{_HINT}, and check {refs('parallelism.data', 'parallelism.context')}"


class Place(NamedTuple):
    """Elements ``[start, stop)`` of a buffer, which are one parameter."""

    buffer: int
    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """One ``dist_opt_shard_info*.json``: global ranks ascending, places by name, bucket sizes by buffer.

    ``buckets`` are the sizes with what fills a bucket up for its ranks, ``used`` those without.
    """

    path: str
    ranks: tuple[int, ...]
    places: Mapping[str, Place]
    buckets: Mapping[int, tuple[int, ...]]
    used: Mapping[int, tuple[int, ...]]
    zero3: tuple[str, ...]

    def shards(self) -> Iterator[tuple[str, int, int, int]]:
        """(name, buffer, first element in the buffer, elements) of every bucket."""
        for buffer, sizes in self.buckets.items():
            for number, (start, size) in enumerate(zip(accumulate(sizes, initial=0), sizes, strict=False)):
                yield f"buffer_{buffer}_bucket_{number}", buffer, start, size


class _Piece(NamedTuple):
    """A stretch of a buffer that one rank's file holds."""

    start: int
    stop: int
    extents: tuple[Extent, ...]


# ------------------------------------------------------------------------------------------------------ the description


def read_info(path: Path) -> ShardInfo:
    """Read and prove a shard description.

    The training opens it without truncating, so a shorter rewrite leaves the tail of the older one: what follows the
    first JSON value is not looked at.
    """
    try:
        document = parse_json(read_whole(path, _OPTION, MAX_INFO_BYTES), first=True)
    except ValueError as error:
        raise FormatError(f"not a JSON document: {str(error)[:200]}", where=path, hint=_HINT) from error
    try:
        info = _parse(cast("Mapping[str, object]", document), str(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"not a shard description of MindSpeed-Core-MS: {type(error).__name__} {str(error)[:200]}",
            where=path,
            hint=_HINT,
        ) from error
    _check_places(info)
    return info


def _parse(document: Mapping[str, object], path: str) -> ShardInfo:
    params = cast("Mapping[str, Mapping[str, Sequence[object]]]", document["param_info"])
    buffers = cast("Mapping[str, Mapping[str, Mapping[str, Sequence[object]]]]", document["buffer_info"])
    places: dict[str, Place] = {}
    for name, param in params.items():
        buffer, _, start, stop = map(_natural, param["range_map"])
        places[name] = Place(buffer, start, stop, tuple(map(_natural, param["shape"])))
    buckets: dict[int, tuple[int, ...]] = {}
    used: dict[int, tuple[int, ...]] = {}
    for key, buffer_info in buffers.items():
        sizes = {int(number): _natural(pair[0]) for number, pair in buffer_info["buckets"].items()}
        if sorted(sizes) != list(range(len(sizes))):
            raise ValueError(f"buckets of buffer {key} are numbered {sorted(sizes)[:8]}")
        buckets[int(key)] = tuple(sizes[number] for number in range(len(sizes)))
        filled = {int(number): _natural(pair[-1]) for number, pair in buffer_info["buckets"].items()}
        used[int(key)] = tuple(filled[number] for number in range(len(sizes)))
    ranks = tuple(sorted(map(_natural, cast("Sequence[object]", document["dp_rank_list"]))))
    zero3 = tuple(map(str, cast("Sequence[object]", document.get("zero3_params") or ())))
    return ShardInfo(path=path, ranks=ranks, places=places, buckets=buckets, used=used, zero3=zero3)


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} where a count belongs")
    return value


def _check_places(info: ShardInfo) -> None:
    """Every parameter has the size of its shape, lies in its buffer, and shares no element with another."""
    by_buffer: dict[int, list[tuple[int, int, str]]] = {}
    for name, place in info.places.items():
        size = sum(info.buckets.get(place.buffer, ()))
        if place.buffer not in info.buckets or place.stop - place.start != math.prod(place.shape) or place.stop > size:
            raise FormatError(
                f"{name} of shape {list(place.shape)} is at [{place.start}, {place.stop}) of buffer {place.buffer}, "
                f"which has {size} elements",
                where=info.path,
                hint=_HINT,
            )
        by_buffer.setdefault(place.buffer, []).append((place.start, place.stop, name))
    for found in by_buffer.values():
        for (_, stop, name), (start, _, other) in pairwise(sorted(found)):
            if start < stop:
                raise FormatError(f"{name} and {other} overlap at element {start}", where=info.path, hint=_HINT)
    if len(set(info.ranks)) != len(info.ranks) or not info.ranks:
        raise FormatError(f"dp_rank_list is {list(info.ranks)}", where=info.path, hint=_HINT)


def check_covered(info: ShardInfo) -> None:
    """Refuse a description that lacks a parameter: a stretch of a bucket longer than any gap between two."""
    for buffer, sizes in info.buckets.items():
        places = sorted((place.start, place.stop) for place in info.places.values() if place.buffer == buffer)
        starts = accumulate(sizes, initial=0)
        for number, (begin, size, used) in enumerate(zip(starts, sizes, info.used[buffer], strict=False)):
            end, reached = begin + min(size, used), begin
            for start, stop in [*(one for one in places if begin <= one[0] < begin + size), (end, end)]:
                if start - reached > MAX_GAP:
                    raise CoverageError(
                        f"nothing describes elements [{reached}, {start}) of buffer {buffer}: {start - reached} of the "
                        f"{used} that bucket {number} uses, where at most {MAX_GAP} part two parameters",
                        where=info.path,
                        hint=_HINT,
                    )
                reached = max(reached, stop)


def check_ranks(info: ShardInfo, wanted: Sequence[int]) -> None:
    """Refuse a description of another group of ranks than the options give."""
    if info.ranks != tuple(wanted):
        raise TopologyError(
            f"the shards are spread over ranks {list(info.ranks)}, the options give ranks {list(wanted)}",
            where=info.path,
            hint=f"check {ref('parallelism')}, and that {_OPTION} is all of the opt_shard_info of the training that wrote the shards",
        )


# ---------------------------------------------------------------------------------------------------------- the files


def has_shards(index: Mapping[str, TensorRef]) -> bool:
    """True when a file holds shards of the distributed optimizer."""
    return any(SHARD.fullmatch(name) for name in index)


def join_shards(paths: Sequence[Path], info: ShardInfo) -> dict[str, TensorRef]:
    """Index a group's files, in ascending order of their ranks, as one checkpoint.

    Parameters and moments come first, in the description's order, those of ZeRO-3 next; what else there is (frozen
    parameters, scheduler, counters) is the same on every rank, and taken from the first that has it.  Raises :class:`InputError` for shards that are missing, of another size or
    too short for a parameter, and for a description that belongs to other files.
    """
    indexes = [index_file(path) for path in paths]
    prefixes = [prefix for prefix in PREFIXES if any(f"{prefix}{name}" in indexes[0] for name, *_ in info.shards())]
    _check_complete(indexes, prefixes, info, paths)
    found: dict[str, TensorRef] = {}
    buffers = {prefix: _buffers(prefix, indexes, info, paths) for prefix in prefixes}
    for name, place in info.places.items():
        for prefix in prefixes:
            dtype, pieces = buffers[prefix][place.buffer]
            found[prefix + name] = _parameter(prefix + name, place, dtype, pieces, info, len(paths))
    zero3 = _zero3(indexes, info, paths)
    rest = dict(zero3)
    for index in indexes:
        for name, tensor_ref in index.items():
            if not SHARD.fullmatch(name):
                rest.setdefault(name, tensor_ref)
    twice = sorted(found.keys() & rest.keys())
    if twice:
        raise CoverageError(
            f"{twice[0]} is there as a whole and as shards", where=paths[0], hint=f"remove one of the two, or {_HINT}"
        )
    return found | rest


def _check_complete(
    indexes: Sequence[Mapping[str, TensorRef]], prefixes: Sequence[str], info: ShardInfo, paths: Sequence[Path]
) -> None:
    wanted = {prefix + name for name, *_ in info.shards() for prefix in prefixes}
    for index, path in zip(indexes, paths, strict=True):
        there = {name for name in index if SHARD.fullmatch(name)}
        if there != wanted:
            missing, more = sorted(wanted - there), sorted(there - wanted)
            raise InputError(
                f"the file holds {len(there)} shards, {info.path} describes {len(wanted)}: "
                + "; ".join(
                    f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                    for names, what in ((missing, "missing"), (more, "not described"))
                    if names
                ),
                where=path,
                hint=_HINT,
            )


def _buffers(
    prefix: str, indexes: Sequence[Mapping[str, TensorRef]], info: ShardInfo, paths: Sequence[Path]
) -> dict[int, tuple[str, list[_Piece]]]:
    """For each buffer its type, and which rank's file holds which elements, in ascending order."""
    found: dict[int, tuple[str, list[_Piece]]] = {buffer: ("float32", []) for buffer in info.buckets}
    count = len(paths)
    for name, buffer, start, size in info.shards():
        share = size // count
        for number, index in enumerate(indexes):
            tensor_ref = index[prefix + name]
            pieces = found[buffer][1]
            if (
                tensor_ref.shape != (share,)
                or (pieces and tensor_ref.dtype != found[buffer][0])
                or tensor_ref.dtype not in DTYPE_BYTES
            ):
                raise InputError(
                    f"{tensor_ref} where {found[buffer][0]}[{share}] belongs: the bucket has {size} elements, "
                    f"and each of {count} ranks holds {size} // {count} of them",
                    where=paths[number],
                    hint=_SIZES_HINT,
                )
            first = start + number * share
            found[buffer] = (tensor_ref.dtype, pieces)
            pieces.append(_Piece(first, first + share, tensor_ref.extents))
    return found


def _parameter(name: str, place: Place, dtype: str, pieces: Sequence[_Piece], info: ShardInfo, count: int) -> TensorRef:
    """The extents of one parameter.  What no rank holds cannot be made up, and is reported with its numbers."""
    width, extents, reached = DTYPE_BYTES[dtype], list[Extent](), place.start
    first = max(0, bisect_right(pieces, place.start, key=lambda piece: piece.start) - 1)
    for piece in map(pieces.__getitem__, range(first, len(pieces))):
        if piece.start >= place.stop or reached >= place.stop:
            break
        if piece.stop <= reached:
            continue
        if piece.start > reached:
            break
        stop = min(piece.stop, place.stop)
        extents += cut(piece.extents, (reached - piece.start) * width, (stop - reached) * width)
        reached = stop
    if reached < place.stop:
        raise _short(name, place, reached, info, count)
    return TensorRef(name, dtype, place.shape, tuple(extents))


def _short(name: str, place: Place, reached: int, info: ShardInfo, count: int) -> InputError:
    start, bucket, size = next(
        (start, number, size)
        for number, (start, size) in enumerate(
            zip(accumulate(info.buckets[place.buffer], initial=0), info.buckets[place.buffer], strict=False)
        )
        if reached < start + size
    )
    held = size // count * count
    return InputError(
        f"{name} needs elements [{place.start}, {place.stop}) of buffer {place.buffer}, and from {reached} on they are in no "
        f"shard: bucket {bucket} begins at {start} and has {size} elements, of which {count} ranks hold {count} x "
        f"{size // count} = {held}; the last {size - held} were never saved",
        where=info.path,
        hint="save again with enable_mem_align=True in the training's DDP configuration, or with a data parallel size that "
        "divides every bucket",
    )


def _zero3(indexes: Sequence[Mapping[str, TensorRef]], info: ShardInfo, paths: Sequence[Path]) -> dict[str, TensorRef]:
    """ZeRO-3 parameters lie under their own names, cut along their first axis; their moments likewise."""
    found: dict[str, TensorRef] = {}
    listed = (name.partition(".")[2] if name.startswith(PREFIXES[1:]) else name for name in info.zero3)
    for bare in dict.fromkeys(listed):
        for name in (prefix + bare for prefix in PREFIXES):
            parts = [index[name] for index in indexes if name in index]
            if not parts and name != bare:
                continue
            alike = len({(part.dtype, part.shape[1:], bool(part.shape)) for part in parts}) == 1
            if len(parts) != len(indexes) or not alike or not parts[0].shape:
                shown = ", ".join(str(list(part.shape)) for part in parts[:8]) or "none"
                raise InputError(
                    f"the ZeRO-3 parameter {name} is in {len(parts)} of {len(indexes)} ranks, with shapes {shown}; "
                    "it is cut along its first axis over all of them",
                    where=f"{paths[0]} and its data-parallel peers",
                    hint="this save is incomplete: convert an earlier checkpoint",
                )
            rows = sum(part.shape[0] for part in parts)
            extents = tuple(extent for part in parts for extent in part.extents)
            found[name] = TensorRef(name, parts[0].dtype, (rows, *parts[0].shape[1:]), extents)
    return found
