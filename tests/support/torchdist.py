"""Folders in Megatron's torch_dist form, made by hand: tensors as chunks of any shape, in any files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from archives import write_archive
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Value, namespace, tensor

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
TORCH = "torch.distributed.checkpoint"


def of_layers(*shape: int, layers: int = 3, seed: int = 0) -> Array:
    """Any values of a weight that all layers have."""
    return np.random.default_rng(seed).normal(size=(layers, *shape)).astype("<f4")


def as_bfloat16(array: Array) -> Array:
    """float32 elements that bfloat16 holds exactly, as its bits."""
    return (array.view("<u4") >> 16).astype("<u2")


def coarse(array: Array) -> Array:
    """The same cut to what bfloat16 holds."""
    return (array.view("<u4") & 0xFFFF0000).view("<f4")


class Piece(NamedTuple):
    """A chunk of a tensor: from ``origin`` on, in a file; stored with its axes turned round where ``turned``."""

    origin: Shape
    shape: Shape
    file: str = "__0_0.distcp"
    turned: bool = False


def whole(array: Array) -> list[Piece]:
    """One chunk of all."""
    return [Piece((0,) * array.ndim, array.shape)]


def write_folder(
    folder: Path,
    tensors: Mapping[str, tuple[Array, Sequence[Piece]]],
    *,
    common: Mapping[str, Value] | None = None,
    unflattened: Mapping[str, Shape] | None = None,
    as_object: bool = False,
    objects: Mapping[str, Value] | None = None,
    own_class: bool = False,
) -> Path:
    """Write it; uint16 arrays are bfloat16.

    ``as_object`` puts the common state where Megatron 0.19 puts it; ``own_class`` names the index by the class of 0.15.
    """
    folder.mkdir(parents=True)
    held: dict[Value, Value] = {}
    stored: dict[Value, Value] = {}
    tree: dict[Value, Value] = {"args": namespace({}), "iteration": 3}
    tree.update((common or {}).items())
    for key, (array, pieces) in tensors.items():
        dtype = {"uint16": "bfloat16"}.get(str(array.dtype), str(array.dtype))
        for piece in pieces:
            part = array[tuple(slice(a, a + n) for a, n in zip(piece.origin, piece.shape, strict=True))]
            stride = tuple(step // part.itemsize for step in np.ascontiguousarray(part).strides)
            if piece.turned:
                part = part.T
                stride = tuple(reversed(tuple(step // part.itemsize for step in np.ascontiguousarray(part).strides)))
            value = tensor(dtype, "0", part.size, 0, piece.shape, stride)
            place = _append(folder / piece.file, value, [np.ascontiguousarray(part).tobytes()])
            stored[_made("metadata.MetadataIndex", fqn=key, index=None, offset=_size(piece.origin))] = place
        held[key] = _made(
            "metadata.TensorStorageMetadata",
            properties=Call(
                Global(f"{TORCH}.metadata", "TensorProperties"),
                new=True,
                state=(Global("torch", dtype), None, False, None, False),
            ),
            size=_size(array.shape),
            chunks=[
                _made("metadata.ChunkStorageMetadata", offsets=_size(piece.origin), sizes=_size(piece.shape))
                for piece in pieces
            ],
        )
    if as_object:
        objects = {"common_state/shard_0_1": tree, **(objects or {})}
    else:
        write_archive(folder / "common.pt", "common", write_pickle(tree), [])
    for name, state in (objects or {}).items():
        place = _append(folder / "__0_0.distcp", [state], [])
        stored[_made("metadata.MetadataIndex", fqn=name, index=None, offset=None)] = place
        held[name] = _made("metadata.BytesStorageMetadata")
    data: dict[Value, Value] = {
        key: {"nd_reformulated_orig_global_shape": shape} for key, shape in (unflattened or {}).items()
    }
    index = _made(
        "metadata.Metadata", state_dict_metadata=held, planner_data=None, storage_data=stored, mcore_data=data
    )
    if own_class:
        index = replace(index, func=Global("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"))
    (folder / ".metadata").write_bytes(write_pickle(index))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


def _append(path: Path, value: Value, payloads: Sequence[bytes]) -> Value:
    """Add an item to a file; where it lies."""
    item = path.with_suffix(".item")
    write_archive(item, "archive", write_pickle(value), payloads)
    data, offset = item.read_bytes(), path.stat().st_size if path.exists() else 0
    item.unlink()
    with path.open("ab") as file:
        file.write(data)
    return _made("filesystem._StorageInfo", relative_path=path.name, offset=offset, length=len(data))


def _made(name: str, **state: Value) -> Call:
    module, _, kind = name.rpartition(".")
    return Call(Global(f"{TORCH}.{module}", kind), new=True, state=dict(state.items()))


def _size(shape: Shape) -> Call:
    return Call(Global("torch", "Size"), (shape,))


HEADS, CHANNELS, GROUPS = 4, 4, 4
_KINDS = {"main_param": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_ARGS: dict[str, Value] = {
    "num_attention_heads": HEADS, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1,
    "consumed_train_samples": 24, "seed": 7, "make_vocab_size_divisible_by": 8, "vocab_size": 30,
}  # fmt: skip


def gpt(*, tied: bool = False, hidden: int = 16, layers: int = 2) -> dict[str, dict[str, Array]]:
    """A model as role -> key -> all layers of a weight, float32; weights are the main parameters cut to bfloat16."""
    ffn, rows = 2 * hidden, (HEADS + 2 * GROUPS) * CHANNELS
    inner: dict[str, Shape] = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,), "self_attention.linear_qkv.weight": (rows, hidden),
        "self_attention.linear_proj.weight": (hidden, HEADS * CHANNELS), "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden), "mlp.linear_fc2.weight": (hidden, ffn),
    }  # fmt: skip
    shapes: dict[str, Shape] = {
        "embedding.word_embeddings.weight": (32, hidden),
        **{f"decoder.layers.{name}": (layers, *shape) for name, shape in inner.items()},
        "decoder.final_layernorm.weight": (hidden,),
        **({} if tied else {"output_layer.weight": (32, hidden)}),
    }
    random = np.random.default_rng(0)
    found = {role: {key: random.normal(size=shape).astype("<f4") for key, shape in shapes.items()} for role in _KINDS}
    found["main_param"] = {key: coarse(array) for key, array in found["main_param"].items()}
    return {"param": {key: array.copy() for key, array in found["main_param"].items()}, **found}


def write_gpt(
    folder: Path,
    arrays: Mapping[str, Mapping[str, Array]],
    *,
    args: Mapping[str, Value] | None = None,
    flat: bool = False,
) -> Path:
    """Write it as Megatron does with fully_reshardable, or ``flat`` with fully_sharded_model_space."""
    keys = {key: (as_bfloat16(array), whole(array)) for key, array in arrays["param"].items()}
    layers, unflattened = len(arrays["param"]["decoder.layers.mlp.linear_fc2.weight"]), dict[str, Shape]()
    for role, kind in _KINDS.items():
        for key, array in arrays.get(role, {}).items():
            name = f"optimizer.state.{'fp32_param' if flat and kind == 'param' else kind}.{key}"
            if flat:
                unflattened[name] = array.shape
                array = array.reshape(*(1 for _ in array.shape), -1)
            keys[name] = array, whole(array)
    same: dict[Value, Value] = {
        "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "max_lr": 0.001, "min_lr": 0.0001, "lr": 0.001,
        "bias_correction": True, "betas": (0.9, 0.95), "eps": 1e-8, "step": 3,
    }  # fmt: skip
    groups: list[Value] = [{**same, "wd_mult": wd, "weight_decay": 0.1 * wd} for wd in (1.0, 0.0)]
    scheduler: Value = {
        "max_lr": 0.001, "min_lr": 0.0001, "lr_warmup_steps": 0, "lr_decay_steps": 600, "lr_decay_style": "cosine", "num_steps": 24,
        "start_wd": 0.1, "end_wd": 0.1, "wd_incr_style": "constant", "wd_incr_steps": 600,
    }  # fmt: skip
    common: dict[str, Value] = {
        "args": namespace(({**_ARGS, "num_layers": layers}) if args is None else args),
        "checkpoint_version": 3.0,
        "optimizer": {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"},
        "opt_param_scheduler": scheduler,
        "content_metadata": {
            "distrib_optim_sharding_type": "fully_sharded_model_space" if flat else "fully_reshardable"
        },
    }
    return write_folder(folder, keys, common=common, unflattened=unflattened)
