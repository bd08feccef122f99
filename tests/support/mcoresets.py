"""Results of today's Megatron read by plain means: names and order of the state dict, places by the rule of the release."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from ckpt2pt.core.tensor import Key, Role
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.leaves import TensorLeaf, open_pt
from goldens import golden_root
from mcore import Array, canonical

_KINDS: dict[str, Role] = {"param": "main_param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
LEGACY = {
    "language_model.embedding.": "embedding.",
    "language_model.encoder.layers.": "decoder.layers.",
    "language_model.encoder.final_norm.": "decoder.final_layernorm.",
    "language_model.output_layer.": "output_layer.",
    "word_embeddings_for_head.": "output_layer.",
    ".input_norm.": ".input_layernorm.",
    ".query_key_value.": ".linear_qkv.",
    ".self_attention.dense.": ".self_attention.linear_proj.",
    ".post_attention_norm.": ".pre_mlp_layernorm.",
    ".dense_h_to_4h.": ".linear_fc1.",
    ".dense_4h_to_h.": ".linear_fc2.",
}


def mcore_sets() -> list[Path]:
    """Sets that come with the same state as MindSpore files."""
    return sorted(path.parent for path in (golden_root() / "mcore").glob("*/*/ms"))


def script_of(folder: Path, tmp_path: Path, *more: str, buckets: bool = False) -> Path:
    """The launch script of a set; without ``buckets`` for a run that has one for each chunk."""
    args = [
        word
        for word in json.loads((folder / "set.json").read_text())["args"]
        if buckets or word != "--overlap-grad-reduce"
    ]
    path = tmp_path / "pretrain.sh"
    path.write_text(f"torchrun pretrain_gpt.py {shlex.join([*args, *more])}\n")
    return path


def sizes_of(folder: Path) -> dict[str, int]:
    """Parallel sizes of a set."""
    args = json.loads((folder / "set.json").read_text())["args"]
    flags = {"tp": "--tensor-model-parallel-size", "pp": "--pipeline-model-parallel-size"}
    return {name: int(args[args.index(flag) + 1]) if flag in args else 1 for name, flag in flags.items()}


def array(leaf: object) -> Array:
    """The elements of a tensor."""
    assert isinstance(leaf, TensorLeaf)
    with Files() as files:
        data = np.array(leaf.elements.block(files, 0, leaf.numel)).view("<u2" if leaf.dtype == "bfloat16" else "<f4")
    return data.reshape(leaf.shape)


def names_of(leaves: dict[str, Any], key: str) -> dict[str, Array]:
    """The weights of a model chunk in the order of its state dict."""
    found = {path.removeprefix(f"/{key}/"): leaf for path, leaf in leaves.items() if path.startswith(f"/{key}/")}
    return {name.replace("/", "."): array(leaf) for name, leaf in found.items() if isinstance(leaf, TensorLeaf)}


def rank_arrays(folder: Path, slots: list[range], *, align: int = 64) -> dict[tuple[Key, int], Array]:
    """What a rank holds: (key with the global number of the layer, chunk) -> its part."""
    model = dict(open_pt(folder / "model_optim_rng.pt"))
    optim = dict(open_pt(folder / "distrib_optim.pt"))
    keys = ["model"] if len(slots) == 1 else [f"model{number}" for number in range(len(slots))]
    found: dict[tuple[Key, int], Array] = {}
    for number, (key, layers) in enumerate(zip(keys, slots, strict=True)):
        weights = names_of(model, key)
        stop, places = 0, {}
        for name in reversed(weights):
            start = -(-stop // align) * align
            stop = start + weights[name].size
            places[name] = start
        [numel] = [leaf for path, leaf in optim.items() if path.startswith(f"/{number}/") and "numel_unpadded" in path]
        assert numel == stop
        for kind, role in _KINDS.items():
            [buffer] = [
                array(leaf)
                for path, leaf in optim.items()
                if path.startswith(f"/{number}/") and path.endswith(f"/{kind}")
            ]
            assert buffer.size == stop
            for name, start in places.items():
                part = buffer[start : start + weights[name].size].reshape(weights[name].shape)
                found[Key(role, global_name(name, layers)), number] = part
        for name, weight in weights.items():
            found[Key("param", global_name(name, layers)), number] = (weight.astype("<u4") << 16).view("<f4")
    return found


def global_name(name: str, layers: range) -> str:
    """The canonical name with the global number of its layer."""
    for legacy, core in LEGACY.items():
        name = name.replace(legacy, core)
    name = canonical(name)
    if not name.startswith("decoder.layers."):
        return name
    _, _, local, *rest = name.split(".")
    return ".".join(["decoder.layers", str(layers[int(local)]), *rest])


def joined(name: str, parts: list[Array], *, gated: bool) -> Array:
    """The global tensor of the parts of tensor-parallel ranks."""
    if len(parts) == 1:
        return parts[0]
    if any(word in name for word in ("norm", "position", ".router.", ".gate_weight")) or name.endswith(
        ("linear_proj.bias", "linear_fc2.bias")
    ):
        assert all(np.array_equal(part, parts[0]) for part in parts)
        return parts[0]
    if gated and ".linear_fc1." in name:
        halves = [np.split(part, 2) for part in parts]
        return np.concatenate([half[number] for number in (0, 1) for half in halves])
    return np.concatenate(parts, 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0)


def odd_set() -> Path:
    """The smallest set; parameters have sizes that are no multiples of 64."""
    return golden_root() / "mcore" / "0.19.0" / "odd_dp2"
