"""What a pickle holds, as inert values: nodes, tensors, namespaces, ordered dicts.

Nothing here imports or calls what a node names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, TypeAlias, TypeGuard


class Missing(Enum):
    """The type of :data:`MISSING`; ``None`` will not do, an object can be given it as its state."""

    MISSING = "missing"


MISSING: Final = Missing.MISSING
"""The state of a :class:`Call` that was given none."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name the pickle mentions, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, slots=True)
class Persistent:
    """What the pickle keeps outside itself; in a torch archive always a storage."""

    id: Value


@dataclass(eq=False, slots=True)
class Call:
    """An object made by a call that is not carried out: what it would take to make it.

    ``new`` tells ``func.__new__(func, *args)`` from ``func(*args)``; ``items`` are appended, ``pairs`` set, ``state``
    given to the object afterwards.  A set is ``Call(Global("__builtin__", "set"), ([...],))``, as protocol 2 writes it.
    """

    func: Global
    args: tuple[Value, ...] = ()
    new: bool = False
    state: Value = MISSING
    items: Sequence[Value] = ()
    pairs: Sequence[tuple[Value, Value]] = ()


class Record(tuple["Value", ...]):
    """An object of a class that was asked for, the first value, and its attributes: none of them is a container but for shapes.

    As an object it is equal to itself alone.
    """

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of the tree: a view into the storage ``data/{key}`` of the archive.  Everything counts elements.

    A tree to be written holds it as it is; in one that was read a :class:`Call` stands in its place (:func:`as_tensor`).
    """

    dtype: str
    key: str
    location: str
    storage_numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements of the view (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        expected = contiguous_stride(self.shape)
        return 0 in self.shape or all(
            n == 1 or have == want for n, have, want in zip(self.shape, self.stride, expected, strict=True)
        )


_Node: TypeAlias = "Global | Call | Persistent | StoredTensor | Missing"
Value: TypeAlias = (
    "bool | int | float | str | bytes | tuple[Value, ...] | list[Value] | dict[Value, Value] | _Node | None"
)
"""A node of the tree; :data:`MISSING` only as the state of a :class:`Call`.  Containers may be shared, never cyclic."""

#   dtype         torch class, the first argument of a storage's persistent id
STORAGE_CLASSES: Final[dict[str, str]] = {
    "float32":    "FloatStorage",
    "bfloat16":   "BFloat16Storage",
    "float16":    "HalfStorage",
    "float64":    "DoubleStorage",
    "int64":      "LongStorage",
    "int32":      "IntStorage",
    "int16":      "ShortStorage",
    "int8":       "CharStorage",
    "uint8":      "ByteStorage",
    "bool":       "BoolStorage",
    "complex64":  "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}  # fmt: skip
STORAGES: Final = {dtype: Global("torch", storage) for dtype, storage in STORAGE_CLASSES.items()}
_DTYPES = {storage: dtype for dtype, storage in STORAGES.items()}
assert len(_DTYPES) == len(STORAGE_CLASSES), "two dtypes share one storage class"
# torch.load counts an untyped storage in bytes (torch 2.15, serialization.py, persistent_load).
_DTYPES[Global("torch.storage", "UntypedStorage")] = _DTYPES[Global("torch", "UntypedStorage")] = "uint8"

NAMESPACE = Global("argparse", "Namespace")
SIMPLE_NAMESPACE = Global("types", "SimpleNamespace")
ORDERED_DICT = Global("collections", "OrderedDict")
REBUILD_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
REBUILD_PARAMETER = Global("torch._utils", "_rebuild_parameter")
REBUILD_PARAMETER_WITH_STATE = Global("torch._utils", "_rebuild_parameter_with_state")
REBUILD_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
GETATTRS = frozenset({Global("__builtin__", "getattr"), Global("builtins", "getattr")})
"""How Python 3.11.0 to 3.11.3 pickles a member of an enumeration: ``getattr(<class>, "NAME")`` (CPython gh-93820)."""
ENCODE = Global("_codecs", "encode")
_TENSOR_TYPES = frozenset({Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter")})
_ATTRIBUTE = re.compile(r"(?!__)[A-Za-z_]\w*", re.ASCII)
_MAX_INT = 2**63


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Stride of a C-ordered tensor as torch states it: a dimension of 0 counts as 1."""
    stride: list[int] = []
    step = 1
    for n in reversed(shape):
        stride.append(step)
        step *= max(n, 1)
    return tuple(reversed(stride))


def tensor(
    dtype: str, key: str, storage_numel: int, offset: int, shape: Sequence[int], stride: Sequence[int] | None = None
) -> StoredTensor:
    """A tensor on the CPU: a view into storage ``data/{key}``, counted in elements; without ``stride`` in C order."""
    return StoredTensor(
        dtype=dtype,
        key=key,
        location="cpu",
        storage_numel=storage_numel,
        offset=offset,
        shape=tuple(shape),
        stride=contiguous_stride(shape) if stride is None else tuple(stride),
    )


def as_tensor(value: Value) -> StoredTensor | None:
    """The tensor (or parameter) ``value`` stands for; ``None`` for anything else and for one torch could not build."""
    if isinstance(value, StoredTensor):
        return value
    if not isinstance(value, Call) or value.new or value.items or value.pairs:
        return None
    if value.func in (REBUILD_PARAMETER, REBUILD_PARAMETER_WITH_STATE):
        inner = value.args[0] if value.args else None
        return as_tensor(inner) if isinstance(inner, Call) and inner.func == REBUILD_TENSOR else None
    if value.func == REBUILD_FROM_TYPE:
        return _with_attributes(value)
    if value.func != REBUILD_TENSOR or value.state is not MISSING:
        return None
    match value.args:
        # The seventh argument is metadata about conjugate and negative views.
        case (Persistent() as storage, int(offset), tuple(shape), tuple(stride), bool(), Call(func=hooks), *rest):
            if hooks != ORDERED_DICT or len(rest) > 1:
                return None
            return _view(storage, offset, shape, stride)
        case _:
            return None


def _with_attributes(value: Call) -> StoredTensor | None:
    """The tensor that a call of ``_rebuild_from_type_v2`` makes and gives attributes (torch 2.15, torch/_tensor.py).

    Megatron's float32 copies of weights carry some (Megatron-LM cac60ce4, core/optimizer/optimizer.py, line 427).
    """
    match value.args:
        case (Global() as func, Global() as kind, tuple(args), dict(state)) if func == REBUILD_TENSOR:
            named = all(isinstance(name, str) and _ATTRIBUTE.fullmatch(name) for name in state)
            return as_tensor(Call(func, args)) if named and kind in _TENSOR_TYPES else None
        case _:
            return None


def enum_member(value: Value) -> str | None:
    """``module.Class.NAME`` of a member of an enumeration that is written by its name; None for anything else."""
    match value:
        case Call(func=Global() as func, args=(Global() as kind, str(name))) if func in GETATTRS:
            return f"{kind}.{name}"
        case _:
            return None


def as_storage(value: Persistent) -> tuple[str, str, str, int] | None:
    """dtype, key, location and number of elements of a storage; ``None`` if it is not a storage of a torch archive."""
    if not isinstance(value.id, tuple) or len(value.id) != 5:
        return None
    word, kind, key, location, numel = value.id
    dtype = _DTYPES.get(kind) if word == "storage" and isinstance(kind, Global) else None
    if dtype is None or not isinstance(key, str) or not isinstance(location, str) or not _is_count(numel):
        return None
    return (dtype, key, location, numel) if key else None


def _view(storage: Persistent, offset: int, shape: tuple[Value, ...], stride: tuple[Value, ...]) -> StoredTensor | None:
    """The view, if it lies inside its storage."""
    found = as_storage(storage)
    sizes, steps = _counts(shape), _counts(stride)
    if found is None or sizes is None or steps is None or len(sizes) != len(steps) or not _is_count(offset):
        return None
    dtype, key, location, numel = found
    last = offset + sum([(n - 1) * step for n, step in zip(sizes, steps, strict=True)])
    if last >= numel and 0 not in sizes:
        return None
    return StoredTensor(
        dtype=dtype, key=key, location=location, storage_numel=numel, offset=offset, shape=sizes, stride=steps
    )


def _is_count(value: Value) -> TypeGuard[int]:
    """Whether ``value`` is an integer torch can count with; a bool is not."""
    return type(value) is int and 0 <= value < _MAX_INT


def _counts(values: tuple[Value, ...]) -> tuple[int, ...] | None:
    counts = tuple([n for n in values if _is_count(n)])
    return counts if len(counts) == len(values) else None


def namespace(attrs: Mapping[str, Value]) -> Call:
    """The node of an ``argparse.Namespace`` with these attributes."""
    return Call(NAMESPACE, new=True, state=dict(attrs.items()))


def is_namespace(value: Value) -> bool:
    """Whether ``value`` stands for an ``argparse.Namespace`` or a ``types.SimpleNamespace``."""
    if not isinstance(value, Call):
        return False
    kind = value.args[0] if value.func.name == "_reconstructor" and value.args else value.func
    return kind in (NAMESPACE, SIMPLE_NAMESPACE)


def namespace_attrs(value: Value) -> dict[str, Value]:
    """The attributes of a namespace, in a new dict; their values are shared with the node."""
    if not isinstance(value, Call) or not is_namespace(value):
        raise TypeError(f"a {type(value).__name__} is not a namespace")
    state = value.state if isinstance(value.state, dict) else {}
    return {name: attr for name, attr in state.items() if isinstance(name, str)}


def with_attrs(value: Value, changes: Mapping[str, Value]) -> Call:
    """A copy of a namespace with ``changes``; new attributes come last, everything unchanged is shared."""
    attrs = namespace_attrs(value)
    assert isinstance(value, Call)
    attrs.update(changes)
    return replace(value, state=dict(attrs.items()))


def ordered_dict(pairs: Iterable[tuple[Value, Value]], *, attrs: Mapping[str, Value] | None = None) -> Call:
    """The node of a ``collections.OrderedDict``; ``attrs`` are attributes, as a state dict's ``_metadata``."""
    return Call(ORDERED_DICT, state=MISSING if attrs is None else dict(attrs.items()), pairs=list(pairs))


def entries(value: Value) -> list[tuple[Value, Value]] | None:
    """Keys and values of a dict or an OrderedDict in order; ``None`` for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, Call) and value.func == ORDERED_DICT:
        return list(value.pairs)
    return None
