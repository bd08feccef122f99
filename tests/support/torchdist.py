"""Folders in Megatron's torch_dist form, made by hand: tensors as chunks of any shape, in any files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from archives import write_archive
from ckpt2pt.formats.torchfile.pickles import Call, Global, Value, namespace, tensor, write_pickle

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
) -> Path:
    """Write it; uint16 arrays are bfloat16.  ``as_object`` puts the common state where Megatron 0.19 puts it."""
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
        stored[_made("metadata.MetadataIndex", fqn="common_state/shard_0_1", index=None, offset=None)] = _append(
            folder / "__0_0.distcp", [tree], []
        )
        held["common_state/shard_0_1"] = _made("metadata.BytesStorageMetadata")
    else:
        write_archive(folder / "common.pt", "common", write_pickle(tree), [])
    data: dict[Value, Value] = {
        key: {"nd_reformulated_orig_global_shape": shape} for key, shape in (unflattened or {}).items()
    }
    index = _made(
        "metadata.Metadata", state_dict_metadata=held, planner_data=None, storage_data=stored, mcore_data=data
    )
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
