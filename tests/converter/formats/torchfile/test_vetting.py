"""Which names a checkpoint may hold, in what form, and what is refused with which words."""

from __future__ import annotations

import importlib
import pickle
from typing import Any

import pytest

from ckpt2pt.errors import FormatError, UnsafePickleError
from ckpt2pt.formats.torchfile import vetting
from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Persistent, Value, as_tensor
from ckpt2pt.formats.torchfile.vetting import check_name, check_tree, is_key


def mention(module: str, name: str) -> bytes:
    return (
        b"\x80\x04\x8c"
        + bytes((len(module),))
        + module.encode()
        + b"\x8c"
        + bytes((len(name),))
        + name.encode()
        + b"\x93."
    )


@pytest.mark.parametrize(
    "full",
    [
        "argparse.Namespace", "types.SimpleNamespace", "collections.OrderedDict", "collections.defaultdict",
        "torch.float32", "torch.bfloat16", "torch.bool", "torch.float8_e4m3fn", "torch.FloatStorage",
        "torch.BFloat16Storage", "torch.ComplexDoubleStorage", "torch.Size", "torch.device",
        "torch.storage.UntypedStorage", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
        "torch._tensor._rebuild_from_type_v2", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.serialization._get_layout",
        "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType",
        "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
        "_codecs.encode", "copyreg._reconstructor", "copy_reg._reconstructor", "__builtin__.set", "builtins.frozenset",
        "builtins.object", "datetime.datetime", "pathlib.PosixPath", "pathlib._local.PosixPath", "signal.Signals",
        "megatron.core.enums.ModelType", "megatron.core.transformer.enums.AttnBackend", "mindspeed.core.Foo",
        "mindspeed_llm.tasks.Foo", "mindspeed_ms.core.Foo", "transformer_engine.common.recipe.Format",
    ],
)  # fmt: skip
def test_names_of_data_are_allowed(full: str) -> None:
    module, _, name = full.rpartition(".")
    assert read_pickle(mention(module, name), where="test") == Global(module, name)


REFUSED: list[tuple[str, str]] = [
    *((module, "system") for module in ("os", "posix", "nt")),
    *(("builtins", name) for name in ("eval", "exec", "getattr", "setattr", "__import__", "open", "compile", "range")),
    *(("__builtin__", name) for name in ("eval", "execfile", "apply", "input", "file", "xrange", "reduce")),
    ("subprocess", "Popen"), ("importlib", "import_module"), ("runpy", "run_path"), ("shutil", "rmtree"),
    ("socket", "socket"), ("sys", "exit"), ("types", "FunctionType"), ("types", "CodeType"), ("types", "MethodType"),
    ("functools", "partial"), ("operator", "attrgetter"), ("operator", "methodcaller"), ("pickle", "loads"),
    ("_pickle", "loads"), ("marshal", "loads"), ("ctypes", "CDLL"), ("webbrowser", "open"), ("pydoc", "locate"),
    ("_io", "open"), ("_io", "FileIO"), ("io", "open"), ("codecs", "open"), ("_codecs", "lookup"), ("_codecs", "decode"),
    ("copyreg", "__newobj__"), ("copyreg", "add_extension"), ("collections", "namedtuple"), ("pathlib", "os"),
    ("torch", "load"), ("torch", "save"), ("torch.hub", "load"), ("torch", "hub"), ("torch.jit", "load"),
    ("torch._tensor", "_rebuild_from_type"), ("torch.storage", "_load_from_bytes"), ("torch", "Float"),
    ("torch.serialization", "load"), ("torch._utils", "_rebuild_tensor_v3"), ("torch.utils.data", "DataLoader"),
    ("numpy", "load"), ("numpy", "fromfile"), ("numpy", "memmap"), ("numpy.dtypes", "os"), ("numpy.core", "os"),
    ("numpy.testing._private.utils", "runstring"), ("numpy.f2py", "compile"), ("numpy.random._pickle", "Foo"),
    ("megatron.core.utils", "os"), ("megatron.training", "main"), ("megatron.core", "_Private"), ("megatron", "core"),
    ("megatron.core.enums", "modelType"), ("megatronx.core", "Foo"), ("notmegatron", "Foo"), ("mindspore", "Tensor"),
    ("argparse", "Namespace.__init__"), ("argparse", "_os"), ("argparse", "_sys"), ("argparse", "ArgumentParser"),
    ("megatron.core.enums", "ModelType.__init__.__globals__"), ("megatron.core.enums", "ModelType.x"),
    ("argparse.Namespace", "__init__"), ("types.SimpleNamespace", "__class__"), ("torch.float32", "X"),
    ("megatron..x", "Foo"), (".megatron", "Foo"), ("megatron.", "Foo"), ("megatron/../os", "Foo"), ("", "Namespace"),
    ("megatron.x", ""), ("megatron.x", "Foo\n"), ("megatron.x\n", "Foo"), ("megatron.x", "Foo bar"),
    ("megatron.x", "Ｆoo"), ("megatron.ｘ", "Foo"), ("os\nsystem", "x"), ("__main__", "Foo"), ("fork.enums", "ModelType"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), REFUSED, ids=lambda part: ascii(part) if isinstance(part, str) else None)
def test_every_other_name_is_refused_when_it_is_mentioned(module: str, name: str) -> None:
    mentions = b"\x80\x04" + b"".join(b"\x8c" + bytes((len(text),)) + text for text in (module.encode(), name.encode()))
    with pytest.raises(UnsafePickleError) as caught:
        read_pickle(mentions + b"\x930N.", where="args_tp00_pp000.pt")
    shown = f"{module}.{name}"
    assert (shown if shown.isprintable() else ascii(shown)) in caught.value.what
    assert caught.value.where == "args_tp00_pp000.pt"


def test_the_message_says_what_to_do_about_a_class_of_ones_own() -> None:
    with pytest.raises(UnsafePickleError) as caught:
        read_pickle(mention("fork.enums", "ModelType"), where="args.pt")
    assert str(caught.value) == (
        "the pickle names fork.enums.ModelType, which has no business in a checkpoint\n"
        "  where: args.pt\n"
        "  hint:  write the file again without it, or if fork.enums.ModelType is a class of your own Megatron fork,"
        " list it under pickle_globals in the rule file (model.rules)"
    )


def test_no_way_to_allow_what_can_never_be_allowed_is_offered() -> None:
    with pytest.raises(UnsafePickleError) as caught:
        read_pickle(mention("os", "system"), where="args.pt")
    assert caught.value.hint == "write the file again without it"


def test_a_name_of_a_fork_is_allowed_when_it_is_listed() -> None:
    data = mention("fork.enums", "ModelType")
    assert read_pickle(data, where="test", allow={"fork.enums.ModelType"}) == Global("fork.enums", "ModelType")
    with pytest.raises(UnsafePickleError):
        read_pickle(data, where="test", allow={"fork.enums", "fork.enums.Other", "ModelType", "fork"})


@pytest.mark.parametrize(
    "full",
    [
        "os.system", "posix.system", "nt.system", "builtins.eval", "__builtin__.eval", "subprocess.Popen", "sys.exit",
        "importlib.import_module", "shutil.rmtree", "socket.socket", "runpy.run_path", "pickle.loads", "cPickle.loads",
        "commands.getoutput", "copy_reg.add_extension", "os.path.join", "torch.load", "torch.hub.load", "numpy.load",
        "functools.partial",
    ],
)  # fmt: skip
def test_listing_a_dangerous_name_does_not_allow_it(full: str) -> None:
    module, _, name = full.rpartition(".")
    with pytest.raises(UnsafePickleError, match=full.replace(".", r"\.")):
        read_pickle(mention(module, name), where="test", allow={full})
    head, _, rest = full.partition(".")
    with pytest.raises(UnsafePickleError):
        read_pickle(mention(head, rest), where="test", allow={full})


def test_a_listed_name_does_not_allow_to_reach_through_a_class() -> None:
    with pytest.raises(UnsafePickleError):
        read_pickle(
            mention("fork.enums", "Foo.__init__"), where="test", allow={"fork.enums.Foo", "fork.enums.Foo.__init__"}
        )


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
def test_the_allowed_names_that_exist_here_are_what_they_say() -> None:
    """Each is a type, a dtype, or one of the few functions that only put data together."""
    functions = {"encode", "_reconstructor", "__newobj_ex__", "_reconstruct", "scalar", "_frombuffer", "_get_layout"}
    odd = []
    for module, name in sorted(vetting._SAFE_PAIRS):
        try:
            found: Any = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue  # another version of Python, numpy or torch has it
        if not isinstance(found, type) and type(found).__name__ != "dtype" and not name.startswith("_rebuild_"):
            odd.append(name)
    assert set(odd) <= functions
    assert {"encode", "_reconstruct"} <= set(odd)


# ------------------------------------------------------------------------------------------------------- form of calls

OBJECT = Global("builtins", "object")
NAMESPACE = Global("argparse", "Namespace")
REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
TENSOR_CLASS = Global("torch", "Tensor")
STORED: tuple[Value, ...] = (
    Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 6)), 0, (2, 3), (3, 1), False,
    Call(Global("collections", "OrderedDict")),
)  # fmt: skip


def from_type(*, func: Value = REBUILD, kind: Value = TENSOR_CLASS, args: Value = STORED, state: Value = None) -> Call:
    """A tensor with attributes, as torch saves it."""
    attributes: Value = {"partition_dim": 0, "tensor_model_parallel": True} if state is None else state
    return Call(Global("torch._tensor", "_rebuild_from_type_v2"), (func, kind, args, attributes))


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(Call(Global("torch._utils", "_rebuild_tensor_v2"), ()), id="tensor-of-nothing"),
        pytest.param(Call(Global("torch._utils", "_rebuild_parameter"), (1, True, None)), id="parameter-of-a-number"),
        pytest.param(from_type(func=Global("torch._utils", "_rebuild_parameter")), id="typed-by-another-function"),
        pytest.param(from_type(kind=NAMESPACE), id="typed-as-a-namespace"),
        pytest.param(from_type(kind=Global("megatron.core.x", "Subclass")), id="typed-as-a-class-of-megatron"),
        pytest.param(from_type(args=()), id="typed-tensor-of-nothing"),
        pytest.param(from_type(state={"__class__": 1}), id="typed-tensor-with-another-class"),
        pytest.param(from_type(state={1: 1}), id="typed-tensor-with-a-number-for-a-name"),
        pytest.param(from_type(state=(None, {"a": 1})), id="typed-tensor-with-slots"),
        pytest.param(Call(NAMESPACE, (1,), new=True), id="namespace-with-arguments"),
        pytest.param(Call(NAMESPACE, new=True, state=[1]), id="namespace-from-a-list"),
        pytest.param(Call(NAMESPACE, new=True, state=(None, {"__class__": 1})), id="namespace-with-slots"),
        pytest.param(Call(NAMESPACE, new=True, state={1: 2}), id="attribute-without-a-name"),
        pytest.param(Call(Global("collections", "OrderedDict"), ([1],)), id="ordered-dict-with-arguments"),
        pytest.param(Call(Global("collections", "OrderedDict"), pairs=[("a", 1), ("a", 2)]), id="key-twice"),
        pytest.param(Call(Global("_codecs", "encode"), ("a", "zip")), id="another-codec"),
        pytest.param(Call(Global("_codecs", "encode"), (b"a", "latin1")), id="bytes-encoded"),
        pytest.param(Call(Global("numpy", "ndarray"), ((10**12,),)), id="array-of-a-terabyte"),
        pytest.param(
            Call(Global("numpy._core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (10**12,), b"b")),
            id="reconstructed-array-of-a-terabyte",
        ),
        pytest.param(Call(Global("builtins", "bytearray"), (10**12,)), id="bytearray-of-a-terabyte"),
        pytest.param(
            Call(Global("builtins", "bytes"), (Call(Global("builtins", "int"), ("1000000000000",)),)),
            id="bytes-of-a-terabyte-by-a-detour",
        ),
        pytest.param(Call(Global("copyreg", "_reconstructor"), (NAMESPACE, Global("torch", "Size"), None)), id="base"),
        pytest.param(
            Call(Global("copyreg", "_reconstructor"), (NAMESPACE, OBJECT, None), state=[1]), id="old-namespace"
        ),
        pytest.param(Call(Global("copyreg", "__newobj_ex__"), (1, (), {})), id="new-of-a-number"),
    ],
)
def test_a_call_of_known_name_in_another_form_is_refused(call: Call) -> None:
    with pytest.raises(FormatError, match=call.func.name) as caught:
        check_tree(["before", call], "args.pt")
    assert caught.value.where == "args.pt"
    with pytest.raises(FormatError):
        write_pickle(call)


def test_a_good_form_passes() -> None:
    check_tree(from_type(), "test")
    check_tree(from_type(kind=Global("torch.nn.parameter", "Parameter"), state={}), "test")
    assert as_tensor(from_type()) == as_tensor(Call(REBUILD, STORED))
    check_tree(Call(Global("copyreg", "_reconstructor"), (NAMESPACE, OBJECT, None), state={"a": 1}), "test")
    check_tree(Call(Global("builtins", "bytearray"), (b"a",)), "test")


# ---------------------------------------------------------------------------------------------------------- keys, depth


@pytest.mark.parametrize(
    ("key", "good"),
    [
        pytest.param("a", True, id="text"),
        pytest.param(None, True, id="none"),
        pytest.param(2**63, True, id="64-bits"),
        pytest.param(2**64, False, id="65-bits"),
        pytest.param((Global("torch", "bfloat16"), Global("torch", "float32")), True, id="dtypes"),
        pytest.param((1, ("a", (2.5, b"b"))), True, id="nested"),
        pytest.param(tuple(range(63)), True, id="64-parts"),
        pytest.param(tuple(range(64)), False, id="65-parts"),
        pytest.param(([],), False, id="list-inside"),
        pytest.param({}, False, id="dict"),
        pytest.param((2**64,), False, id="65-bits-inside"),
    ],
)
def test_keys_are_small(key: Value, good: bool) -> None:
    assert is_key(key) is good


def nested(depth: int) -> list[Value]:
    tree: list[Value] = []
    for _ in range(depth):
        tree = [tree]
    return tree


def test_a_tree_may_be_200_deep_and_no_deeper() -> None:
    data = pickle.dumps(nested(200), protocol=2)
    assert write_pickle(read_pickle(data, where="test")) == data
    with pytest.raises(FormatError, match="200 deep"):
        read_pickle(pickle.dumps(nested(201), protocol=2), where="test")
    with pytest.raises(FormatError, match="200 deep"):
        write_pickle(nested(201))


def test_depth_is_that_of_the_longest_way_to_a_shared_value() -> None:
    shared = nested(150)
    check_tree([shared, [shared]], "test")
    deep: Value = shared
    for _ in range(60):
        deep = [deep]
    with pytest.raises(FormatError, match="200 deep"):
        check_tree([shared, deep], "test")
    with pytest.raises(FormatError, match="200 deep"):
        check_tree([deep, shared], "test")


def test_a_tree_that_contains_itself_is_not_written() -> None:
    knot: list[Value] = []
    knot.append((1, {"a": knot}))
    with pytest.raises(FormatError, match="contains itself"):
        write_pickle(knot)


def test_check_name_is_the_same_check_for_others_who_load_pickles() -> None:
    check_name("torch", "float32", frozenset(), "test")
    with pytest.raises(UnsafePickleError, match=r"os\.system"):
        check_name("os", "system", frozenset({"os.system"}), "test")
