"""A param map -> the buffer and the buckets of one model chunk, proved.  Pure.

The map is what the reference's patch of Megatron-LM 0.6 (cac60ce4, megatron/core/distributed/param_and_grad_buffer.py)
writes: in buffer order, ``name -> [dtype, shape, start, end, bucket]``, offsets in elements of the whole buffer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import cast

from ckpt2pt.core.names import bare
from ckpt2pt.errors import FormatError, ref

MAX_NUMEL = 1 << 48
"""More elements than any buffer holds; a guard against absurd numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One parameter's home in a buffer, in elements; ``name`` is Megatron's, without ``module.``."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Parameters laid end to end.  ``start`` is where it begins in its buffer, ``numel`` includes its padding.

    ``filled`` counts the elements before the padding, where these are more than end with the last parameter; ``gaps``
    says that parameters may lie apart, as releases from 0.8 on align them.
    """

    index: int
    start: int
    placements: tuple[Placement, ...]
    numel: int
    filled: int = 0
    gaps: bool = False

    def __post_init__(self) -> None:
        if not self.placements:
            raise _broken(f"bucket {self.index} is empty", f"bucket {self.index}")
        if self.placements[0].start != self.start:
            raise _broken(
                f"bucket {self.index} begins at element {self.start}, "
                f"but its first parameter at {self.placements[0].start}",
                self.placements[0].name,
            )
        for left, right in pairwise(self.placements):
            if left.stop > right.start or (left.stop < right.start and not self.gaps):
                raise _broken(
                    f"{right.name} starts at element {right.start}, but {left.name} ends at {left.stop}", right.name
                )
        if self.numel_unpadded > self.numel:
            raise _broken(
                f"bucket {self.index}: {self.numel_unpadded} elements do not fit in {self.numel}",
                self.placements[-1].name,
            )

    @property
    def numel_unpadded(self) -> int:
        """Elements up to the padding."""
        return max(self.filled, self.placements[-1].stop - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """All buckets of one model chunk; ``dtype`` is that of the model's parameters (``bfloat16``)."""

    dtype: str
    buckets: tuple[Bucket, ...]

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Every parameter in buffer order (the reverse of registration order)."""
        return tuple(placement for bucket in self.buckets for placement in bucket.placements)

    @property
    def numel(self) -> int:
        """Elements of all buckets, padding included."""
        return sum(bucket.numel for bucket in self.buckets)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMap:
    """One model chunk as the metadata describes it: names in registration order, and the buffer when there is one."""

    vpp: int
    names: tuple[str, ...]
    buffer: Buffer | None


def parse_param_map(document: object, *, where: str, divisor: int | None) -> Buffer:
    """Build and prove the buffer that a param map describes.

    ``divisor`` is the size of the target's data-parallel group (data x context): every bucket is padded to a
    multiple of it.  None means that it is not known; then only the gaps seen between buckets are padding.
    Raises :class:`FormatError` for a wrong type, order, gap, overlap or shape.
    """
    if not isinstance(document, dict) or not document:
        raise _broken("the param map is not an object with parameters in it", where)
    dtypes: dict[str, str] = {}
    entries: list[tuple[int, Placement]] = []
    names: set[str] = set()
    for name, entry in cast("dict[str, object]", document).items():
        dtype, bucket, placement = _entry(name, entry, where)
        if placement.name in names:
            raise _broken(f"{placement.name} appears twice", where)
        names.add(placement.name)
        dtypes.setdefault(dtype, name)
        entries.append((bucket, placement))
    if len(dtypes) > 1:
        raise _broken(f"parameters of types {', '.join(sorted(dtypes))} in one buffer", where)
    try:
        return Buffer(dtype=next(iter(dtypes)), buckets=_buckets(entries, divisor))
    except FormatError as error:
        raise FormatError(error.what, where=f"{where}: {error.where}", hint=error.hint) from None


def _buckets(entries: list[tuple[int, Placement]], divisor: int | None) -> tuple[Bucket, ...]:
    groups = [(index, tuple(p for _, p in group)) for index, group in groupby(entries, key=lambda entry: entry[0])]
    if [index for index, _ in groups] != list(range(len(groups))):
        raise _broken(
            f"bucket numbers run {[index for index, _ in groups][:8]}, not 0, 1, 2, ...", groups[0][1][0].name
        )
    buckets: list[Bucket] = []
    start = 0
    for (index, placements), following in zip(groups, [*groups[1:], None], strict=True):
        stop = placements[-1].stop
        padded = stop if divisor is None else -(-stop // divisor) * divisor
        end = following[1][0].start if following else padded
        if following and divisor is not None and end != padded:
            raise FormatError(
                f"bucket {index} ends at element {stop} and the next one begins at {end}, "
                f"but a data-parallel group of {divisor} pads it to {padded}",
                where=following[1][0].name,
                hint=f"write the maps for a group of {divisor} into a new folder: ckpt2pt pt-meta --target-dp-size {divisor} ...; "
                f"or give {ref('target.dataParallel')} the size that the maps were written for",
                field="target.dataParallel",
            )
        buckets.append(Bucket(index=index, start=start, placements=placements, numel=end - start))
        start = end
    return tuple(buckets)


def _entry(name: str, entry: object, where: str) -> tuple[str, int, Placement]:
    at = f"{where}: {name}"
    if not isinstance(entry, list):
        raise _broken("an entry must be a list [dtype, shape, start, end, bucket]", at)
    items = cast("list[object]", entry)
    if len(items) != 5 or not isinstance(items[0], str) or not isinstance(items[1], list):
        raise _broken("an entry must be a list [dtype, shape, start, end, bucket]", at)
    numbers = [*cast("list[object]", items[1]), *items[2:]]
    if not all(type(number) is int and 0 <= number <= MAX_NUMEL for number in numbers):
        raise _broken(f"shape, start, end and bucket must be integers from 0 to {MAX_NUMEL}", at)
    *shape, start, stop, bucket = cast("list[int]", numbers)
    if len(shape) > 8 or math.prod(shape) != stop - start:
        raise _broken(
            f"shape {shape} has {math.prod(shape)} elements, start {start} and end {stop} leave {stop - start}", at
        )
    dtype = items[0].removeprefix("torch.")
    return dtype, bucket, Placement(name=bare(name), shape=tuple(shape), start=start, stop=stop)


def _broken(what: str, where: str) -> FormatError:
    return FormatError(
        what,
        where=where,
        hint=f"point {ref('metadata.path')} at the pt_meta written for this model and these degrees",
    )


def expected_shape(name: str, sizes: Mapping[str, int | bool], tensor: int) -> tuple[int, ...] | None:
    """Local shape of a legacy GPT parameter by the training arguments; None when they do not determine it.

    ``sizes`` holds Megatron's argument names.  Sources: Megatron-LM cac60ce4, megatron/model/transformer.py
    (ParallelAttention, ParallelMLP), language_model.py (Embedding).
    """
    try:
        hidden = int(sizes["hidden_size"])
        module, _, leaf = name.rpartition(".")
        module = module.rpartition(".")[2]
        if module == "query_key_value":
            heads = int(sizes["num_attention_heads"])
            groups = int(sizes["num_query_groups"]) if sizes.get("group_query_attention") else heads
            rows = _channels(sizes) * (heads + 2 * groups) // tensor
            return (rows, hidden) if leaf == "weight" else (rows,)
        if module == "dense":
            return (hidden, _channels(sizes) * int(sizes["num_attention_heads"]) // tensor)[
                : 2 if leaf == "weight" else 1
            ]
        if module == "dense_h_to_4h":
            rows = int(sizes["ffn_hidden_size"]) * (2 if sizes.get("swiglu") else 1) // tensor
            return (rows, hidden) if leaf == "weight" else (rows,)
        if module == "dense_4h_to_h":
            return (hidden, int(sizes["ffn_hidden_size"]) // tensor)[: 2 if leaf == "weight" else 1]
        if module in {"word_embeddings", "word_embeddings_for_head", "output_layer"}:
            return (int(sizes["padded_vocab_size"]) // tensor, hidden)[: 2 if leaf == "weight" else 1]
        if module == "position_embeddings":
            return (int(sizes["max_position_embeddings"]), hidden)
        if module in {"input_norm", "post_attention_norm", "final_norm"}:
            return (hidden,)
    except KeyError:
        return None
    return None


_SETTINGS = {"query_key_value": {"group_query_attention"}, "dense_h_to_4h": {"swiglu"}}


def stated_shape(name: str, sizes: Mapping[str, int | bool], tensor: int) -> tuple[int, ...] | None:
    """The same by a checkpoint's own arguments; None too where a converter left out the setting that it depends on."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return expected_shape(name, sizes, tensor) if _SETTINGS.get(module, set[str]()) <= sizes.keys() else None


def _channels(sizes: Mapping[str, int | bool]) -> int:
    """Size of a head; by default that of megatron/arguments.py."""
    return int(sizes.get("kv_channels") or int(sizes["hidden_size"]) // int(sizes["num_attention_heads"]))
