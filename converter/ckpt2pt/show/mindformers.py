"""What a checkpoint of MindFormers holds: its tensors by its own names, whatever they are fused of."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckpt2pt.core.extents import DTYPE_BYTES, TensorRef
from ckpt2pt.formats.mindformers.read import Whole, read_saved
from ckpt2pt.io.records import Json
from ckpt2pt.io.text import spans

_NUMBER = re.compile(r"(?<=\.layers\.)\d+")
_STATES = {"main_param.": "main parameters", "adam_m.": "first moments", "adam_v.": "second moments"}


def inspect_mindformers(path: Path, *, details: bool) -> Json:
    """The document of one iteration.  The parts of each tensor are proved to cover it; what is wrong is raised."""
    saved = read_saved(path)
    common = saved.common
    tensor, pipeline, expert = saved.sizes
    weights = {name: whole for name, whole in saved.tensors.items() if not name.startswith(tuple(_STATES))}
    shown = saved.tensors if details else weights
    return {
        "kind": "MindFormers checkpoint",
        "path": str(saved.folder),
        "iteration": common.iteration,
        "consumedSamples": common.samples,
        "parallelism": {"tensor": tensor, "pipeline": pipeline, "expert": expert},
        "optimizer": ", ".join(
            what for state, what in _STATES.items() if any(name.startswith(state) for name in saved.tensors)
        )
        or "none",
        "files": len({extent.path for one in saved.tensors.values() for part in one.parts for extent in part.storage}),
        "tensors": rows_of(shown, details=details),
        **({"warnings": [f"{', '.join(saved.unexpected)} hold no part of it"]} if saved.unexpected else {}),
    }


def rows_of(weights: Mapping[str, Whole | TensorRef], *, details: bool) -> list[Json]:
    """One row for the same weight of many layers, or for each where ``details`` are asked for."""
    if details:
        return [_row(name, [whole]) for name, whole in weights.items()]
    groups: dict[tuple[str, str, tuple[int, ...]], list[tuple[str, Whole | TensorRef]]] = {}
    for name, whole in weights.items():
        groups.setdefault((_NUMBER.sub("{}", name), whole.dtype, whole.shape), []).append((name, whole))
    found: list[Json] = []
    for (pattern, _, _), held in groups.items():
        numbers = {int(one) for name, _ in held for one in _NUMBER.findall(name)}
        name = pattern.replace("{}", f"{{{spans(numbers)}}}") if len(held) > 1 else held[0][0]
        found.append(_row(name, [whole for _, whole in held]))
    return found


def _row(name: str, held: Sequence[Whole | TensorRef]) -> Json:
    first = held[0]
    nbytes = math.prod(first.shape) * DTYPE_BYTES.get(first.dtype, 0)
    return {
        "name": name,
        "count": len(held),
        "dtype": first.dtype,
        "shape": list(first.shape),
        "bytes": len(held) * nbytes,
    }
