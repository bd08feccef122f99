"""Files of torch rewritten as MSAdapter writes them, with the traps of ``golden/msadapter``: strides that lie, texts for storages."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import (
    STORAGE_CLASSES,
    Call,
    Global,
    Persistent,
    StoredTensor,
    Value,
    as_tensor,
    contiguous_stride,
)

FAMILIES = {"torch": "torch", "mindtorch": "mindtorch.torch", "msadapter": "msadapter"}
"""The three names that MSAdapter's modules had (``msadapter`` is inferred for r0.4.0 and newer)."""
_TYPES = {
    "float16": ("Float", 16), "float32": ("Float", 32), "float64": ("Float", 64), "bfloat16": ("BFloat", 16),
    "int8": ("Int", 8), "int16": ("Int", 16), "int32": ("Int", 32), "int64": ("Int", 64), "uint8": ("UInt", 8),
}  # fmt: skip


class Rewriter:
    """One file; ``payloads`` are its storages."""

    def __init__(self, archive: Archive, family: str) -> None:
        self.archive, self.module = archive, FAMILIES[family]
        self.payloads: list[bytes] = []
        self.made: dict[object, Value] = {}

    def tensor(self, dtype: str, shape: tuple[int, ...], data: bytes, kind: Global | None = None) -> Value:
        """A tensor as MSAdapter pickles it; its stride is that of the transposed one, which it was a view of."""
        key, numel = str(len(self.payloads)), len(data) // _width(dtype)
        self.payloads.append(data)
        storage = Persistent(("storage", STORAGE_CLASSES[dtype], key, "cpu", numel))
        stride: list[Value] = [*reversed(contiguous_stride(tuple(reversed(shape))))]
        rebuild = Global(f"{self.module}._utils", "_rebuild_tensor_v2")
        view: tuple[Value, ...] = (storage, 0, shape, stride, False, None, None)
        outer = Global(f"{self.module}._tensor", "_rebuild_from_type_v2")
        return Call(outer, (rebuild, kind or Global("mindspore.common.tensor", "Tensor"), view, None))

    def walk(self, value: Value, path: tuple[object, ...] = ()) -> Value:
        """The same value, of MSAdapter."""
        if id(value) in self.made:
            return self.made[id(value)]
        found = self._walk(value, path)
        if not isinstance(value, bool | int | float | str | bytes | type(None)):
            self.made[id(value)] = found
        return found

    def _walk(self, value: Value, path: tuple[object, ...]) -> Value:
        if isinstance(value, Call | StoredTensor) and (held := as_tensor(value)):
            if "rng_state" in path and held.dtype == "uint8":
                return self.tensor("uint8", (16,), bytes(range(16)))
            kind = Global(f"{self.module}.nn.parameter", "Parameter") if path[:1] == ("model",) else None
            return self.tensor(held.dtype, held.shape, self._bytes(held), kind)
        if path[-1:] == ("numel_unpadded",) and isinstance(value, int):
            return self.tensor("int64", (), value.to_bytes(8, "little"))
        if isinstance(value, Global) and value.module == "torch" and value.name in _TYPES:
            return self._type(value.name)
        if isinstance(value, dict):
            return {self.walk(key): self.walk(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.walk(item, path) for item in value]
        if isinstance(value, tuple):
            return tuple(self.walk(item, path) for item in value)
        if isinstance(value, Call):
            pairs = [(self.walk(key), self.walk(item, (*path, key))) for key, item in value.pairs]
            args: Any = self.walk(value.args, path)
            return Call(value.func, args, value.new, self.walk(value.state, path), value.items, pairs)
        return value

    def _type(self, dtype: str) -> Value:
        name, bits = _TYPES[dtype]
        return self.made.setdefault(dtype, Call(Global("mindspore._c_expression.typing", name), (), True, (bits,)))

    def _bytes(self, held: StoredTensor) -> bytes:
        assert held.is_contiguous
        extent, width = self.archive.storages[held.key], _width(held.dtype)
        with open(extent.path, "rb") as file:
            file.seek(extent.offset + held.offset * width)
            return file.read(held.numel * width)


def _width(dtype: str) -> int:
    return {"bool": 1, "uint8": 1, "int8": 1, "bfloat16": 2, "float16": 2, "int16": 2, "int32": 4, "float32": 4}.get(
        dtype, 8
    )


def write_archive(path: Path, pickle: bytes, payloads: Mapping[str, bytes]) -> None:
    """The container: Python's zipfile, one folder, storages in the order of their names as texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle)
        file.writestr("archive/version", "3")
        file.writestr("archive/byteorder", "little")
        for key in sorted(payloads):
            file.writestr(f"archive/data/{key}", payloads[key])


def rewrite_file(source: Path, target: Path, family: str = "torch") -> None:
    """One file of torch as MSAdapter would have written it."""
    archive = Archive.open(source)
    rewriter = Rewriter(archive, family)
    tree = rewriter.walk(read_pickle(archive.pickle, where=str(source)))
    payloads = {str(number): data for number, data in enumerate(rewriter.payloads)}
    write_archive(target, write_pickle(tree, check=False), payloads)


def rewrite(source: Path, target: Path, family: str = "torch") -> Path:
    """A whole checkpoint of Megatron-LM, the tracker included."""
    for path in sorted(source.rglob("*")):
        if path.suffix == ".pt" and path.parent.name.startswith("mp_rank_"):
            rewrite_file(path, target / path.relative_to(source), family)
        elif path.name == "latest_checkpointed_iteration.txt":
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target
