"""A model of odd sizes as whole arrays, and the MindSpore files of any layout of it.

Names and cuts are spelled out here a second time, from megatron/core/tensor_parallel/layers.py and MindSpeed-Core-MS.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptfiles import Tensor, ckpt, safe

Arrays = dict[str, npt.NDArray[Any]]

EMBEDDING, HEAD = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
NORM = "language_model.encoder.final_norm.weight"
MOMENTS = ("exp_avg.", "exp_avg_sq.")
CORE = {
    "language_model.embedding.": "embedding.", "language_model.output_layer": "output_layer",
    "language_model.encoder.final_norm": "decoder.final_layernorm", "language_model.encoder.layers": "decoder.layers",
    "input_norm": "input_layernorm", "attention.qkv_proj": "self_attention.linear_qkv",
    "attention.out_proj": "self_attention.linear_proj", "post_attention_norm": "pre_mlp_layernorm",
    "mlp.mapping": "mlp.linear_fc1", "mlp.projection": "mlp.linear_fc2",
}  # fmt: skip


def core_name(name: str) -> str:
    """What Megatron core calls it."""
    for mindspore, core in CORE.items():
        name = name.replace(mindspore, core)
    return name


def model(
    *,
    layers: int = 4,
    hidden: int = 6,
    ffn: int = 8,
    vocab: int = 16,
    gated: bool = True,
    bias: bool = False,
    moments: bool = True,
) -> Arrays:
    """Every parameter, whole, in float32 and under MindSpore's names; sizes divide by 8."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, hidden)}
    for layer in range(layers):
        prefix = f"language_model.encoder.layers.{layer}."
        inner = {
            "input_norm.weight": (hidden,),
            "attention.qkv_proj.weight": (24, hidden),
            "attention.out_proj.weight": (hidden, 8),
            "post_attention_norm.weight": (hidden,),
            "mlp.mapping.weight": (ffn * (2 if gated else 1), hidden),
            "mlp.projection.weight": (hidden, ffn),
        }
        for name, shape in inner.items():
            shapes[prefix + name] = shape
            if bias:
                shapes[prefix + name.replace("weight", "bias")] = shape[:1]
    shapes |= {NORM: (hidden,), HEAD: (vocab, hidden)}
    random = np.random.default_rng(1)
    prefixes = ("", *MOMENTS) if moments else ("",)
    return {
        prefix + name: random.normal(size=shape).astype("<f4") for name, shape in shapes.items() for prefix in prefixes
    }


def cut(name: str, array: npt.NDArray[Any], tp: int, of: int, *, gated: bool = True) -> npt.NDArray[Any]:
    """What tensor-parallel rank ``tp`` of ``of`` holds."""
    if "norm." in name or name.endswith(("out_proj.bias", "projection.bias")):
        return array
    if name.endswith(("out_proj.weight", "projection.weight")):
        return np.split(array, of, 1)[tp]
    halves = np.split(array, 2) if gated and ".mapping." in name else [array]
    return np.concatenate([np.split(half, of)[tp] for half in halves])


def write_mindspore(
    folder: Path,
    arrays: Mapping[str, npt.NDArray[Any]],
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    copies: bool = False,
    gated: bool = True,
    suffix: str = "ckpt",
    iteration: int = 12,
    v2: bool = False,
) -> Path:
    """The files of a training; with ``copies`` every data-parallel rank saves one, else the first of each group."""
    layers = 1 + max(int(found[1]) for name in arrays if (found := re.search(r"layers\.(\d+)\.", name)))
    for stage in range(pp):
        mine = [name for name in arrays if _stage(name, layers, pp) == stage]
        for rank in range(tp):
            tensors = [_tensor(name, cut(name, arrays[name], rank, tp, gated=gated)) for name in mine]
            tensors.append(Tensor("step_num", "int64", (), struct.pack("<q", iteration)))
            tensors.append(Tensor("epoch_num", "int64", (), struct.pack("<q", 0)))
            data = (ckpt if suffix == "ckpt" else safe)(tensors)
            for copy in range(dp if copies else 1):
                number = (stage * dp + copy) * tp + rank
                path = folder / f"rank_{number}" / f"network_rank_{number}-0_{iteration}.{suffix}"
                if v2:
                    name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                    path = folder / f"iter_{iteration:07d}" / name / f"model_optim_rng.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    return folder


def _stage(name: str, layers: int, pp: int) -> int:
    found = re.search(r"layers\.(\d+)\.", name)
    if found:
        return int(found[1]) * pp // layers
    return 0 if "embedding" in name else pp - 1


def _tensor(name: str, array: npt.NDArray[Any]) -> Tensor:
    return Tensor(name, str(array.dtype), array.shape, np.ascontiguousarray(array).tobytes())
