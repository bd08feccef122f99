"""A Megatron rank -> the entries of its MindSpore file.  Pure: headers in, entries out, every tensor used once.

weights (model_optim_rng.pt)                    -> params only: float32 copies in order of registration
buckets (distrib_optim.pt) + buffers            -> each parameter's slice and both moments, in buffer order
optimizer, opt_param_scheduler, iteration       -> scalars

Names, order and types of the scalars are those of MindSpeed-Core-MS feature-0.1 (tools/converter/convert_pt2ckpt.py).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckpt2pt.core import names
from ckpt2pt.core.buckets import Buffer, expected_shape
from ckpt2pt.core.extents import DTYPE_BYTES, TensorRef
from ckpt2pt.core.moves import OPTIM_KINDS, cut
from ckpt2pt.core.names import NameTable
from ckpt2pt.core.stage import FLOATS
from ckpt2pt.core.stated import STYLES, is_stated
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import CoverageError, InputError, TopologyError, aside, ref, refs
from ckpt2pt.formats.mindspore.entries import Entry, number_entry

_DOUBLES = frozenset({"max_lr", "min_lr", "start_wd", "end_wd"})
_INTEGERS = frozenset({"lr_warmup_steps", "num_steps", "lr_decay_steps", "wd_incr_steps", *STYLES})
_INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedChunk:
    """One model chunk: its weights in order of registration, and its buffers with the tensors of their buckets.

    ``buckets`` holds for each buffer and bucket the tensors by kind; both are empty when parameters alone are imported.
    ``copies`` holds each parameter's tensors by kind where the run had no distributed optimizer.
    """

    vpp: int
    weights: tuple[tuple[str, TensorRef], ...]
    buffers: tuple[Buffer, ...] = ()
    buckets: tuple[tuple[Mapping[str, TensorRef], ...], ...] = ()
    copies: Mapping[str, Mapping[str, TensorRef]] | None = None


def tensor_entries(
    chunks: Sequence[ImportedChunk],
    topology: Topology,
    table: NameTable,
    *,
    pp: int,
    kinds: Sequence[str],
    full: bool,
    sizes: Mapping[str, int | bool],
    where: str,
) -> tuple[Entry, ...]:
    """Every parameter of a rank (``full``: and its moments) under its MindSpore name and global layer.

    Raises :class:`CoverageError` when weights and buffers do not hold the same parameters, :class:`TopologyError` when
    layers or shapes are not those of the cut.
    """
    found: list[Entry] = []
    for chunk in chunks:
        slots = topology.real_slots(pp, chunk.vpp)
        _check_layers(chunk, slots, pp, where)
        for name, tensor_ref in chunk.weights:
            _check_weight(name, tensor_ref, sizes, topology.tensor, where)
        for name, sources in _slices(chunk, kinds, where) if full else _plain(chunk):
            spelled = table.to_mindspore(name, slots.__getitem__)[0]
            for kind, source in sources.items():
                prefix = "" if kind == "param" else f"{kind}."
                found.append(
                    Entry(name=prefix + spelled, dtype="float32", shape=source.shape, source=source, role=kind)
                )
    twice = [name for name, count in Counter(entry.name for entry in found).items() if count > 1]
    if twice:
        raise CoverageError(
            f"two parameters become {twice[0]}",
            where=where,
            hint=f"give each a name of its own in a rule file{aside('model.rules')}",
        )
    return tuple(found)


def _plain(chunk: ImportedChunk) -> Iterator[tuple[str, dict[str, TensorRef]]]:
    return ((name, {"param": tensor_ref}) for name, tensor_ref in chunk.weights)


def _slices(chunk: ImportedChunk, kinds: Sequence[str], where: str) -> Iterator[tuple[str, dict[str, TensorRef]]]:
    """Each parameter's part of its bucket, for each kind wanted.  A bucket's tensor begins at the bucket's start."""
    if chunk.copies is not None:
        for name, tensors in chunk.copies.items():
            yield name, {kind: tensors[kind] for kind in OPTIM_KINDS if kind in kinds}
        return
    weights = dict(chunk.weights)
    placed = [placement for buffer in chunk.buffers for placement in buffer.placements]
    missing = sorted(weights.keys() ^ {placement.name for placement in placed})
    if missing or len(placed) != len(weights):
        side = "the model file" if missing and missing[0] in weights else "the optimizer's buffers"
        raise CoverageError(
            f"{missing[0] if missing else 'a parameter'} is only in {side} of chunk {chunk.vpp}",
            where=where,
            hint=f"point {ref('metadata.path')} at the maps of this run, or leave it out to have them computed",
            field="metadata.path",
        )
    for buffer, buckets in zip(chunk.buffers, chunk.buckets, strict=True):
        for bucket, tensors in zip(buffer.buckets, buckets, strict=True):
            for placement in bucket.placements:
                if placement.shape != weights[placement.name].shape:
                    raise TopologyError(
                        f"{placement.name} has shape {list(placement.shape)} in the param map, "
                        f"{list(weights[placement.name].shape)} in the model file",
                        where=where,
                        hint=f"point {ref('metadata.path')} at the maps of this run",
                        field="metadata.path",
                    )
                start, numel = placement.start - bucket.start, placement.stop - placement.start
                yield (
                    placement.name,
                    {
                        kind: TensorRef(
                            placement.name, "float32", placement.shape, cut(tensors[kind].extents, 4 * start, 4 * numel)
                        )
                        for kind in OPTIM_KINDS
                        if kind in kinds
                    },
                )


def missing_layers(chunks: Mapping[int, Sequence[str]], topology: Topology, *, pp: int, where: str) -> frozenset[int]:
    """Global numbers of the layers of a stage that have no parameters: its no-op layers."""
    empty: set[int] = set()
    for vpp, chunk in chunks.items():
        slots = topology.slots(pp, vpp)
        there = {layer for name in chunk if (layer := names.local_layer(name)) is not None}
        if there and max(there) >= len(slots):
            raise TopologyError(
                f"stage {pp} chunk {vpp} holds a layer {max(there)}, by the options it has {len(slots)}",
                where=where,
                hint=f"check {refs('model.numLayers', 'parallelism.virtualPipeline', 'model.layersPerStage')}",
            )
        empty |= {layer for local, layer in enumerate(slots) if local not in there}
    return frozenset(empty)


def _check_layers(chunk: ImportedChunk, slots: Mapping[int, int], pp: int, where: str) -> None:
    there = {layer for name, _ in chunk.weights if (layer := names.local_layer(name)) is not None}
    if there != set(slots):
        raise TopologyError(
            f"stage {pp} chunk {chunk.vpp} has layers {sorted(there)}, by the options it has {sorted(slots)}",
            where=where,
            hint=f"check {ref('model.noopLayers')}, {refs('model.numLayers', 'parallelism.virtualPipeline', 'model.layersPerStage')}",
        )


def _check_weight(name: str, tensor_ref: TensorRef, sizes: Mapping[str, int | bool], tensor: int, where: str) -> None:
    wanted = expected_shape(name, sizes, tensor)
    if wanted is not None and wanted != tensor_ref.shape:
        raise TopologyError(
            f"{name} has shape {list(tensor_ref.shape)}, the arguments give {list(wanted)}",
            where=where,
            hint="the model file and its arguments contradict each other: save the checkpoint again",
        )
    if tensor_ref.dtype not in FLOATS:
        raise InputError(
            f"{name} is of type {tensor_ref.dtype}; only {', '.join(sorted(FLOATS))} can be imported without loss",
            where=where,
            hint="save the checkpoint with parameters of one of these types",
        )


def scalar_entries(
    iteration: int, groups: Sequence[Mapping[str, object]], scheduler: Mapping[str, object], *, where: str
) -> tuple[Entry, ...]:
    """Time, groups and scheduler as scalars; ``betas`` and what is no number have no place in MindSpeed-Core-MS's file."""
    found: dict[str, Entry] = {}
    for entry in (
        number_entry("step_num", iteration, "int64"),
        number_entry("epoch_num", 0, "int64"),
        *(entry for number, group in enumerate(groups) for entry in _group_entries(number, group)),
        *(entry for name, value in scheduler.items() for entry in _scheduler_entry(name, value, where)),
    ):
        found[entry.name] = entry  # a later value takes the place of the first
    return tuple(found.values())


def _group_entries(number: int, group: Mapping[str, object]) -> Iterator[Entry]:
    for key, value in group.items():
        if not isinstance(value, int | float):
            continue
        if key == "step":
            yield Entry(name="state_step", dtype="float32", shape=(1,), source=struct.pack("<f", value))
        else:
            name = f"{'learning_rate' if key == 'lr' else key}_group_{number}"
            if is_stated(name):  # MindSpeed-Core-MS has no place for what newer releases of Megatron-LM add
                yield number_entry(name, value, "float32")


def _scheduler_entry(name: str, value: object, where: str) -> Iterator[Entry]:
    styles = STYLES.get(name)
    if styles is not None and value is not None:
        if value not in styles:
            raise InputError(
                f"{name} is {value!r}; MindSpeed-Core-MS knows {', '.join(styles)}",
                where=where,
                hint="import parameters only, or change the style in the checkpoint",
            )
        value = styles.index(str(value))
    if not isinstance(value, int | float):
        return
    if name in _DOUBLES:
        yield number_entry(name, value, "float64")
    elif name in _INTEGERS:
        yield number_entry(name, int(value), "int32" if int(value) in _INT32 else "int64")
    else:
        yield number_entry(name, value, "float32")


def payload_bytes(entries: Sequence[Entry]) -> int:
    """Bytes to read for these entries."""
    return sum(
        entry.source.numel * DTYPE_BYTES[entry.source.dtype] for entry in entries if isinstance(entry.source, TensorRef)
    )
