"""``.metadata`` to be written: the same table that :mod:`metadata` reads, in the form that torch 2.3 and all later ones read.

torch pickles ``TensorProperties`` as five values, from 2.9 on as six, which an older one refuses; every one reads five
(torch/distributed/checkpoint/metadata.py, ``__getstate__``, ``__setstate__``).
"""

from __future__ import annotations

from collections.abc import Mapping

from ckpt2pt.core.extents import Shape
from ckpt2pt.formats.torch_dist.metadata import Entry, Item
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Value

_METADATA = "torch.distributed.checkpoint.metadata"
_SIZE = Global("torch", "Size")
_STRIDED = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Call(Global(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))


def write_metadata(tensors: Mapping[str, Entry], objects: Mapping[str, Item]) -> bytes:
    """The pickle of a ``Metadata`` of these tensors and objects, by key."""
    described: dict[Value, Value] = {}
    stored: dict[Value, Value] = {}
    for key, entry in tensors.items():
        properties = (Global("torch", entry.dtype), _STRIDED, False, _CONTIGUOUS, False)
        chunks: list[Value] = []
        for number, chunk in enumerate(entry.chunks):
            chunks.append(_object("ChunkStorageMetadata", offsets=_size(chunk.origin), sizes=_size(chunk.shape)))
            stored[_object("MetadataIndex", fqn=key, offset=_size(chunk.origin), index=number)] = _stored(chunk.item)
        described[key] = _object(
            "TensorStorageMetadata",
            properties=Call(Global(_METADATA, "TensorProperties"), new=True, state=properties),
            size=_size(entry.shape),
            chunks=chunks,
        )
    for key, item in objects.items():
        described[key] = Call(Global(_METADATA, "BytesStorageMetadata"), new=True)
        stored[_object("MetadataIndex", fqn=key, offset=None, index=None)] = _stored(item)
    whole = _object(
        "Metadata", state_dict_metadata=described, planner_data=None, storage_data=stored, storage_meta=None
    )
    return write_pickle(whole, check=False)


def _object(kind: str, **state: Value) -> Call:
    return Call(Global(_METADATA, kind), new=True, state=dict(state.items()))


def _stored(item: Item) -> Call:
    state: dict[Value, Value] = {"relative_path": item.file, "offset": item.offset, "length": item.nbytes}
    return Call(Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"), new=True, state=state)


def _size(shape: Shape) -> Call:
    return Call(_SIZE, (shape,))
