"""What a checkpoint's pickle may name, what it may call, and what shape its tree may have.

Names are judged when they are mentioned, calls and shape when the tree is whole.  Pure: nothing is looked up.
"""

from __future__ import annotations

import re
import sys
from _compat_pickle import IMPORT_MAPPING  # torch.load renames modules by this table
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Final, NoReturn, TypeAlias

from ckpt2pt.errors import FormatError, UnsafePickleError, aside
from ckpt2pt.formats.torchfile.trees import (
    ENCODE,
    GETATTRS,
    MISSING,
    NAMESPACE,
    ORDERED_DICT,
    REBUILD_FROM_TYPE,
    REBUILD_PARAMETER,
    REBUILD_PARAMETER_WITH_STATE,
    REBUILD_TENSOR,
    SIMPLE_NAMESPACE,
    STORAGE_CLASSES,
    Call,
    Global,
    Missing,
    Persistent,
    Record,
    StoredTensor,
    Value,
    as_storage,
    as_tensor,
    is_namespace,
)

_MAX_DEPTH = 200
_MAX_KEY_PARTS = 64
_MAX_KEY_BITS = 64

# Module and name, as protocol 2 (Python 2 names) and later ones spell them. Every name here makes data and nothing
# else; torch 2.15 (_weights_only_unpickler.py) and Megatron-LM (megatron/core/safe_globals.py) trust most of them too.
_SAFE: Final[dict[str, str]] = {
    "__builtin__":             "bool bytearray bytes complex dict float frozenset int list object set slice str tuple",
    "builtins":                "bool bytearray bytes complex dict float frozenset int list object set slice str tuple",
    "_codecs":                 "encode",
    "_io":                     "BytesIO",
    "argparse":                "Namespace",
    "collections":             "Counter OrderedDict defaultdict",
    "copy_reg":                "_reconstructor",
    "copyreg":                 "_reconstructor __newobj_ex__",
    "datetime":                "date datetime time timedelta timezone",
    "numpy":                   "ndarray dtype bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16"
                               " float32 float64 complex64 complex128",
    "numpy.core.multiarray":   "_reconstruct scalar",
    "numpy._core.multiarray":  "_reconstruct scalar",
    "numpy.core.numeric":      "_frombuffer",
    "numpy._core.numeric":     "_frombuffer",
    "pathlib":                 "Path PosixPath PurePath PurePosixPath",
    "pathlib._local":          "Path PosixPath PurePath PurePosixPath",
    "signal":                  "Signals",
    "torch":                   "Size device uint16 uint32 uint64 complex32 float8_e4m3fn float8_e4m3fnuz float8_e5m2"
                               " float8_e5m2fnuz float8_e8m0fnu Tensor UntypedStorage",
    "torch._tensor":           "_rebuild_from_type_v2",
    "torch._utils":            "_rebuild_tensor_v2 _rebuild_parameter _rebuild_parameter_with_state",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta"
                               " TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.planner": "SavePlan TensorWriteData WriteItem WriteItemType",
    "torch.nn.parameter":      "Parameter",
    "torch.serialization":     "_get_layout",
    "torch.storage":           "TypedStorage UntypedStorage",
    "types":                   "SimpleNamespace",
}  # fmt: skip
_SAFE_PAIRS = frozenset(
    {(module, name) for module, names in _SAFE.items() for name in names.split()}
    | {("torch", name) for pair in STORAGE_CLASSES.items() for name in pair}
)
# Classes (enums mostly) of Megatron and its relatives. What they do when a training run loads them is theirs.
TRUSTED_PACKAGES = frozenset({"megatron", "mindspeed", "mindspeed_llm", "mindspeed_ms", "transformer_engine"})
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_CLASS = re.compile(r"[A-Z]\w*", re.ASCII)
_ENUMS = frozenset({("signal", "Signals")})
_MEMBER = re.compile(r"[A-Za-z]\w*", re.ASCII)
_DTYPE_CLASS = re.compile(r"[A-Z]\w*DType", re.ASCII)
# A rule file may add the classes of a fork, never these.
_NEVER = frozenset(
    {*sys.stdlib_module_names, *(module.partition(".")[0] for module in IMPORT_MAPPING), "numpy", "torch"}
)


def check_name(module: str, name: str, allow: frozenset[str], where: str) -> None:
    """Refuse a name that has no business in a checkpoint; ``allow`` holds further ones as ``module.name``.

    ``getattr`` passes: it is judged by its arguments (:func:`check_member`).
    """
    if _is_safe(module, name, allow) or Global(module, name) in GETATTRS:
        return
    raise _refused(module, name, where)


def check_member(func: Global, args: tuple[Value, ...], allow: frozenset[str], where: str) -> None:
    """Refuse any call of ``getattr`` but that for a member of an enumeration: ``getattr(<class>, "NAME")``."""
    match args:
        case (Global(module=module, name=kind), str(member)):
            known = (module, kind) in _ENUMS or _is_trusted_class(module, kind, allow)
            if known and _MEMBER.fullmatch(member):
                return
        case _:
            pass
    raise UnsafePickleError(
        f"the pickle calls {func} with something else than a known class and the name of one of its members",
        where=where,
        hint="write the file again without it",
    )


def refuse_mention(name: Global, where: str) -> NoReturn:
    """Refuse a name that may only be called, and was not."""
    raise _refused(name.module, name.name, where)


def _refused(module: str, name: str, where: str) -> UnsafePickleError:
    full = f"{module}.{name}"
    shown = full if full.isprintable() and len(full) <= 200 else ascii(full[:200])
    hint = "write the file again without it"
    if module.partition(".")[0] not in _NEVER and _NAME.fullmatch(name):
        hint += (
            f", or if {shown} is a class of your own Megatron fork, list it under pickle_globals in the rule file"
            f"{aside('model.rules')}"
        )
    return UnsafePickleError(f"the pickle names {shown}, which has no business in a checkpoint", where=where, hint=hint)


def _is_safe(module: str, name: str, allow: frozenset[str]) -> bool:
    # A dot in the name would reach through the object it names, to Foo.__init__.__globals__.
    if not _MODULE.fullmatch(module) or not _NAME.fullmatch(name):
        return False
    if (module, name) in _SAFE_PAIRS or (module == "numpy.dtypes" and _DTYPE_CLASS.fullmatch(name)):
        return True
    return _is_trusted_class(module, name, allow)


def _is_trusted_class(module: str, name: str, allow: frozenset[str]) -> bool:
    package = module.partition(".")[0]
    if package in TRUSTED_PACKAGES and _CLASS.fullmatch(name):
        return True
    return f"{module}.{name}" in allow and package not in _NEVER


def is_key(key: Value) -> bool:
    """Whether hashing ``key`` is quick: tuples of shared tuples take exponential time, and chosen integers collide."""
    pending, parts = [key], 0
    while pending:
        part = pending.pop()
        parts += 1
        if parts > _MAX_KEY_PARTS or isinstance(part, list | dict | Persistent):
            return False
        if type(part) is tuple:  # a record is hashed as an object
            pending.extend(part[: _MAX_KEY_PARTS + 1])
        elif isinstance(part, int) and part.bit_length() > _MAX_KEY_BITS:
            return False
    return True


def damaged(what: str, where: str) -> FormatError:
    """The error for a pickle that is not what torch.save writes."""
    return FormatError(what, where=where, hint="copy the file again from where it was made, or save it again there")


def check_tree(root: Value, where: str) -> None:
    """Refuse a tree that contains itself, is nested too deeply, or holds a call that could not give what it says."""
    depths: dict[int, int] = {}

    def depth(node: Value, above: int) -> int:
        if isinstance(node, Global) and node in GETATTRS:
            refuse_mention(node, where)
        fault = _flaw(node)
        if fault is not None:
            raise damaged(f"the pickle holds something it should not: {fault}", where)
        depths[id(node)] = _OPEN
        deepest = 0
        for child in _children(node):
            if type(child) in _LEAVES:
                continue
            below = 0 if _is_plain(child) else depths.get(id(child))
            if below is None:
                below = depth(child, above + 1) if above < _MAX_DEPTH else _MAX_DEPTH
            if below == _OPEN:
                raise damaged("the pickle holds a value that contains itself", where)
            if below >= deepest:
                deepest = below + 1
        if deepest > _MAX_DEPTH:
            raise damaged(f"the pickle is nested more than {_MAX_DEPTH} deep", where)
        depths[id(node)] = deepest
        return deepest

    depth(root, 0)


_OPEN = -1
_MAX_PLAIN = 8
_LEAVES = frozenset({type(None), bool, int, float, str, bytes, Record, StoredTensor, Missing})


def _is_plain(node: Value) -> bool:
    """A small tuple, as shapes are: to remember that it was seen takes more memory than it does."""
    return type(node) is tuple and len(node) <= _MAX_PLAIN and _LEAVES.issuperset(map(type, node))


def _children(node: Value) -> Iterable[Value]:
    """What ``node`` holds; each child is held by ``node`` itself, so that its id stays its own."""
    if isinstance(node, dict):
        return chain(node.keys(), node.values())
    if isinstance(node, Call):
        return chain((node.args, node.state), node.items, chain.from_iterable(node.pairs))
    # A storage's id is a flat tuple of known form.
    return node if isinstance(node, list | tuple) else ()


def _flaw(node: Value) -> str | None:
    """What is wrong with a node whose form is known, ``None`` if nothing is or the form is not known."""
    if isinstance(node, Persistent) and as_storage(node) is None:
        return "a reference outside that is not to a storage"
    known = _FORMS.get(node.func) if isinstance(node, Call) else None
    if known is None or not isinstance(node, Call) or known[0](node):
        return None
    return f"{node.func} is not {known[1]}"


def _is_filled_later(call: Call) -> bool:
    # torch would keep the last of two equal keys, whoever reads pairs the first.
    keys = [key for key, _ in call.pairs if isinstance(key, str)]
    return not call.args and len(set(keys)) == len(keys)


def _has_names(call: Call) -> bool:
    names: Iterable[Value] = call.state if isinstance(call.state, dict) else ()
    return isinstance(call.state, dict | Missing) and all(isinstance(name, str) for name in names)


def _is_new_namespace(call: Call) -> bool:
    return not call.args and _has_names(call)


def _is_reconstructed(call: Call) -> bool:
    match call.args:
        case (Global(), Global(module="__builtin__" | "builtins", name="object"), None):
            return not call.new and (_has_names(call) or not is_namespace(call))
        case _:
            return False


def _is_new_with_keywords(call: Call) -> bool:
    match call.args:
        case (Global(), tuple(), dict()):
            return not call.new
        case _:
            return False


def _is_bytes_as_text(call: Call) -> bool:
    # Any other codec would be looked up, that is imported, by name.
    match call.args:
        case (str(), "latin1" | "latin-1"):
            return not call.new
        case _:
            return False


def _is_array(call: Call) -> bool:
    # The size is 0 in every pickle numpy writes; anything else is memory on order.
    match call.args:
        case (Global(module="numpy", name="ndarray"), (0,), bytes() | Call(func=Global(name="encode"))):
            return not call.new
        case _:
            return False


def _is_plain_data(call: Call) -> bool:
    # bytearray(10**12) is a terabyte of zeros.
    return all(
        isinstance(arg, str | bytes | list) or (isinstance(arg, Call) and arg.func == ENCODE) for arg in call.args
    )


def _is_member(call: Call) -> bool:
    # State or items would go to the class's one member, which every user of it shares.
    return not (call.new or call.items or call.pairs) and call.state is MISSING


_Form: TypeAlias = tuple[Callable[[Call], bool], str]
_TENSOR: Final[_Form] = (
    lambda call: as_tensor(call) is not None,
    "a tensor: it needs a storage, an offset, a shape and a stride that lie inside it",
)
_ATTRS: Final[_Form] = (_is_new_namespace, "a namespace: it takes no arguments and its attributes have names")
_ARRAY: Final[_Form] = (_is_array, "an array as numpy writes it: (ndarray, (0,), b'b')")
_DATA: Final[_Form] = (_is_plain_data, "given data: a number of bytes is not data")
_FORMS: Final[dict[Global, _Form]] = {
    REBUILD_TENSOR: _TENSOR,
    REBUILD_PARAMETER: _TENSOR,
    REBUILD_PARAMETER_WITH_STATE: _TENSOR,
    REBUILD_FROM_TYPE: _TENSOR,
    NAMESPACE: _ATTRS,
    SIMPLE_NAMESPACE: _ATTRS,
    ORDERED_DICT: (_is_filled_later, "an OrderedDict that starts empty and has each key once"),
    ENCODE: (_is_bytes_as_text, "bytes written as latin1 text"),
    Global("numpy.core.multiarray", "_reconstruct"): _ARRAY,
    Global("numpy._core.multiarray", "_reconstruct"): _ARRAY,
    Global("numpy", "ndarray"): (lambda call: False, "called in any pickle numpy writes"),
    Global("copyreg", "_reconstructor"): (_is_reconstructed, "given a class, object and None"),
    Global("copy_reg", "_reconstructor"): (_is_reconstructed, "given a class, object and None"),
    Global("copyreg", "__newobj_ex__"): (_is_new_with_keywords, "given a class, a tuple and a dict"),
    **dict.fromkeys(GETATTRS, (_is_member, "a member of an enumeration, which takes no state and no items")),
    Global("builtins", "bytes"): _DATA,
    Global("__builtin__", "bytes"): _DATA,
    Global("builtins", "bytearray"): _DATA,
    Global("__builtin__", "bytearray"): _DATA,
}
