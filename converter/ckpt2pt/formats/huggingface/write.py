"""The files of a model for transformers: tensors in ``.safetensors`` of at most 5 GB, the index of them, and config.json.

    tensors --shards--> ShardFile --lay_out--> the engine puts elements there
                            '-- weights of all --> model.safetensors.index.json

transformers 4.57.6, src/transformers/modeling_utils.py (``save_pretrained``: names, ``{"format": "pt"}``, which 4 asks for, 5 GB);
huggingface_hub, serialization/_base.py (the index).  A single file is ``model.safetensors``, and has no index: where both are,
the file wins, and all that is not in it is random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckpt2pt.core.extents import DTYPE_BYTES, Extent, Shape
from ckpt2pt.core.index import Index, find
from ckpt2pt.core.params import is_buffer
from ckpt2pt.core.slots import FileSlots, Slot
from ckpt2pt.core.tensor import Key, Tensor
from ckpt2pt.errors import CoverageError
from ckpt2pt.formats.huggingface.config import Config
from ckpt2pt.formats.huggingface.families import Model
from ckpt2pt.formats.huggingface.names import QWEN2_MOE, QWEN3, QWEN3_MOE, rows_of
from ckpt2pt.formats.huggingface.views import view_of
from ckpt2pt.io.framing import Framer

SHARD_BYTES = 5 * 10**9
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ALIGNMENT = 8
"""Data begins on a multiple of this (huggingface/safetensors, tensor.rs, ``serialize``)."""


class Weight(NamedTuple):
    """A tensor of the result; ``tensor`` lies in the source, None is zeros."""

    name: str
    dtype: str
    shape: Shape
    tensor: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


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
            yield Weight(row.own, tensor.dtype if is_buffer(name) else dtype, own.fused, own)
            for bias in zeros.pop(row.own, ()):
                yield Weight(bias, dtype, own.fused[:1], None)


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


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The header, and behind it every tensor."""

    header: bytes
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(self.sizes)

    @property
    def storages(self) -> int:
        """Number of tensors."""
        return len(self.sizes)

    def storage_offset(self, index: int) -> int:
        """Absolute offset of a tensor."""
        return self.offsets[index]

    def storage_nbytes(self, index: int) -> int:
        """Size of a tensor."""
        return self.sizes[index]

    def finish(self, fd: int, crcs: Sequence[int]) -> int:
        """Write the header; return the CRC-32 of the whole file."""
        out = Framer(fd)
        out.put(self.header)
        for nbytes, crc in zip(self.sizes, crcs, strict=True):
            out.skip(nbytes, crc)
        out.flush()
        return out.crc


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A ``.safetensors`` to be written; the widest types come first, so that each tensor is aligned."""

    name: str
    weights: tuple[Weight, ...]
    mode: int = 0o644

    @property
    def copied(self) -> tuple[Extent, ...]:
        """Nothing: every storage is filled by moves, or is zeros."""
        return ()

    def lay_out(self) -> ShardLayout:
        """Lay the header out and the data behind it.  Pure."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        starts: list[int] = []
        at = 0
        for weight in self.weights:
            starts.append(at)
            at += weight.nbytes
            header[weight.name] = {
                "dtype": _DTYPES[weight.dtype],
                "shape": list(weight.shape),
                "data_offsets": [starts[-1], at],
            }
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % _ALIGNMENT)
        raw = len(raw).to_bytes(8, "little") + raw
        offsets = tuple(len(raw) + start for start in starts)
        return ShardLayout(raw, offsets, tuple(weight.nbytes for weight in self.weights))

    def slots(self) -> FileSlots:
        """What fills it."""
        numbered = tuple(enumerate(self.weights))
        return FileSlots(
            name=self.name,
            slots=tuple(
                Slot(one.tensor.key, one.dtype, number, 0, ((0,) * len(one.tensor.shape), one.tensor.shape))
                for number, one in numbered
                if one.tensor
            ),
            storages=tuple(one.nbytes for one in self.weights),
            padded=frozenset(number for number, one in numbered if one.tensor is None),
        )

    def index(self) -> Index:
        """The tensors that slots name."""
        return {weight.tensor.key: weight.tensor for weight in self.weights if weight.tensor}


def shards_of(weights: Iterator[Weight], limit: int = SHARD_BYTES) -> tuple[ShardFile, ...]:
    """Files of at most ``limit`` bytes of tensors, but for a tensor that is larger; none is cut."""
    found: list[list[Weight]] = [[]]
    room = limit
    for weight in weights:
        if found[-1] and weight.nbytes > room:
            found.append([])
            room = limit
        found[-1].append(weight)
        room -= weight.nbytes
    names = [f"model-{number:05d}-of-{len(found):05d}.safetensors" for number in range(1, len(found) + 1)]
    return tuple(
        ShardFile(name=name, weights=tuple(sorted(held, key=lambda one: -DTYPE_BYTES[one.dtype])))
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
