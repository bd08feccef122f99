"""What of a Megatron rank is no tensor of the model, as entries of its MindSpore file; and what has to be true of the rest.  Pure.

optimizer, opt_param_scheduler, iteration       -> scalars

Names, order and types of the scalars are those of MindSpeed-Core-MS feature-0.1 (tools/converter/convert_pt2ckpt.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

from ckpt2pt.core import names
from ckpt2pt.core.buckets import stated_shape
from ckpt2pt.core.extents import FLOATS, TensorRef
from ckpt2pt.core.stated import STYLES, is_stated
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import InputError, TopologyError, ref, refs
from ckpt2pt.formats.mindspore.entries import Entry, number_entry

_DOUBLES = frozenset({"max_lr", "min_lr", "start_wd", "end_wd"})
_INTEGERS = frozenset({"lr_warmup_steps", "num_steps", "lr_decay_steps", "wd_incr_steps", *STYLES})
_INT32 = range(-(2**31), 2**31)


Chunks = Sequence[Sequence[tuple[str, TensorRef]]]
"""The parameters of each model chunk, by name."""


def check_rank(chunks: Chunks, topology: Topology, *, pp: int, sizes: Mapping[str, int | bool], where: str) -> None:
    """Refuse a rank whose layers are not those of the layout, or whose weights are not those of its arguments.

    Raises :class:`TopologyError` for layers and shapes, :class:`InputError` for types that have no place in float32.
    """
    for vpp, chunk in enumerate(chunks):
        slots = topology.real_slots(pp, vpp)
        there = {layer for name, _ in chunk if (layer := names.local_layer(name)) is not None}
        if there != set(slots):
            raise TopologyError(
                f"stage {pp} chunk {vpp} has layers {sorted(there)}, by the options it has {sorted(slots)}",
                where=where,
                hint=f"check {ref('model.noopLayers')}, {refs('model.numLayers', 'parallelism.virtualPipeline', 'model.layersPerStage')}",
            )
        for name, tensor_ref in chunk:
            _check_weight(name, tensor_ref, sizes, topology.tensor, where)


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


def _check_weight(name: str, tensor_ref: TensorRef, sizes: Mapping[str, int | bool], tensor: int, where: str) -> None:
    wanted = stated_shape(name, sizes, tensor)
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
