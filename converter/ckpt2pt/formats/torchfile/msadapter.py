"""Archives that MSAdapter writes, read as those of torch: its names for modules, MindSpore's types, and tensors in C order.

MSAdapter is torch's interface on MindSpore (MindSpeed-LLM).  What its ``torch.save`` writes and torch's does not, seen in files of
MindSpeed-Core-MS r0.2.0 (``msadaptor/torch/serialization.py``, ``_tensor.py``) over mindspore 2.10:

    msadapter._utils, mindtorch.torch._utils        its modules, by the name that they had when it was saved; torch._utils too
    ("storage", "FloatStorage", "0", "cpu", 4)      the class of a storage is a text
    _rebuild_from_type_v2(_rebuild_tensor_v2, mindspore.common.tensor.Tensor, (storage, 0, (3, 2), [1, 3], False, None, None), None)
    mindspore._c_expression.typing.BFloat           made without arguments, given the state (16,): torch.bfloat16

A view is saved as its own elements in C order, and keeps the stride that it had: only size and C order are true.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from ckpt2pt.errors import UnsafePickleError
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import read_pickle
from ckpt2pt.formats.torchfile.trees import (
    ORDERED_DICT,
    REBUILD_FROM_TYPE,
    REBUILD_PARAMETER,
    REBUILD_PARAMETER_WITH_STATE,
    REBUILD_TENSOR,
    STORAGE_CLASSES,
    Call,
    Global,
    Persistent,
    StoredTensor,
    Value,
    as_tensor,
    contiguous_stride,
)
from ckpt2pt.formats.torchfile.unpickle import Reader
from ckpt2pt.formats.torchfile.vetting import check_name

_TYPING = "mindspore._c_expression.typing"
_FOREIGN = re.compile(
    rb"c(?:mindspore\.common\.(?:tensor\nTensor|parameter\nParameter)|mindspore\._c_expression\.typing\n\w+"
    rb"|(?:mindtorch\.torch|msadapter)(?:\.\w+)*\n\w+)\n"
)
_CLASSES: Final = {
    ("mindspore.common.tensor", "Tensor"): ("torch", "Tensor"),
    ("mindspore.common.parameter", "Parameter"): ("torch.nn.parameter", "Parameter"),
}
_STORAGES: Final = frozenset(STORAGE_CLASSES.values())
_DTYPES: Final[dict[tuple[str, int | None], str]] = {
    ("Float", 16): "float16", ("Float", 32): "float32", ("Float", 64): "float64", ("BFloat", 16): "bfloat16",
    ("Int", 8): "int8", ("Int", 16): "int16", ("Int", 32): "int32", ("Int", 64): "int64",
    ("UInt", 8): "uint8", ("UInt", 16): "uint16", ("UInt", 32): "uint32", ("UInt", 64): "uint64",
    ("Bool", None): "bool", ("Complex", 64): "complex64", ("Complex", 128): "complex128",
}  # fmt: skip
_TYPES = frozenset(name for name, _ in _DTYPES)
_MEMO_DISTANCE = 8
"""A pickler remembers an object at once, and its state before it is given: two values back."""


def is_msadapter(pickle: bytes) -> bool:
    """Whether the pickle of an archive names what only MSAdapter or MindSpore have."""
    return _FOREIGN.search(pickle) is not None


def read_tree(archive: Archive, *, allow: Collection[str] = ()) -> Value:
    """The tree of an archive of torch, or of one of MSAdapter as torch would have saved it; nothing is executed.

    A tensor of MSAdapter is a :class:`StoredTensor`, its types are those of torch.  Raises :class:`FormatError` for a pickle that
    neither writes, :class:`UnsafePickleError` for a name that has no business in a checkpoint.
    """
    if not is_msadapter(archive.pickle):
        return read_pickle(archive.pickle, where=archive.path, allow=allow)
    return _Dialect(archive.pickle, archive.path, frozenset(allow)).read()


def _as_torch(module: str, name: str) -> tuple[str, str]:
    """``msadapter.nn.parameter`` -> ``torch.nn.parameter``; names of others stay."""
    for prefix in ("msadapter", "mindtorch.torch"):
        if module == prefix or module.startswith(f"{prefix}."):
            return f"torch{module.removeprefix(prefix)}", name
    return _CLASSES.get((module, name), (module, name))


class _Dialect(Reader):
    """The pickle machine, which puts torch's values in the place of MSAdapter's as soon as they are made."""

    __slots__ = ("unfinished",)

    def __init__(self, data: bytes, where: str, allow: frozenset[str]) -> None:
        super().__init__(data, where, allow)
        self.unfinished = 0  # types that were made and lack their size

    def stop(self) -> Value:
        if self.unfinished:
            self.fail("holds a type of MindSpore without its size")
        return super().stop()

    def name(self, module: str, name: str) -> None:
        if module == _TYPING and name in _TYPES:
            self.stack.append(Global(module, name))
            return
        known = _as_torch(module, name)
        if known != (module, name) and f"{module}.{name}" not in self.allow:
            try:
                check_name(*known, self.allow, self.where)
            except UnsafePickleError:
                check_name(module, name, frozenset(), self.where)  # which refuses it by its own name
            super().name(*known)
        else:
            super().name(module, name)

    def op_persistent(self) -> None:
        match self.stack[-1]:
            case ("storage", str(kind), str(key), str(), numel):
                if kind not in _STORAGES:
                    self.fail(f"has a storage of the type {kind[:40]!r}, which torch does not have")
                self.stack[-1] = ("storage", Global("torch", kind), key, "cpu", numel)
            case _:
                pass
        super().op_persistent()

    def op_reduce(self) -> None:
        args, func = self.stack[-1], self.stack[-2]
        made = self._tensor(func, args) if isinstance(func, Global) and isinstance(args, tuple) else None
        if made is None:
            super().op_reduce()
        else:
            self.stack[-2:] = [made]

    def _tensor(self, func: Global, args: tuple[Value, ...]) -> Value:
        """The tensor that a call makes as MSAdapter writes it; None for any other call."""
        match args:
            case (Global() as inner, Global(), tuple(parts), state) if (
                func == REBUILD_FROM_TYPE and inner == REBUILD_TENSOR
            ):
                found = self._view(parts)
                if found is None or state is None:
                    return found
                view = (Persistent(_storage(found)), 0, found.shape, found.stride, False, Call(ORDERED_DICT))
                return Call(func, (inner, Global("torch", "Tensor"), view, state))
            case (StoredTensor() as found, *_) if func in {REBUILD_PARAMETER, REBUILD_PARAMETER_WITH_STATE}:
                return found
            case _:
                return self._view(args) if func == REBUILD_TENSOR else None

    def _view(self, args: tuple[Value, ...]) -> StoredTensor | None:
        """The tensor in C order; None for arguments as torch itself writes them."""
        match args:
            case (Persistent() as storage, int(offset), tuple(shape), list() | tuple() as stride, bool(), *rest):
                if isinstance(stride, tuple) and any(isinstance(one, Call) for one in rest):
                    return None
                if offset or len(stride) != len(shape) or not all(type(n) is int for n in (*shape, *stride)):
                    self.fail("holds a tensor that is not whole, which MSAdapter never writes")
                steps = contiguous_stride([n for n in shape if isinstance(n, int)])
                found = as_tensor(Call(REBUILD_TENSOR, (storage, 0, shape, steps, False, Call(ORDERED_DICT))))
                if found is None:
                    self.fail("holds a tensor that does not lie inside its storage")
                return found
            case _:
                return None

    def op_newobj(self) -> None:
        args, kind = self.stack[-1], self.stack[-2]
        super().op_newobj()
        if isinstance(kind, Global) and kind.module == _TYPING:
            if args != ():
                self.fail("makes a type of MindSpore with arguments")
            self.unfinished += 1

    def op_build(self) -> None:
        made = self.stack[-2]
        if not isinstance(made, Call) or made.func.module != _TYPING:
            super().op_build()
            return
        state = self.stack.pop()
        bits = state[0] if isinstance(state, tuple) and len(state) == 1 else None
        dtype = _DTYPES.get((made.func.name, bits if type(bits) is int else None))
        if dtype is None:
            self.fail(f"holds a type {made.func.name} of MindSpore that torch does not have")
        self.stack[-1] = known = Global("torch", dtype)
        self.unfinished -= 1
        for index in range(len(self.memo) - 1, max(-1, len(self.memo) - 1 - _MEMO_DISTANCE), -1):
            if self.memo[index] is made:
                self.memo[index] = known
                return


def _storage(found: StoredTensor) -> tuple[Value, ...]:
    return ("storage", Global("torch", STORAGE_CLASSES[found.dtype]), found.key, found.location, found.storage_numel)
