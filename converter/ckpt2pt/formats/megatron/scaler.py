"""The loss scale of an fp16 training, as Megatron-LM saves it beside the parameter groups.

optimizer   {optimizer: {param_groups: ...}, grad_scaler: {scale: float32[1], growth_tracker: n, hysteresis_tracker: n}}
            grad_scaler: {} with a constant loss scale (--loss-scale)

Alike in 0.6 to 0.19: megatron/core/optimizer/grad_scaler.py (``state_dict``, ``load_state_dict``), distrib_optimizer.py; the
defaults are those of optimizer_config.py (``initial_loss_scale``, ``hysteresis``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.state import Values
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.torchfile.trees import Value, as_tensor, tensor
from ckpt2pt.io.inputs import InputFile

SCALER = "grad_scaler"
_INITIAL_SCALE, _HYSTERESIS = 2.0**32, 2


def scaler_of(own: Template | None, given: Template | None, args: Values) -> tuple[Values, str]:
    """The loss scale that a training has come to, and how it was assumed; "" where the checkpoint itself states it.

    ``given`` is metadata beside the checkpoint, ``args`` are arguments of the run.  Without either state it is as at the
    start of a run with these arguments.
    """
    for template in (own, given):
        found = stored_scaler(template) if template else None
        if found is not None:
            step = template.tree.get("iteration") if template else None
            return found, "" if template is own else f"as the metadata has it, which is of iteration {step!r}"
    if args.get("loss_scale"):
        return {}, f"{args['loss_scale']}, which does not change"
    scale, hysteresis = args.get("initial_loss_scale"), args.get("hysteresis")
    initial: dict[str, object] = {
        "scale": float(scale) if isinstance(scale, int | float) else _INITIAL_SCALE,
        "growth_tracker": 0,
        "hysteresis_tracker": hysteresis if isinstance(hysteresis, int) else _HYSTERESIS,
    }
    return initial, f"{initial['scale']:.0f}, as at the start of a run, as nothing in the source states it"


def stored_scaler(template: Template) -> Values | None:
    """What a checkpoint states; None where it states nothing.  Raises :class:`FormatError` for what is no loss scale."""
    optimizer = next(iter(template.optimizers), None)  # of dense parameters and of experts: they scale one loss
    held = optimizer.get(SCALER) if isinstance(optimizer, dict) else None
    return plain_scaler(held, template.storages, template.path) if isinstance(held, dict) else None


def plain_scaler(held: Mapping[Value, Value], storages: Mapping[str, Extent], where: str) -> dict[str, object]:
    """A state with its scale as a number.  Raises :class:`FormatError` for what is no loss scale."""
    if not held:
        return {}
    growth, hysteresis = held.get("growth_tracker"), held.get("hysteresis_tracker", _HYSTERESIS)
    scale = _scale(held.get("scale"), storages)
    if (
        scale is None
        or not math.isfinite(scale)
        or scale <= 0
        or type(growth) is not int
        or type(hysteresis) is not int
    ):
        raise FormatError(
            "optimizer.grad_scaler does not hold the state of a dynamic loss scale",
            where=where,
            hint="give another checkpoint of the training",
        )
    return {"scale": scale, "growth_tracker": growth, "hysteresis_tracker": hysteresis}


def _scale(value: Value, storages: Mapping[str, Extent]) -> float | None:
    if isinstance(value, float):
        return value
    held = as_tensor(value)
    extent = storages.get(held.key) if held else None
    if held is None or extent is None or held.dtype != "float32" or held.numel != 1:
        return None
    with InputFile(Path(extent.path)) as file:
        return float(struct.unpack("<f", file.read(extent.offset + 4 * held.offset, 4))[0])


def scaler_tree(scaler: Values, key: str) -> tuple[dict[Value, Value], dict[str, bytes]]:
    """The entry to be written, and the storages that it names: ``key``, or none with a constant loss scale."""
    tree: dict[Value, Value] = {}
    if not scaler:
        return tree, {}
    for name, value in scaler.items():
        assert isinstance(value, int | float)
        tree[name] = tensor("float32", key, 1, 0, (1,)) if name == "scale" else value
    return tree, {key: struct.pack("<f", scaler["scale"])}
