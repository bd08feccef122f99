"""Models that are shapes alone, and small ``.distcp`` files as ckpt2pt lays them out, with any elements."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from ckpt2pt.core.extents import Extent, Shape, Stored, View
from ckpt2pt.core.tensor import ROLES, Key, Tensor, dense_strides
from ckpt2pt.formats.torch_dist.keys import layers_of
from ckpt2pt.formats.torch_dist.metadata_out import write_metadata
from ckpt2pt.formats.torch_dist.slots import Division, tensors_of
from ckpt2pt.formats.torch_dist.write import DistcpFile, Part

LAYER = {
    "input_layernorm.weight": (8,),
    "self_attention.linear_qkv.weight": (24, 8),
    "self_attention.linear_proj.weight": (8, 8),
    "pre_mlp_layernorm.weight": (8,),
    "mlp.linear_fc1.weight": (2, 10, 8),
    "mlp.linear_fc2.weight": (8, 10),
}
ENDS = {
    "embedding.word_embeddings.weight": (20, 8),
    "decoder.final_layernorm.weight": (8,),
    "output_layer.weight": (20, 8),
}


def tensor(key: Key, shape: Shape) -> Tensor:
    """A tensor that lies somewhere; its bytes are never read here."""
    fused = (shape[0] * shape[1], *shape[2:]) if len(shape) == 3 else shape
    dtype = "bfloat16" if key.role == "param" else "float32"
    view: Stored = View((0,) * len(shape), shape, dense_strides(shape), 0, (Extent("source", 0, 1 << 20),))
    return Tensor(key, dtype, shape, fused, (view,))


def index(layers: tuple[int, ...] = (0, 1, 2, 3), **more: Shape) -> dict[Key, Tensor]:
    shapes = {f"decoder.layers.{number}.{name}": shape for number in layers for name, shape in LAYER.items()}
    shapes |= ENDS | {name.replace("__", "."): shape for name, shape in more.items()}
    return {Key(role, name): tensor(Key(role, name), shape) for role in ROLES for name, shape in shapes.items()}


def division(held: dict[Key, Tensor], tensor: int = 2, pipeline: int = 2) -> Division:
    layers = layers_of(held, "here")
    return Division(
        index=held, layers=layers, tensor=tensor, pipeline=pipeline, dtype="bfloat16", full=True, where="here"
    )


def write(path: Path, file: DistcpFile) -> dict[str, list[np.ndarray[Any, Any]]]:
    """The file with any elements; those of each tensor, part by part."""
    layout = file.lay_out()
    rng = np.random.default_rng(len(file.name))
    found: dict[str, list[np.ndarray[Any, Any]]] = {}
    crcs: list[int] = []
    with path.open("w+b") as stream:
        os.truncate(stream.fileno(), layout.nbytes)
        for number, part in enumerate(file.parts):
            data = rng.integers(0, 100, part.nbytes // (4 if part.dtype == "float32" else 2))
            array = (
                data.astype("<f4") if part.dtype == "float32" else (data.astype("<f4").view("<u4") >> 16).astype("<u2")
            )
            os.pwrite(stream.fileno(), array.tobytes(), layout.storage_offset(number))
            crcs.append(crc32(array.tobytes()))
            found.setdefault(part.key, []).append(array)
        assert layout.finish(stream.fileno(), crcs) == crc32(path.read_bytes())
    assert path.stat().st_size == layout.nbytes
    return found


FILES = (
    DistcpFile(
        name="__0_0.distcp",
        parts=(
            Part("a", "bfloat16", (3, 4), (0, 0), (2, 4)),
            Part("b", "float32", (5,), (0,), (5,)),
            Part("c", "float32", (), (), ()),
        ),
        objects=("x/shard_0_1", "x/shard_1_2"),
    ),
    DistcpFile(name="__1_0.distcp", parts=(Part("a", "bfloat16", (3, 4), (2, 0), (1, 4)),)),
)


def written(folder: Path) -> Path:
    """The files with their table."""
    for file in FILES:
        write(folder / file.name, file)
    objects = {key: item for file in FILES for key, item in file.items()}
    (folder / ".metadata").write_bytes(write_metadata(tensors_of(FILES, "here"), objects))
    return folder
