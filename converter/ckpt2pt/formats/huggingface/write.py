"""The files of a model for transformers: tensors in ``.safetensors`` of at most 5 GB, the index of them, and config.json.

    tensors --shards--> ShardFile --lay_out--> the engine puts elements there
                            '-- weights of all --> model.safetensors.index.json

transformers 4.57.6, src/transformers/modeling_utils.py (``save_pretrained``: names, ``{"format": "pt"}``, which 4 asks for, 5 GB);
huggingface_hub, serialization/_base.py (the index).  A single file is ``model.safetensors``, and has no index: where both are,
the file wins, and all that is not in it is random.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ckpt2pt.core.index import Index, find
from ckpt2pt.core.params import is_buffer
from ckpt2pt.core.tensor import Key
from ckpt2pt.errors import CoverageError
from ckpt2pt.formats.huggingface.config import Config
from ckpt2pt.formats.huggingface.families import Model
from ckpt2pt.formats.huggingface.names import QWEN2_MOE, QWEN3, QWEN3_MOE, rows_of
from ckpt2pt.formats.huggingface.views import view_of
from ckpt2pt.formats.safetensors import SHARD_BYTES, ShardFile, Weight, divided

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"


def weights_of(index: Index, model: Model, config: Config, dtype: str, where: str) -> Iterator[Weight]:
    """Every tensor of the result, in the order of the model.

    Raises :class:`CoverageError` for a parameter that the class has no tensor for.
    """
    zeros = dict(_zeros(model))
    for name in dict.fromkeys(key.name for key in index):
        tensor = find(index, Key("param", name))
        rows = list(rows_of(model.family, name))
        if tensor is None or not rows:
            raise CoverageError(
                f"{name} has no place in {model.family.architecture}",
                where=where,
                hint="choose another format: no result for transformers would be the same model",
            )
        for row in rows:
            own = view_of(tensor, row.own, row.form, heads=config.heads, vocabulary=config.vocabulary)
            yield Weight(row.own, tensor.dtype if is_buffer(name) else dtype, own.fused, (own,))
            for bias in zeros.pop(row.own, ()):
                yield Weight(bias, dtype, own.fused[:1], ())


def _zeros(model: Model) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Weights whose bias the class has, and the model has not."""
    if model.family is QWEN2_MOE and not model.biases:
        modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    elif model.family in {QWEN3, QWEN3_MOE} and len(model.biases) == 1:
        modules = ("o_proj",)
    else:
        return
    for layer in range(model.layers):
        for module in modules:
            name = f"{model.family.prefix}{layer}.self_attn.{module}"
            yield f"{name}.weight", (f"{name}.bias",)


def shards_of(weights: Iterable[Weight], limit: int = SHARD_BYTES) -> tuple[ShardFile, ...]:
    """The files of a model: one, or numbered from 1 on."""
    found = divided(weights, limit)
    names = [f"model-{number:05d}-of-{len(found):05d}.safetensors" for number in range(1, len(found) + 1)]
    return tuple(
        ShardFile(name=name, weights=held)
        for name, held in zip(names if len(found) > 1 else [SINGLE], found, strict=True)
    )


def index_of(shards: Sequence[ShardFile]) -> bytes:
    """``model.safetensors.index.json``."""
    held = {weight.name: shard.name for shard in shards for weight in shard.weights}
    total = sum(weight.nbytes for shard in shards for weight in shard.weights)
    return as_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(held.items()))})


def as_json(document: Mapping[str, object]) -> bytes:
    """As transformers lays such files out."""
    return (json.dumps(document, indent=2) + "\n").encode()
