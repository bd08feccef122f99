"""The tensors of a source read in shards, worked out a second time: each element's address from its number.

    element e of a buffer -> bucket (the last that begins at or before e) -> rank (e - begin) // share -> byte of its file

The conversion goes the other way, from the files' stretches to the parameters, and its code is not used here: a mistake
in one of the two does not hide in the other.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.mindspore.ranks import SourceFile
from ckpt2pt.io.inputs import read_whole
from ckpt2pt.io.jsontext import parse_json

_SHARD = re.compile(r"(.*\.)?buffer_\d+_bucket_\d+")
Index = Mapping[str, TensorRef]


def expected_index(file: SourceFile) -> Index:
    """The tensors of one (tp, pp): those of its file, or what its group's shards make up."""
    if file.info is None:
        return index_file(file.path)
    try:
        document = cast("Any", parse_json(read_whole(file.info, ref("source.optShardInfoPath")), first=True))
        return _whole([index_file(path) for path in file.peers], document)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise FormatError(
            f"the shards do not add up by this description: {type(error).__name__} {error}",
            where=file.info,
            hint="restore the source and its opt_shard_info as they were for the conversion",
        ) from error


def _whole(indexes: Sequence[Index], document: Any) -> Index:  # noqa: ANN401 - proved by use
    first = indexes[0]
    found = {name: ref for index in reversed(indexes) for name, ref in index.items() if not _SHARD.fullmatch(name)}
    kinds = sorted({(match[1] or "") for name in first if (match := _SHARD.fullmatch(name))})
    begins = {key: _begins(info["buckets"]) for key, info in document["buffer_info"].items()}
    for name, param in document["param_info"].items():
        buffer, _, start, stop = param["range_map"]
        for kind in kinds:
            addresses = _addresses(begins[str(buffer)], start, stop, len(indexes))

            def shard(bucket: int, rank: int, kind: str = kind, buffer: int = buffer) -> TensorRef:
                return indexes[rank][f"{kind}buffer_{buffer}_bucket_{bucket}"]

            found[kind + name] = _gather(kind + name, tuple(param["shape"]), addresses, shard)
    apart = cast("list[str]", document.get("zero3_params", []))
    # The moments are cut like their parameter, whether they are listed or not.
    apart += [moment for name in apart for moment in (f"exp_avg.{name}", f"exp_avg_sq.{name}") if moment in first]
    for name in dict.fromkeys(apart):
        parts = [index[name] for index in indexes]
        rows = sum(part.shape[0] for part in parts)
        extents = tuple(extent for part in parts for extent in part.extents)
        found[name] = TensorRef(name, parts[0].dtype, (rows, *parts[0].shape[1:]), extents)
    return found


def _begins(buckets: Mapping[str, Sequence[int]]) -> list[int]:
    """Where each bucket begins, and where the last one ends."""
    begins = [0]
    for number in sorted(buckets, key=int):
        begins.append(begins[-1] + buckets[number][0])
    return begins


def _addresses(begins: Sequence[int], start: int, stop: int, ranks: int) -> Iterator[tuple[int, int, int, int]]:
    """(bucket, rank, first element of its shard, elements) for the elements ``[start, stop)`` of a buffer."""
    element = start
    while element < stop:
        bucket = bisect_right(begins, element) - 1
        share = (begins[bucket + 1] - begins[bucket]) // ranks
        rank, inside = divmod(element - begins[bucket], share)
        if rank >= ranks:
            raise ValueError(f"element {element} of bucket {bucket} is in none of {ranks} shards of {share}")
        numel = min(share - inside, stop - element)
        yield bucket, rank, inside, numel
        element += numel


def _gather(
    name: str,
    shape: tuple[int, ...],
    addresses: Iterator[tuple[int, int, int, int]],
    shard: Callable[[int, int], TensorRef],
) -> TensorRef:
    extents: list[Extent] = []
    dtype = "float32"
    for bucket, rank, first, numel in addresses:
        ref = shard(bucket, rank)
        dtype, width = ref.dtype, DTYPE_BYTES[ref.dtype]
        wanted, position, end = first * width, 0, (first + numel) * width
        for extent in ref.extents:
            # The part of this extent that lies in [wanted, end) of the shard's bytes.
            low, high = max(wanted, position), min(end, position + extent.nbytes)
            if low < high:
                extents.append(Extent(extent.path, extent.offset + low - position, high - low))
            position += extent.nbytes
        if end > position:
            raise ValueError(f"{name} needs {end} bytes of {ref}, which has {position}")
    return TensorRef(name, dtype, shape, tuple(extents))
