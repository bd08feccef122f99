"""The second opinion: the leaves of a ``.pt`` as real torch loads it, still without running anything the file names.

``distrib_optim.pt`` is loaded with ``weights_only=True``.  ``model_optim_rng.pt`` names classes that torch refuses
there (argparse.Namespace, Megatron's enumerations), so its pickle is read by an unpickler that vets every name and puts
an inert stand-in for all but the handful that build tensors.
"""

from __future__ import annotations

import collections
import importlib
import pickle
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, cast

from ckpt2pt.errors import FormatError, UsageError, ref
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.trees import MISSING, Call, Global, Value, ordered_dict
from ckpt2pt.formats.torchfile.vetting import check_name
from ckpt2pt.verification.gather import Bytes, Files
from ckpt2pt.verification.leaves import Leaves, TensorLeaf, flatten, open_pt

_REAL = frozenset(
    {
        ("collections", "OrderedDict"),
        ("_codecs", "encode"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_parameter_with_state"),
    }
)
"""What a loaded tree needs the real thing of; torch resolves its storage classes before it asks."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The elements of a torch tensor."""

    flat: Any

    def block(self, files: Files, start: int, stop: int) -> Bytes:
        """Copy them out."""
        found: Bytes = self.flat[start:stop].contiguous().view(self._bytes).numpy().copy()
        return found

    @property
    def _bytes(self) -> object:
        return _torch().uint8


class _StandIn:
    """An object that was described and not made."""

    named: Global
    """The name that it stands for."""
    _args: tuple[object, ...]
    _state: object

    def __new__(cls, *args: object, **_: object) -> _StandIn:
        made = super().__new__(cls)
        made._args, made._state = args, MISSING
        return made

    def __init__(self, *_: object, **__: object) -> None:
        # Called or not: NEWOBJ makes an object without it.
        self._items: list[object] = []
        self._pairs: list[tuple[object, object]] = []

    def __setstate__(self, state: object) -> None:
        self._state = state

    def __hash__(self) -> int:
        return hash((self.named, len(self._args)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StandIn) and (self.named, self._args) == (other.named, other._args)

    def append(self, item: object) -> None:
        """As a list subclass takes an item."""
        self.__dict__.setdefault("_items", []).append(item)

    def extend(self, items: Collection[object]) -> None:
        """As a list subclass takes several."""
        self.__dict__.setdefault("_items", []).extend(items)

    def __setitem__(self, key: object, value: object) -> None:
        self.__dict__.setdefault("_pairs", []).append((key, value))

    def node(self) -> Call:
        """The same as our own reader's node."""
        held: dict[str, Any] = self.__dict__
        args: Any = tuple(_described(arg) for arg in self._args)
        state: Any = self._state
        return Call(self.named, args, state=state, items=held.get("_items", ()), pairs=held.get("_pairs", ()))


def _described(value: object) -> object:
    """The name that a stand-in for a class has; anything else as it is."""
    named: object = getattr(value, "named", None) if isinstance(value, type) else None
    return value if named is None else named


def open_with_torch(path: Path, *, allow: Collection[str] = (), weights_only: bool = False) -> Leaves:
    """Every leaf of a ``.pt`` as ``torch.load(mmap=True)`` gives it."""
    torch = _torch()
    # Our own reader goes first: it refuses names, nesting, cycles, and storages shorter than their tensors, beyond
    # whose end torch reads on (2.15, mmap=True).
    nbytes = len(Archive.open(path).pickle)
    open_pt(path, allow=allow)
    options: dict[str, Any] = {} if weights_only else {"pickle_module": _vetting_pickle(path, frozenset(allow))}
    try:
        tree: object = torch.load(str(path), map_location="cpu", mmap=True, weights_only=weights_only, **options)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        sentence = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise FormatError(
            f"torch {torch.__version__} cannot load it: {sentence}",
            where=path,
            hint="copy the file again from where it was made, or remove it and convert again",
        ) from error
    return flatten(tree, _translator(torch), where=str(path), nbytes=nbytes)


def _torch() -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UsageError(
            f"torch cannot be imported ({error})",
            where=f"{ref('reader')} torch",
            hint=f"install torch beside ckpt2pt (the extra torch: '.[torch]' in a checkout), or use {ref('reader')} own",
        ) from error


def _translator(torch: ModuleType) -> Callable[[object], object]:
    def translate(value: object) -> object:
        found: Any = value
        if isinstance(value, torch.Tensor):
            dtype = str(found.dtype).removeprefix("torch.")
            return TensorLeaf(dtype, tuple(found.shape), _Loaded(found.detach().reshape(-1)))
        if isinstance(value, torch.dtype):
            return Global("torch", str(value).removeprefix("torch."))
        if isinstance(value, _StandIn):
            return value.node()
        if isinstance(value, type) and issubclass(value, _StandIn):
            return value.named
        if isinstance(value, collections.OrderedDict):
            pairs = cast("dict[Value, Value]", value).items()
            return ordered_dict(
                [(key_of(key), item) for key, item in pairs], attrs=cast("dict[str, Value]", found.__dict__) or None
            )
        if isinstance(value, dict):
            return {key_of(key): item for key, item in cast("dict[Value, object]", value).items()}
        return found

    def key_of(key: object) -> Value:
        if isinstance(key, tuple):
            return tuple(map(key_of, cast("tuple[object, ...]", key)))
        return cast("Value", translate(key))

    return translate


if TYPE_CHECKING:
    _PurePython = pickle.Unpickler
else:
    # The one in C allots its memo up to whatever index a file asks for: 32 GB for five bytes.
    _PurePython = pickle._Unpickler


def _vetting_pickle(path: Path, allow: frozenset[str]) -> SimpleNamespace:
    """What torch.load takes for the module ``pickle``."""

    class Unpickler(_PurePython):
        """Vets every name and looks up almost none."""

        def find_class(self, module: str, name: str) -> object:
            check_name(module, name, allow, str(path))
            if (module, name) in _REAL:
                return super().find_class(module, name)
            if module == "torch" and isinstance(real := getattr(_torch(), name, None), _torch().dtype):
                return real
            return type(name, (_StandIn,), {"named": Global(module, name)})

    def load(file: IO[bytes], **_: object) -> object:
        return Unpickler(file).load()

    return SimpleNamespace(__name__="pickle", Unpickler=Unpickler, load=load, UnpicklingError=pickle.UnpicklingError)
