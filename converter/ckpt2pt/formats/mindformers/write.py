"""Weights as MindFormers loads them, in files of at most 5 GB, each tensor whole in one of them.

    tensors --stored_weights--> the tensors of MindFormers --files_of--> ShardFile --lay_out--> the engine puts elements there
                                                                '-- metadata.json: which file holds which tensor; common.json

Files are numbered, whoever loads them: ``load_checkpoint`` finds each part of a tensor by ``metadata.json``, and cuts it for its
own ranks; one file needs none.  MindFormers 2.0.0 and 2.1.0, mindformers/checkpoint/checkpoint.py (``load_checkpoint``),
metadata.py (``load_metadata``, ``generate_default_metadata_from_checkpoint``), reshard.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckpt2pt.core.extents import Shape
from ckpt2pt.core.index import Index, find
from ckpt2pt.core.params import is_buffer, kind_of
from ckpt2pt.core.tensor import Key, Tensor
from ckpt2pt.errors import CoverageError
from ckpt2pt.formats.huggingface.views import Heads, ordered, view_of
from ckpt2pt.formats.mindformers.layouts import LATENT, LAYER
from ckpt2pt.formats.safetensors import SHARD_BYTES, ShardFile, Weight, divided

Trainer = Literal["pynative", "graph"]

_PREFIX = "checkpoint-model"
_DTYPES = {"bfloat16": "BFloat16", "float16": "Float16", "float32": "Float32"}
"""As ``metadata.json`` spells a type."""
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_NOWHERE = re.compile(r".+\.(?:local_experts\.\d+\.linear_fc[12]\.bias|shared_experts\.gate_weight)")
_GATED = re.compile(r"mlp\.(?:shared_experts\.)?linear_fc1\.(?:weight|bias)")
_EXACT = re.compile(r"embedding\..+|.*(?:norm|norm_weight|norm_bias|router)\.[a-z_]+")
"""What PyNative mode holds in float32: embeddings, norms, the router (mindformers/pynative; golden sets)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How the training to come fuses its parameters.

    ``dtype`` is that of its linear layers in PyNative mode; the static graph holds everything in float32.  ``heads`` are given
    where ``linear_qkv`` is [Q; K; V].
    """

    trainer: Trainer
    interleaved: bool
    heads: Heads | None
    dtype: str


def stored_weights(index: Index, form: Form, where: str) -> Iterator[Weight]:
    """Every weight by the names of MindFormers, in the order of the model.

    Raises :class:`CoverageError` for a parameter that MindFormers has no place for.
    """
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for name in dict.fromkeys(key.name for key in index):
        tensor = find(index, Key("param", name))
        if tensor is None or kind_of(name) is None or _NOWHERE.fullmatch(name):
            raise CoverageError(
                f"{name} has no place in a model of MindFormers",
                where=where,
                hint="choose another format: no result for MindFormers would be the same model",
            )
        for own, place, part in _parts(name, tensor, form):
            held = found.setdefault(own, [])
            held.append((place, part._replace(key=Key("param", f"{own}[{place}]"), replicas=())))
    for own, held in found.items():
        parts = tuple(part for _, part in sorted(held, key=lambda one: one[0]))
        yield Weight(own, _dtype(own, form), _shape(own, parts, form), parts)


def _parts(name: str, tensor: Tensor, form: Form) -> Iterator[tuple[str, int, Tensor]]:
    """Tensors of MindFormers that hold a parameter: name, place in it, and the part."""
    layer = LAYER.fullmatch(name)
    prefix, inner = layer.groups() if layer else ("", name)
    module, _, leaf = inner.rpartition(".")
    own = module.removeprefix("self_attention.")
    expert = _EXPERT.fullmatch(inner)
    if expert:
        order = (2, 0, 1) if len(tensor.shape) == 3 else (1, 0)
        yield f"{prefix}mlp.experts.weight{expert[2][-1]}", int(expert[1]), _ordered(tensor, order)
    elif _GATED.fullmatch(inner) and len(tensor.shape) > len(tensor.fused) and form.interleaved:
        yield name, 0, _ordered(tensor, (1, 0, *range(2, len(tensor.shape))))
    elif inner == "mlp.router.expert_bias" and form.trainer == "pynative":
        yield f"{prefix}mlp.expert_bias", 0, tensor
    elif own in {"linear_q_down_proj", "linear_q_proj", "linear_kv_down_proj"}:
        yield f"{prefix}self_attention.linear_qkv.{leaf}", int(own == "linear_kv_down_proj"), tensor
    elif own in _RENAMED and layer:
        yield f"{prefix}self_attention.{_RENAMED[own]}.{leaf}", 0, tensor
    elif own == "linear_qkv" and form.heads:
        for place, kind in enumerate(_KINDS):
            yield name, place, view_of(tensor, name, kind, heads=form.heads, vocabulary=0)
    else:
        yield name, 0, tensor


_KINDS: Sequence[Literal["query", "key", "value"]] = ("query", "key", "value")
_RENAMED = {ours: theirs for theirs, ours in LATENT.items()}


def _ordered(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The same elements with the axes in another order; ``fused`` stays what Megatron core has."""
    return ordered(tensor, order)._replace(fused=tensor.fused)


def _shape(own: str, parts: Sequence[Tensor], form: Form) -> Shape:
    first = parts[0]
    if ".mlp.experts.weight" in own:  # fused as Megatron core has it, (columns, rows)
        columns, rows = first.fused
        return (len(parts), rows, columns) if form.trainer == "pynative" else (len(parts) * rows, columns)
    return sum(part.fused[0] for part in parts), *first.fused[1:]


def _dtype(own: str, form: Form) -> str:
    return (
        "float32"
        if form.trainer == "graph" or is_buffer(own) or own.endswith(".expert_bias") or _EXACT.fullmatch(own)
        else form.dtype
    )


def files_of(weights: Iterable[Weight], limit: int = SHARD_BYTES) -> tuple[ShardFile, ...]:
    """The files of the weights, numbered from 0 on, whoever loads them."""
    found = divided(weights, limit)
    return tuple(
        ShardFile(name=f"{_PREFIX}-{number:07d}-{len(found):07d}.safetensors", weights=held, program="ms")
        for number, held in enumerate(found)
    )


def metadata_of(files: Sequence[ShardFile]) -> bytes:
    """``metadata.json``: each tensor is one part, in one file.

    A tensor without a layout is looked for with rank 0, or with any rank in newer releases (reshard.py, ``_find_file_for_rank``).
    """
    tensors: dict[str, object] = {}
    storage: dict[str, object] = {}
    for file in files:
        for name, dtype, shape, _ in file.weights:
            tensors[name] = {
                "properties": {
                    "dtype": _DTYPES[dtype],
                    "replica_id": [0],
                    "allow_shape_mismatch": False,
                    "allow_to_save": True,
                },
                "global_shape": list(shape),
                "axis_fragmentations": [1] * len(shape),
                "layout": None,
                "chunk": [{"global_offset": [0], "local_shape": list(shape)}],
            }
            storage[str((name, (0,)))] = [{"file_name": file.name, "storage_rank": 0, "rank_group": [0]}]
    document = {"state_dict_metadata": tensors, "storage_data": storage}
    return json.dumps(document, separators=(",", ":")).encode()


def common_of(iteration: int, args: Mapping[str, object]) -> bytes:
    """``common.json``, with the fields that every release knows (``CommonInfo``)."""
    batch = args.get("global_batch_size")
    stated = {
        "epoch_num": 1,
        "step_num": iteration,
        "global_step": iteration,
        "loss_scale": None,
        "global_batch_size": batch if type(batch) is int else None,
        "ckpt_status": None,
    }
    return json.dumps(stated, indent=4).encode()
