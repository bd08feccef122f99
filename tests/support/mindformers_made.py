"""Checkpoints in MindFormers' form, written here by what its writer does (mindformers 2.1.0, mindformers/checkpoint): no code of ours."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]
_DTYPES = {"<f4": ("F32", "Float32"), "<u2": ("BF16", "BFloat16"), "<i4": ("I32", "Int32"), "<i8": ("I64", "Int64")}
"""uint16 stands for bfloat16."""
LAUNCH = """torchrun pretrain_gpt.py --num-layers 2 --hidden-size 8 --ffn-hidden-size 12 --num-attention-heads 4 --kv-channels 4
 --group-query-attention --num-query-groups 2 --qk-layernorm --swiglu --normalization RMSNorm --position-embedding-type rope
 --untie-embeddings-and-output-weights --disable-bias-linear --seq-length 16 --max-position-embeddings 16 --micro-batch-size 1
 --global-batch-size 8 --train-iters 100 --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --weight-decay 0.1 --bf16
 --use-distributed-optimizer --vocab-size 16 --make-vocab-size-divisible-by 1 --use-mcore-models""".replace("\n", "")
"""The script that a :class:`Model` is trained with in Megatron-LM."""


def write_safetensors(path: Path, arrays: Arrays) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "ms"}}
    at = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.str][0],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(array.tobytes() for array in arrays.values()))


def is_of_optimizer(name: str) -> bool:
    return name.startswith(("adam_", "main_param.")) or name in {"global_step", "learning_rate"}


def save(
    root: Path, arrays: Arrays, *, iteration: int = 3, prefix: str = "qwen3", common: Mapping[str, Any] | None = None
) -> Path:
    """As one rank saves it: no metadata.json."""
    folder = _folder(root, iteration, common)
    for kind in ("model", "opt"):
        held = {name: array for name, array in arrays.items() if is_of_optimizer(name) == (kind == "opt")}
        if held:
            write_safetensors(folder / f"{prefix}-{kind}-0000000-0000001.safetensors", held)
    return folder


def save_sharded(
    root: Path,
    arrays: Arrays,
    fragments: Mapping[str, Sequence[int]],
    *,
    ranks: int,
    iteration: int = 3,
    redundant: bool = True,
) -> Path:
    """As ``ranks`` ranks save it: part k of a tensor in n parts is with the ranks k, k + n, ...; ``redundant``: with all of them."""
    folder = _folder(root, iteration, None)
    held: dict[str, dict[str, npt.NDArray[Any]]] = {}
    tensors: dict[str, Any] = {}
    storage: dict[str, Any] = {}
    for name, array in arrays.items():
        count = tuple(fragments.get(name.split(".", 1)[1] if is_of_optimizer(name) else name, (1,) * array.ndim))
        local = tuple(n // c for n, c in zip(array.shape, count, strict=True))
        parts = int(np.prod(count))
        for number in range(parts):
            place = np.unravel_index(number, count)
            part = array[tuple(slice(at * n, at * n + n) for at, n in zip(place, local, strict=True))]
            owners = [rank for rank in range(ranks) if rank % parts == number]
            for rank in owners if redundant else owners[:1]:
                kind = "opt" if is_of_optimizer(name) else "model"
                file = f"qwen3-{kind}-{rank:07d}-{ranks:07d}.safetensors"
                held.setdefault(file, {})[name] = np.ascontiguousarray(part)
                entry = {"file_name": file, "storage_rank": rank, "rank_group": owners}
                storage.setdefault(str((name, (number,))), []).append(entry)
        tensors[name] = {
            "properties": {"dtype": _DTYPES[array.dtype.str][1], "replica_id": [0] * ranks},
            "global_shape": list(array.shape),
            "axis_fragmentations": list(count),
            "layout": None,
            "chunk": [{"global_offset": [number], "local_shape": list(local)} for number in range(parts)],
        }
    for file, contents in held.items():
        write_safetensors(folder / file, contents)
    (folder / "metadata.json").write_text(json.dumps({"state_dict_metadata": tensors, "storage_data": storage}))
    return folder


def _folder(root: Path, iteration: int, common: Mapping[str, Any] | None) -> Path:
    folder = root / f"iteration_{iteration:08d}"
    folder.mkdir(parents=True)
    stated = {
        "epoch_num": 1,
        "step_num": iteration,
        "global_step": iteration,
        "loss_scale": None,
        "global_batch_size": 8,
    }
    (folder / "common.json").write_text(json.dumps(stated | dict(common or {})))
    (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return folder


class Model:
    """A small model as MindFormers holds it: ``arrays`` by its names, and ``expected``: what the same is by Megatron's names."""

    def __init__(
        self,
        *,
        layers: int = 2,
        experts: int = 0,
        latent: bool = False,
        interleaved: bool = True,
        contiguous: bool = False,
        pynative: bool = False,
        mtp: bool = False,
        optimizer: bool = True,
    ) -> None:
        self._rng, self.pynative, self._optimizer = np.random.default_rng(7), pynative, optimizer
        self.interleaved, self.contiguous, self.latent, self.experts = interleaved, contiguous, latent, experts
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self.expected: dict[tuple[str, str], npt.NDArray[Any]] = {}
        h = self.hidden = 8
        self._plain("embedding.word_embeddings.weight", (16, h), low=False)
        for layer in range(layers):
            self._layer(f"decoder.layers.{layer}.", moe=bool(experts and layer))
        self._plain("decoder.final_layernorm.weight", (h,), low=False)
        if mtp:
            for name in ("enorm", "hnorm", "final_layernorm"):
                self._plain(f"mtp.layers.0.{name}.weight", (h,), low=False)
            self._plain("mtp.layers.0.eh_proj.weight", (h, 2 * h))
            self._layer("mtp.layers.0.transformer_layer.", moe=bool(experts))
        self._plain("output_layer.weight", (16, h))

    def _layer(self, prefix: str, *, moe: bool) -> None:
        h, f = self.hidden, 12
        self._plain(f"{prefix}input_layernorm.weight", (h,), low=False)
        self._plain(f"{prefix}pre_mlp_layernorm.weight", (h,), low=False)
        self._plain(f"{prefix}self_attention.linear_proj.weight", (h, 16))
        if self.latent:
            self._attend_latent(f"{prefix}self_attention.")
        else:  # 4 heads of 4 channels in 2 groups
            for norm in ("q_layernorm", "k_layernorm"):
                self._plain(f"{prefix}self_attention.{norm}.weight", (4,), low=False)
            self._split(f"{prefix}self_attention.linear_qkv.weight", (32, h), self._qkv)
        if not moe:
            self._split(f"{prefix}mlp.linear_fc1.weight", (2 * f, h), self._fc1)
            self._plain(f"{prefix}mlp.linear_fc2.weight", (h, f))
            return
        self._plain(f"{prefix}mlp.router.weight", (self.experts, h), low=False)
        bias = self._rng.normal(size=self.experts).astype("f4")
        self.arrays[f"{prefix}mlp.{'' if self.pynative else 'router.'}expert_bias"] = bias
        self.expected["param", f"{prefix}mlp.router.expert_bias"] = bias
        counter = "tokens_per_expert" if self.pynative else "router.fi_accu"
        self.arrays[f"{prefix}mlp.{counter}"] = np.zeros(self.experts, "f4")
        for name, inner, outer in (("weight1", h, 2 * f), ("weight2", f, h)):
            shape = (self.experts, inner, outer) if self.pynative else (self.experts * inner, outer)
            self._split(f"{prefix}mlp.experts.{name}", shape, self._of_experts)
        self._split(f"{prefix}mlp.shared_experts.linear_fc1.weight", (2 * f, h), self._fc1)
        self._plain(f"{prefix}mlp.shared_experts.linear_fc2.weight", (h, f))

    def _attend_latent(self, prefix: str) -> None:
        self._plain(f"{prefix}q_layernorm.weight", (6,), low=False)
        self._split(f"{prefix}k_layernorm.weight", (4,), lambda name, a: {name.replace(".k_", ".kv_"): a}, low=False)
        self._split(f"{prefix}linear_qb.weight", (24, 6), lambda name, a: {name.replace("_qb", "_q_up_proj"): a})
        self._split(f"{prefix}linear_kvb.weight", (32, 4), lambda name, a: {name.replace("_kvb", "_kv_up_proj"): a})
        self._split(
            f"{prefix}linear_qkv.weight",
            (12, self.hidden),
            lambda name, a: {name.replace("_qkv", "_q_down_proj"): a[:6], name.replace("_qkv", "_kv_down_proj"): a[6:]},
        )

    def _fc1(self, name: str, a: npt.NDArray[Any]) -> Arrays:
        return {name: np.concatenate([a[0::2], a[1::2]]) if self.interleaved else a}

    def _qkv(self, name: str, a: npt.NDArray[Any]) -> Arrays:
        if not self.contiguous:
            return {name: a}
        heads = a.reshape(8, 4, -1)  # 4 of queries, 2 of keys, 2 of values
        return {name: heads[[0, 1, 4, 6, 2, 3, 5, 7]].reshape(a.shape)}

    def _of_experts(self, name: str, a: npt.NDArray[Any]) -> Arrays:
        module = "linear_fc1" if name.endswith("1") else "linear_fc2"
        each = a.reshape(self.experts, -1, a.shape[-1])
        prefix = name.rpartition(".")[0]
        return {f"{prefix}.local_experts.{e}.{module}.weight": each[e].T for e in range(self.experts)}

    def _plain(self, name: str, shape: Sequence[int], *, low: bool = True) -> None:
        self._split(name, shape, lambda name, a: {name: a}, low=low)

    def _split(self, name: str, shape: Sequence[int], parts: Any, *, low: bool = True) -> None:
        low = low and self.pynative
        roles = {"param": "", "exp_avg": "adam_m.", "exp_avg_sq": "adam_v."} | (
            {"main_param": "main_param."} if low else {}
        )
        main = self._rng.normal(size=shape).astype("f4")
        for role, prefix in roles.items() if self._optimizer else [("param", "")]:
            a = main if role in {"param", "main_param"} else self._rng.normal(size=shape).astype("f4")
            if role == "param" and low:
                bits = a.view("u4").astype("u8")
                a = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("u2")
            self.arrays[prefix + name] = a
            for own, value in parts(name, a).items():
                self.expected[role, own] = np.ascontiguousarray(value)
