"""What the real model and optimizer of a golden mcore set held, as global tensors: numpy alone, by the dump's own layout files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ckpt2pt.core.tensor import Key, Role

Array = np.ndarray[Any, Any]
_ROLES: dict[str, Role] = {"bf16": "param", "param": "main_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def expected(folder: Path) -> dict[Key, Array]:
    """key -> elements in float32; tied copies on the last stage are left out."""
    parts: dict[Key, dict[int, tuple[Array, int | None, bool]]] = {}
    for path in sorted(folder.glob("layout_*.json")):
        layout, held = (
            json.loads(path.read_text()),
            np.load(folder / path.name.replace("layout_", "expected_").replace(".json", ".npz")),
        )
        tp, _, ep = layout["tp_pp_ep"]
        local = [
            int(found[1])
            for one in layout["params"]
            if (found := re.search(r"\.experts\.linear_fc\d\.weight(\d+)$", one[1]))
        ]
        experts = max(local, default=-1) + 1
        for chunk, name, _, _, _, shared, cut, axis, _, full in layout["params"]:
            if shared and name == "output_layer.weight":
                continue
            for kind, role in _ROLES.items():
                key = Key(role, canonical(full, ep * experts))
                gated = layout["swiglu"] and "linear_fc1" in name
                parts.setdefault(key, {})[tp] = held[f"{chunk}/{name}/{kind}"], axis if cut else None, gated
    return {key: _as_float(_joined([ranks[tp] for tp in sorted(ranks)])) for key, ranks in parts.items()}


def canonical(name: str, first_expert: int = 0) -> str:
    """Transformer Engine's spelling as that of the local layers."""
    name = name.replace(".self_attention.linear_qkv.layer_norm_", ".input_layernorm.")
    name = name.replace(".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm.")
    found = re.fullmatch(r"(.*\.experts)\.(linear_fc\d\.(?:weight|bias))(\d+)", name)
    if found is None:
        return name
    module, leaf = found[2].rsplit(".", 1)
    return f"{found[1]}.local_experts.{int(found[3]) + first_expert}.{module}.{leaf}"


def _joined(ranks: list[tuple[Array, int | None, bool]]) -> Array:
    arrays, (_, axis, gated) = [one[0] for one in ranks], ranks[0]
    if axis is None or len(arrays) == 1:
        return arrays[0]
    if gated:
        halves = [np.split(array, 2, 0) for array in arrays]
        return np.concatenate([half[number] for number in (0, 1) for half in halves], 0)
    return np.concatenate(arrays, axis)


def _as_float(array: Array) -> Array:
    return (array.astype("<u4") << 16).view("<f4") if array.dtype == np.uint16 else array
