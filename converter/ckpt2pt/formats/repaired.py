"""Files of MSAdapter as torch would have saved them: the same trees and bytes, in archives and with types of torch.

rank's x.pt --torchfile.msadapter--> tree --counts, generators--> pickle of torch, storages in its order --> payload, moves

No name of a parameter is looked at, so that every model passes.  What changes besides container and types:

numel_unpadded     a tensor of MindSpeed-LLM's, a number in Megatron-LM (core_v0.12.1, core/optimizer/distrib_optimizer.py)
rng_state          torch's own states are those of a run that starts with the seed of the arguments: MindSpore's have 16 bytes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import cast

from ckpt2pt.core.extents import DTYPE_BYTES, Extent
from ckpt2pt.core.foldernames import expert_ranks
from ckpt2pt.core.moves import MODEL_FILE, OPTIM_FILE, Move, Sink
from ckpt2pt.errors import FormatError, MissingInputError, ref
from ckpt2pt.formats.checkpoint import Checkpoint, Selection, agreed
from ckpt2pt.formats.folders import source_folder
from ckpt2pt.formats.megatron.distributed import count_of
from ckpt2pt.formats.megatron.payload import FilePayload, check_storages, renumbered
from ckpt2pt.formats.megatron.tree import DEFAULT_SEED
from ckpt2pt.formats.ptmeta.rng import rng_state
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.msadapter import is_msadapter, read_tree
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Call, StoredTensor, Value, is_namespace, namespace_attrs
from ckpt2pt.io.paths import is_folder, listing
from ckpt2pt.io.text import short

Place = tuple[int, int, int]
"""Tensor, pipeline and expert parallel rank."""

_WIDTHS = {**DTYPE_BYTES, "complex128": 16}
_COPY_AGAIN = "copy the whole iteration again from where it was written"
_OWN = "\0"
"""Before the key of a storage that is made here: no record of an archive can have it in its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repairable:
    """An iteration that MSAdapter wrote: the folder of each rank, and what its arguments say."""

    folder: Path
    iteration: int
    seed: int
    layers: object
    """The number of layers by the arguments, which nobody checks."""
    generators: bool
    """Whether there are states of random generators."""
    ranks: Mapping[Place, Path]

    @property
    def sizes(self) -> Place:
        """Tensor, pipeline and expert parallel size."""
        tensor, pipeline, expert = (1 + max(numbers) for numbers in zip(*self.ranks, strict=True))
        return tensor, pipeline, expert

    def files(self, place: Place) -> list[Path]:
        """The archives of a rank, the model first."""
        found = listing(self.ranks[place], "*.pt", ref("source.path"))
        return sorted(found, key=lambda path: path.name != MODEL_FILE)

    def checkpoint(self) -> Checkpoint:
        """What is said of it without looking at a name."""
        tensor, pipeline, expert = self.sizes
        return Checkpoint(
            path=self.folder,
            format="msadapter",
            iteration=self.iteration,
            tensor=tensor,
            pipeline=pipeline,
            expert=expert,
            index={},
        )


@dataclass(frozen=True, slots=True)
class Repaired:
    """A file of the result before its bytes, what fills it, and whether torch's generators are those of a start."""

    payload: FilePayload
    moves: tuple[Move, ...]
    generators: bool


def find_repairable(path: Path, wanted: Selection) -> Repairable:
    """The ranks of one iteration, by names of folders and the arguments of the first rank.

    Raises :class:`FormatError` for a checkpoint that torch wrote, :class:`MissingInputError` where files of ranks are missing.
    """
    folder = source_folder(path, wanted.iteration)
    found = expert_ranks(listing(folder, option=ref("source.path")), pipelined=True)
    if not found:
        there = is_folder(folder, ref("source.path"))
        raise MissingInputError(
            "there are no folders of ranks (mp_rank_*)" if there else "there is no such folder",
            where=folder,
            hint=f"name a checkpoint that MSAdapter wrote with {ref('source.path')}",
            field="source.path",
        )
    first = found[min(found)] / MODEL_FILE
    archive = Archive.open(first)
    if not is_msadapter(archive.pickle):
        raise FormatError(
            "torch wrote this checkpoint, not MSAdapter: there is nothing to repair",
            where=folder,
            hint=f"use it as it is, or choose another {ref('target.format')}",
            field="target.format",
        )
    tree = read_tree(archive, allow=wanted.rules.pickle_globals)
    args, iteration = _arguments(tree), tree.get("iteration") if isinstance(tree, dict) else None
    if type(iteration) is not int or iteration < 0:
        raise FormatError("the file states no iteration", where=first, hint=_COPY_AGAIN)
    experts = args.get("expert_model_parallel_size")
    if isinstance(experts, int) and experts > 1 and args.get("pipeline_model_parallel_size") == 1:
        found = expert_ranks(found.values(), pipelined=False)
    seed = args.get("seed")
    checkpoint = Repairable(
        folder=folder,
        iteration=iteration,
        seed=seed if type(seed) is int else DEFAULT_SEED,
        layers=args.get("num_layers"),
        generators=isinstance(tree, dict) and "rng_state" in tree,
        ranks=found,
    )
    _check_ranks(checkpoint, args)
    agreed((wanted.tensor, wanted.pipeline), checkpoint.sizes[:2], folder)
    return checkpoint


def _arguments(tree: Value) -> dict[str, Value]:
    args = tree.get("args") if isinstance(tree, dict) else None
    return namespace_attrs(args) if is_namespace(args) else {}


def _check_ranks(checkpoint: Repairable, args: Mapping[str, Value]) -> None:
    """Every rank is there that sizes and arguments ask for, each with the files of the others."""
    sizes = checkpoint.sizes
    for kind, there in zip(("tensor", "pipeline", "expert"), sizes, strict=True):
        name = f"{kind}_model_parallel_size"
        if isinstance(stated := args.get(name), int) and stated > there:
            raise MissingInputError(
                f"the arguments say {name} {stated}, and there are folders for {there}",
                where=checkpoint.folder,
                hint=_COPY_AGAIN,
            )
    names = {place: {path.name for path in checkpoint.files(place)} for place in checkpoint.ranks}
    needed = {MODEL_FILE}.union(*names.values()) & {MODEL_FILE, OPTIM_FILE}
    for tp, pp, ep in product(*map(range, sizes)):
        place = tp, pp, ep
        lacking = sorted(needed - names.get(place, set()))
        if lacking:
            raise MissingInputError(
                f"{' and '.join(lacking)} of the rank tp {tp} pp {pp} ep {ep} is missing",
                where=checkpoint.ranks.get(place, checkpoint.folder),
                hint=_COPY_AGAIN,
            )


def repaired(path: Path, place: Place, checkpoint: Repairable, allow: tuple[str, ...] = ()) -> Repaired:
    """How one file of a rank is written for torch; its headers are read, and the counts that it holds as tensors.

    Raises :class:`FormatError` for storages that are missing, or have another size than their tensors say.
    """
    archive = Archive.open(path)
    tree = read_tree(archive, allow=allow)
    _check_iteration(tree, checkpoint, path)
    _plain_counts(tree, archive)
    generators = _generators(tree, checkpoint.seed, place)
    for held in _tensors(tree):
        extent = archive.storages.get(held.key)
        if extent and extent.nbytes != held.storage_numel * _WIDTHS[held.dtype]:
            raise FormatError(
                f"data/{held.key} has {extent.nbytes:,} bytes, and its tensor {held.storage_numel:,} elements of {held.dtype}",
                where=path,
                hint=_COPY_AGAIN,
            )
    keys: list[str] = []
    new = renumbered(tree, keys, 0, any_numpy=False)
    own: list[str] = []
    if generators:
        cast("dict[Value, Value]", new)["rng_state"] = renumbered(generators[0], own, len(keys), any_numpy=False)
    check_storages(keys, archive.storages, str(path))
    extents = [archive.storages[key] for key in keys]
    states = tuple(generators[1][key.removeprefix(_OWN)] for key in own) if generators else ()
    payload = FilePayload(
        name=path.name,
        pickle=write_pickle(new, check=False),
        storages=(*(extent.nbytes for extent in extents), *map(len, states)),
        copied=states,
    )
    moves = tuple(_move(path.name, number, extent) for number, extent in enumerate(extents) if extent.nbytes)
    return Repaired(payload, tuple(sorted(moves, key=lambda move: move.extents[0].offset)), bool(generators))


def _move(name: str, number: int, extent: Extent) -> Move:
    """Bytes as they are, whatever they mean."""
    sink = Sink(file=name, storage=number, start=0, dtype="uint8")
    return Move(name=f"{name}/{number}", role="storage", dtype="uint8", extents=(extent,), first=0, sinks=(sink,))


def _check_iteration(tree: Value, checkpoint: Repairable, path: Path) -> None:
    stated = tree.get("iteration") if isinstance(tree, dict) else None
    if path.name == MODEL_FILE and stated != checkpoint.iteration:
        raise FormatError(
            f"the file is of iteration {short(stated)}, and that of the first rank of {checkpoint.iteration}",
            where=path,
            hint=_COPY_AGAIN,
        )


def _plain_counts(tree: Value, archive: Archive) -> None:
    """``numel_unpadded`` as Megatron-LM has it, in place; what has another form stays."""
    for state in tree if isinstance(tree, list) else [tree]:
        for buffers in state.values() if isinstance(state, dict) and "buckets_coalesced" in state else ():
            for kinds in buffers.values() if isinstance(buffers, dict) else ():
                if isinstance(kinds, dict) and (count := count_of(kinds.get("numel_unpadded"), archive)) is not None:
                    kinds["numel_unpadded"] = count


def _generators(tree: Value, seed: int, place: Place) -> tuple[Value, dict[str, bytes]] | None:
    """The states of the random generators with torch's own made anew; Python's and numpy's stay.

    They are taken out of the tree, and out for good where they have a form that Megatron-LM does not write.
    """
    if not isinstance(tree, dict) or "rng_state" not in tree:
        return None
    states, tree["rng_state"] = tree["rng_state"], None
    found: list[Value] = []
    storages: dict[str, bytes] = {}
    known_form = (
        isinstance(states, list) and len(states) <= _MOST_STATES and all(isinstance(one, dict) for one in states)
    )
    for number, state in enumerate(cast("list[dict[Value, Value]]", states) if known_form else ()):
        # One for each data-parallel rank with --data-parallel-random-init (megatron/training/initialize.py).
        tp, pp, ep = place
        fresh, own = rng_state(seed + 10 * number, tp=tp, pp=pp, ep=ep)
        made = cast("dict[Value, Value]", fresh[0])
        kept = {key: made[key] if key in _TORCH else value for key, value in state.items()}
        trackers = state.get("rng_tracker_states")
        if isinstance(trackers, dict):
            known = cast("dict[Value, Value]", made["rng_tracker_states"])
            kept["rng_tracker_states"] = {name: known[name] for name in trackers if name in known}
        found.append(_named(cast("Value", kept), number))
        storages |= {f"{number} {name}": data for name, data in own.items()}
    if not found or any(not held.key.startswith(_OWN) for held in _tensors(found)):
        del tree["rng_state"]
        return None
    return found, storages


_MOST_STATES = 1 << 12
_TORCH = frozenset({"torch_rng_state", "cuda_rng_state", "rng_tracker_states"})


def _named(state: Value, number: int) -> Value:
    """The same with keys of storages that no archive has."""
    if isinstance(state, StoredTensor):
        return StoredTensor(
            dtype=state.dtype,
            key=f"{_OWN}{number} {state.key}",
            location=state.location,
            storage_numel=state.storage_numel,
            offset=state.offset,
            shape=state.shape,
            stride=state.stride,
        )
    return {key: _named(value, number) for key, value in state.items()} if isinstance(state, dict) else state


def _tensors(tree: Value) -> Iterator[StoredTensor]:
    """Every tensor of a tree that was read, which is known to be finite and shallow."""
    seen: set[int] = set()
    pending: list[Value] = [tree]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, StoredTensor):
            yield value
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif isinstance(value, Call):
            pending.extend((value.args, value.state, *value.items, *(item for _, item in value.pairs)))
