"""``distrib_optim.pt``, the optimizer of a run with ``--use-distributed-optimizer``: its buffers, in either form.

0.6         {per_bucket_numel: [{types: [n, ...]}, ...], per_bucket_numel_unpadded: likewise,
             buffer: {types: {param: [bucket, ...], exp_avg: likewise, exp_avg_sq: likewise}}}
since 0.7   {buckets_coalesced: True,
             buffer: {types: {param: tensor, exp_avg: tensor, exp_avg_sq: tensor, numel_unpadded: n}}}
            several optimizers, one for each set of parameters: a list of these; None for one whose state another rank saves

``types`` are those of parameters and gradients.  Headers only.  Formats: Megatron-LM cac60ce4 and core_v0.7.0,
megatron/core/optimizer/distrib_optimizer.py (``save_parameter_state``); core/optimizer/optimizer.py (``ChainedOptimizer``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.core.moves import OPTIM_KINDS
from ckpt2pt.errors import FormatError, aside
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.msadapter import read_tree
from ckpt2pt.formats.torchfile.reader import PtFile
from ckpt2pt.formats.torchfile.trees import Global, Value, as_tensor
from ckpt2pt.io.files import OpenFiles

_BUCKET_NBYTES = 64
_MOST_STATES = 64
_SAVED_AGAIN = f"copy the file again from where it was made; without it, weights alone can be converted{aside('mode')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBucket:
    """One bucket of ``distrib_optim.pt``: sizes by the header, and its float32 tensors by kind.

    ``coalesced``: all buckets of a buffer as one, without padding.
    """

    numel: int
    numel_unpadded: int
    tensors: Mapping[str, TensorRef]
    coalesced: bool = False


Buckets = tuple[StoredBucket, ...]


def read_states(path: Path, among: OpenFiles | None = None) -> list[tuple[Buckets, ...] | None]:
    """The buffers of each optimizer in the order of their numbers; None for one whose state another rank saves.

    Raises :class:`FormatError` for a file of neither form, or whose sizes contradict its tensors.
    """
    with PtFile(path, among=among) as file:
        archive = Archive.read(file)
    tree = read_tree(archive)
    if isinstance(tree, dict) and "per_bucket_numel_unpadded" in tree:
        return [_bucket_lists(tree, archive, path)]
    found: list[tuple[Buckets, ...] | None] = []
    # One state may stand in a list many times, and each time costs as much as the first.
    for state in tree[:_MOST_STATES] if isinstance(tree, list) else [tree]:
        if state is not None and not isinstance(state, dict):
            raise FormatError("the file does not hold buffers of an optimizer", where=path, hint=_SAVED_AGAIN)
        found.append(None if state is None else tuple(_coalesced(state, archive, path)))
    if not any(found) and len(found) < 2:
        raise FormatError("there is no buffer of an optimizer in the file", where=path, hint=_SAVED_AGAIN)
    return found


def read_buffers(path: Path, among: OpenFiles | None = None) -> tuple[Buckets, ...]:
    """Those of all optimizers of a dense model.  Raises :class:`FormatError` as :func:`read_states`, and where one is elsewhere."""
    return joined(read_states(path, among), path)


def joined(states: Sequence[tuple[Buckets, ...] | None], path: Path) -> tuple[Buckets, ...]:
    """The buffers of all optimizers of ``path``.  Raises :class:`FormatError` where one is elsewhere."""
    if None in states:
        raise FormatError(
            "another rank holds a part of the optimizer's state, as with expert parallelism",
            where=path,
            hint="give a checkpoint of a dense model",
        )
    return tuple(buckets for state in states for buckets in state or ())


def _coalesced(state: Mapping[Value, Value], archive: Archive, path: Path) -> Iterator[Buckets]:
    numbers = [key for key in state if type(key) is int]
    if sorted(numbers) != list(range(len(numbers))):
        raise FormatError(f"buffers are numbered {numbers[:8]}, not 0, 1, 2, ...", where=path, hint=_SAVED_AGAIN)
    for number in range(len(numbers)):
        for types, value in _inner(state[number], path).items():
            where = f"{path}, buffer {number}"
            kinds = _inner(value, path)
            numel = count_of(kinds.get("numel_unpadded"), archive)
            if not _is_type_pair(types) or numel is None:
                raise FormatError(
                    "there is neither numel_unpadded, as since Megatron-LM 0.7, nor per_bucket_numel_unpadded, as in 0.6",
                    where=where,
                    hint=_SAVED_AGAIN,
                )
            refs = {kind: tensor_ref(kinds.get(kind), archive, kind, path) for kind in OPTIM_KINDS}
            _check_bucket(refs, numel, numel, where)
            yield (StoredBucket(numel=numel, numel_unpadded=numel, tensors=refs, coalesced=True),)


def count_of(value: Value, archive: Archive) -> int | None:
    """A count: a number, or the one int64 that a tensor holds, as MindSpeed-LLM writes it (2.1.0 to 26.1.0); None for neither."""
    found = as_tensor(value)
    if found and found.dtype == "int64" and found.shape == () and found.key in archive.storages:
        extent = archive.storages[found.key]
        if extent.nbytes != DTYPE_BYTES[found.dtype]:
            return None
        with PtFile(Path(archive.path)) as file:
            value = int.from_bytes(file.read(extent.offset, extent.nbytes), "little", signed=True)
    return value if type(value) is int and value >= 0 else None


def tensor_ref(value: Value, archive: Archive, name: str, path: Path) -> TensorRef:
    """Where a tensor of the tree lies; it may be a view into a storage that others share."""
    found = as_tensor(value)
    if found is None:
        raise FormatError(f"{name} is not a tensor", where=path, hint=_SAVED_AGAIN)
    storage = archive.storages.get(found.key)
    width = DTYPE_BYTES.get(found.dtype, 0)
    if storage is None or not width or storage.nbytes != found.storage_numel * width or not found.is_contiguous:
        raise FormatError(
            f"{name} is not a contiguous tensor of a type that can be read", where=path, hint="copy the file again"
        )
    extent = Extent(storage.path, storage.offset + found.offset * width, found.numel * width)
    return TensorRef(name, found.dtype, found.shape, (extent,) if extent.nbytes else ())


def _bucket_lists(tree: Mapping[Value, Value], archive: Archive, path: Path) -> tuple[Buckets, ...]:
    """Each buffer has one pair of types, as 0.6 makes it for one type of weights."""
    count = sum(isinstance(key, int) for key in tree)
    padded, unpadded = (
        _sizes(tree, "per_bucket_numel", count, path),
        _sizes(tree, "per_bucket_numel_unpadded", count, path),
    )
    found: list[Buckets] = []
    # Lists may be shared: each bucket has to pay for its three tensors.
    buckets_left = len(archive.pickle) // _BUCKET_NBYTES
    for number in range(count):
        for key, numels in padded[number].items():
            buckets_left -= len(numels)
            if buckets_left < 0:
                raise FormatError("more buckets than a file of its size can hold", where=path, hint=_SAVED_AGAIN)
            kinds = _inner(tree.get(number), path).get(key)
            tensors = {kind: _list(_inner(kinds, path).get(kind), path) for kind in OPTIM_KINDS}
            sizes = unpadded[number].get(key, [])
            if any(len(items) != len(numels) for items in (sizes, *tensors.values())):
                raise FormatError(f"buffer {number} has lists of different length", where=path, hint=_SAVED_AGAIN)
            buckets: list[StoredBucket] = []
            for index, (numel, size) in enumerate(zip(numels, sizes, strict=True)):
                refs = {
                    kind: tensor_ref(items[index], archive, f"{kind} of bucket {index}", path)
                    for kind, items in tensors.items()
                }
                _check_bucket(refs, numel, size, f"{path}, buffer {number}, bucket {index}")
                buckets.append(StoredBucket(numel=numel, numel_unpadded=size, tensors=refs))
            found.append(tuple(buckets))
    return tuple(found)


def _check_bucket(refs: Mapping[str, TensorRef], numel: int, unpadded: int, where: str) -> None:
    """A tensor may lack the padding (other converters leave it out), never a parameter."""
    for kind, entry in refs.items():
        if entry.dtype != "float32" or not unpadded <= entry.numel <= numel:
            raise FormatError(
                f"{kind} is {entry.dtype} with {entry.numel} elements; the header says {unpadded}, padded to {numel}",
                where=where,
                hint=_SAVED_AGAIN,
            )


def _sizes(tree: Mapping[Value, Value], name: str, count: int, path: Path) -> list[dict[Value, list[int]]]:
    rows = _list(tree.get(name), path)
    if len(rows) != count:
        raise FormatError(f"{name} has {len(rows)} entries for {count} buffers", where=path, hint=_SAVED_AGAIN)
    found: list[dict[Value, list[int]]] = []
    for row in rows:
        sizes = {key: _list(value, path) for key, value in _inner(row, path).items()}
        for key, numels in sizes.items():
            if not _is_type_pair(key) or not all(type(n) is int and n >= 0 for n in numels):
                raise FormatError(f"{name} holds something else than sizes", where=path, hint=_SAVED_AGAIN)
        found.append(cast("dict[Value, list[int]]", sizes))
    return found


def _is_type_pair(key: Value) -> bool:
    return isinstance(key, tuple) and len(key) == 2 and all(isinstance(item, Global) for item in key)


def _inner(value: Value, path: Path) -> Mapping[Value, Value]:
    if not isinstance(value, dict):
        raise FormatError("a dictionary of buckets is missing", where=path, hint=_SAVED_AGAIN)
    return value


def _list(value: Value, path: Path) -> Sequence[Value]:
    if not isinstance(value, list):
        raise FormatError("a list of buckets is missing", where=path, hint=_SAVED_AGAIN)
    return value
