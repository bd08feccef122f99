"""A Megatron-LM 0.6 checkpoint read backwards: its ranks, and where the bytes of every parameter and bucket lie.

iter_0000500/mp_rank_01_003/model_optim_rng.pt   -> template (all but the weights), chunks of (name, TensorRef)
                            distrib_optim.pt     -> buffers of buckets of {param, exp_avg, exp_avg_sq: TensorRef}

Headers only.  Formats: Megatron-LM cac60ce4, megatron/checkpointing.py and core/optimizer/distrib_optimizer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, TensorRef
from ckpt2pt.core.foldernames import model_ranks, parallel_sizes
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE, OPTIM_KINDS
from ckpt2pt.core.names import TIED_HEAD, common_prefix
from ckpt2pt.errors import FormatError, MissingInputError, ref
from ckpt2pt.formats.megatron.optimizer import Copies, groups_alone, read_copies
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import Global, Value, as_tensor, entries, read_pickle
from ckpt2pt.formats.torchfile.reader import PtFile
from ckpt2pt.io.files import OpenFiles
from ckpt2pt.io.paths import is_file, is_folder, listing

_MODEL_KEY = re.compile(r"model(\d*)")
_BUCKET_NBYTES = 64
_TIED_HEAD_SAVED = "word_embeddings_for_head.weight"
_SAVED_AGAIN = "point at a checkpoint of Megatron-LM 0.6 with --use-distributed-optimizer and a legacy GPT model"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBucket:
    """One bucket of ``distrib_optim.pt``: sizes by the header, and its float32 tensors by kind."""

    numel: int
    numel_unpadded: int
    tensors: Mapping[str, TensorRef]


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronRank:
    """One ``mp_rank_*`` folder.  ``chunks`` holds for each model chunk its parameters in order of registration.

    ``buffers`` are those of ``distrib_optim.pt``, None where there is none; ``copies`` what ``model_optim_rng.pt`` holds
    of the optimizer in a run without the distributed one, None unless it was asked for.
    """

    folder: Path
    template: Template
    chunks: tuple[tuple[tuple[str, TensorRef], ...], ...]
    buffers: tuple[tuple[StoredBucket, ...], ...] | None
    copies: Copies | None = None
    prefix: str = ""
    """What all names of parameters carried in the file, such as ``module.``; left out here."""

    @property
    def has_plain_optimizer(self) -> bool:
        """Whether ``model_optim_rng.pt`` holds the optimizer, as without ``--use-distributed-optimizer``."""
        return self.template.args.get("use_distributed_optimizer") is not True and "optimizer" in self.template.tree


def rank_folders(iteration: Path) -> dict[tuple[int, int], Path]:
    """(tp, pp) -> ``mp_rank_TT[_PPP]``.  Raises :class:`MissingInputError` when there is none, or a gap."""
    if not is_folder(iteration, ref("source.path")):
        raise MissingInputError(
            "the folder is not there", where=iteration, hint=f"check {ref('source.path')}", field="source.path"
        )
    found = model_ranks(listing(iteration, option=ref("source.path")))
    if not found and listing(iteration, "*.distcp"):
        raise FormatError(
            "this is a distributed checkpoint (torch_dist, .distcp files); ckpt2pt reads the torch format, mp_rank_*/*.pt",
            where=iteration,
            hint="load it with Megatron-LM and save it again without --use-dist-ckpt (--ckpt-format torch)",
        )
    if not found:
        raise MissingInputError(
            "no mp_rank_* folder",
            where=iteration,
            hint=f"point {ref('source.path')} at a Megatron checkpoint (torch format)",
            field="source.path",
        )
    tensor, pipeline = parallel_sizes(found)
    missing = [f"tp {tp} pp {pp}" for pp in range(pipeline) for tp in range(tensor) if (tp, pp) not in found]
    if missing:
        raise MissingInputError(
            f"{len(missing)} of {tensor * pipeline} ranks are missing: {', '.join(missing[:6])}",
            where=iteration,
            hint="copy the whole iteration",
        )
    return found


def read_rank(
    folder: Path, *, optimizer: bool = True, copies: bool = False, allow: tuple[str, ...] = ()
) -> MegatronRank:
    """Read the headers of one rank; ``optimizer`` False leaves ``distrib_optim.pt`` alone.

    ``copies`` asks for the optimizer in ``model_optim_rng.pt`` where there is no ``distrib_optim.pt``.
    """
    optim = folder / OPTIM_FILE
    there = optimizer and is_file(optim, ref("source.path"))
    return read_files(folder / MODEL_FILE, optim if there else None, copies=copies, allow=allow)


def read_files(path: Path, optim: Path | None, *, copies: bool = False, allow: tuple[str, ...] = ()) -> MegatronRank:
    """The same of files that may have other names: the model's and the optimizer's."""
    archive = Archive.open(path)
    tree = read_pickle(archive.pickle, where=str(path), allow=allow)
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise FormatError("the file does not hold a dictionary with text keys", where=path, hint=_SAVED_AGAIN)
    named = cast("dict[str, Value]", tree)
    keys = sorted((key for key in named if _MODEL_KEY.fullmatch(key)), key=lambda key: int(key[5:] or 0))
    if keys not in (["model"], [f"model{number}" for number in range(len(keys))]) or not keys:
        raise FormatError(f"model chunks are {', '.join(keys) or 'none'}", where=path, hint=_SAVED_AGAIN)
    found = {key: _weights(named[key], archive, path) for key in keys}
    prefix = common_prefix({name: name for weights in found.values() for name in weights}, where=str(path))
    chunks = tuple(tuple(_named(weights, prefix, path)) for weights in found.values())
    buffers = read_buffers(optim) if optim else None
    whole = copies and buffers is None
    return MegatronRank(
        folder=path.parent,
        template=Template(
            path=str(path),
            tree={
                key: groups_alone(value) if key == "optimizer" else value
                for key, value in named.items()
                if key not in keys
            },
            storages=dict(archive.storages),
        ),
        chunks=chunks,
        buffers=buffers,
        prefix=prefix,
        copies=read_copies(
            named.get("optimizer"), chunks, lambda value, name: tensor_ref(value, archive, name, path), where=path
        )
        if whole
        else None,
    )


def _weights(model: Value, archive: Archive, path: Path) -> dict[str, TensorRef]:
    """Parameters in order: nested dictionaries joined by dots."""
    # Dictionaries may be shared, and double what there is with each level: each visit has to pay for a byte of the pickle.
    visits_left = len(archive.pickle)

    def walk(prefix: str, value: Value) -> Iterator[tuple[str, TensorRef]]:
        nonlocal visits_left
        visits_left -= 1
        if visits_left < 0:
            raise FormatError("more parameters than a file of its size can hold", where=path, hint=_SAVED_AGAIN)
        inner = entries(value)
        if inner is not None:
            for key, item in inner:
                yield from walk(f"{prefix}.{key!s}" if prefix else str(key), item)
        elif value is not None and not prefix.endswith("._extra_state"):
            yield prefix, tensor_ref(value, archive, prefix, path)

    found: dict[str, TensorRef] = {}
    for name, entry in walk("", model):
        if found.setdefault(name, entry) is not entry:
            raise FormatError(f"{name} is there twice", where=path, hint=_SAVED_AGAIN)
    return found


def _named(weights: Mapping[str, TensorRef], prefix: str, path: Path) -> Iterator[tuple[str, TensorRef]]:
    """The same without the prefix, the tied head under the name that buffers use."""
    seen: set[str] = set()
    for full, entry in weights.items():
        name = full.removeprefix(prefix)
        name = TIED_HEAD if name == _TIED_HEAD_SAVED else name
        if name in seen:
            raise FormatError(f"{name} is there twice", where=path, hint=_SAVED_AGAIN)
        seen.add(name)
        if not name.startswith("language_model.") and name != TIED_HEAD:
            raise FormatError(
                f"{name} is no parameter of a legacy GPT model of Megatron-LM 0.6", where=path, hint=_SAVED_AGAIN
            )
        yield name, entry._replace(name=name)


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


def read_buffers(path: Path, among: OpenFiles | None = None) -> tuple[tuple[StoredBucket, ...], ...]:
    """The buffers of a ``distrib_optim.pt`` in the order of their numbers.  Each has one pair of types, as 0.6 makes it for one type of weights."""
    with PtFile(path, among=among) as file:
        archive = Archive.read(file)
    tree = read_pickle(archive.pickle, where=str(path))
    if not isinstance(tree, dict) or "per_bucket_numel_unpadded" not in tree:
        coalesced = isinstance(tree, dict) and "buckets_coalesced" in tree
        raise FormatError(
            "written by Megatron-LM 0.7 or newer (buckets_coalesced)"
            if coalesced
            else "there is no per_bucket_numel_unpadded",
            where=path,
            hint="use a checkpoint of Megatron-LM 0.6, whose buckets are lists; or convert parameters only",
        )
    count = sum(isinstance(key, int) for key in tree)
    padded, unpadded = (
        _sizes(tree, "per_bucket_numel", count, path),
        _sizes(tree, "per_bucket_numel_unpadded", count, path),
    )
    found: list[tuple[StoredBucket, ...]] = []
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
