"""The pickle machine, opcode by opcode, against what real pickle makes of the same bytes."""

from __future__ import annotations

import pickle
import pickletools
import struct

import pytest

from ckpt2pt.errors import FormatError
from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Persistent, Value

PLAIN = [
    pytest.param(b"I42\n.", id="INT"),
    pytest.param(b"I01\n.", id="INT-true"),
    pytest.param(b"I00\n.", id="INT-false"),
    pytest.param(b"I-7\n.", id="INT-negative"),
    pytest.param(b"L123456789012345678901234567890L\n.", id="LONG"),
    pytest.param(b"F1.5\n.", id="FLOAT"),
    pytest.param(b"F-inf\n.", id="FLOAT-inf"),
    pytest.param(b"V\\u6a21a\\u005c\n.", id="UNICODE"),
    pytest.param(b"K\xff.", id="BININT1"),
    pytest.param(b"M\xff\xff.", id="BININT2"),
    pytest.param(b"J\xff\xff\xff\xff.", id="BININT"),
    pytest.param(b"\x8a\x00.", id="LONG1-empty"),
    pytest.param(b"\x8a\x02\x00\x80.", id="LONG1"),
    pytest.param(b"\x8b\x03\x00\x00\x00\x01\x02\x03.", id="LONG4"),
    pytest.param(b"G" + struct.pack(">d", 0.1) + b".", id="BINFLOAT"),
    pytest.param(b"\x8c\x02\xc3\xa4.", id="SHORT_BINUNICODE"),
    pytest.param(b"X\x02\x00\x00\x00\xc3\xa4.", id="BINUNICODE"),
    pytest.param(b"\x8d\x02\x00\x00\x00\x00\x00\x00\x00\xc3\xa4.", id="BINUNICODE8"),
    pytest.param(b"C\x01\xff.", id="SHORT_BINBYTES"),
    pytest.param(b"B\x01\x00\x00\x00\xff.", id="BINBYTES"),
    pytest.param(b"\x8e\x01\x00\x00\x00\x00\x00\x00\x00\xff.", id="BINBYTES8"),
    pytest.param(b"].", id="EMPTY_LIST"),
    pytest.param(b"(K\x01K\x02l.", id="LIST"),
    pytest.param(b"]K\x01aK\x02a.", id="APPEND"),
    pytest.param(b"](K\x01K\x02e.", id="APPENDS"),
    pytest.param(b"](e.", id="APPENDS-nothing"),
    pytest.param(b").", id="EMPTY_TUPLE"),
    pytest.param(b"(t.", id="TUPLE-empty"),
    pytest.param(b"(K\x01K\x02K\x03K\x04t.", id="TUPLE"),
    pytest.param(b"K\x01\x85.", id="TUPLE1"),
    pytest.param(b"K\x01K\x02\x86.", id="TUPLE2"),
    pytest.param(b"K\x01K\x02K\x03\x87.", id="TUPLE3"),
    pytest.param(b"}.", id="EMPTY_DICT"),
    pytest.param(b"(K\x01K\x02d.", id="DICT"),
    pytest.param(b"}K\x01K\x02s.", id="SETITEM"),
    pytest.param(b"}(K\x01K\x02K\x03K\x04K\x01K\x05u.", id="SETITEMS-with-a-key-twice"),
    pytest.param(b"K\x01K\x020.", id="POP"),
    pytest.param(b"K\x01(0.", id="POP-of-a-mark"),
    pytest.param(b"K\x01(K\x02K\x031.", id="POP_MARK"),
    pytest.param(b"K\x012\x86.", id="DUP"),
    pytest.param(b"]p7\ng7\n0.", id="PUT-GET"),
    pytest.param(b"]q\x07h\x070.", id="BINPUT-BINGET"),
    pytest.param(b"]r\x07\x00\x00\x00j\x07\x00\x00\x000.", id="LONG_BINPUT-LONG_BINGET"),
    pytest.param(b"\x80\x04]\x94K\x01\x94h\x01\x87.", id="MEMOIZE"),
    pytest.param(b"\x80\x04\x95\x02\x00\x00\x00\x00\x00\x00\x00N.", id="FRAME"),
    pytest.param(b"N.", id="NONE"),
    pytest.param(b"(\x88\x89t.", id="NEWTRUE-NEWFALSE"),
]


@pytest.mark.parametrize("data", PLAIN)
def test_plain_opcodes_mean_what_they_mean_to_pickle(data: bytes) -> None:
    read, real = read_pickle(data, where="test"), pickle.loads(data)
    assert read == real
    assert type(read) is type(real)


OBJECTS: list[tuple[str, bytes, Value]] = [
    ("GLOBAL", b"ctorch\nfloat32\n.", Global("torch", "float32")),
    ("STACK_GLOBAL", b"\x8c\x05torch\x8c\x07float32\x93.", Global("torch", "float32")),
    ("BINPERSID", b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x06tQ.",
     Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 6))),
]  # fmt: skip


@pytest.mark.parametrize(("data", "value"), [pytest.param(data, value, id=name) for name, data, value in OBJECTS])
def test_names_and_storages_become_inert_values(data: bytes, value: Value) -> None:
    assert read_pickle(data, where="test") == value


CALLS = [
    pytest.param(b"ctorch\nSize\n(K\x01K\x02t\x85R.", Call(Global("torch", "Size"), ((1, 2),)), id="REDUCE"),
    pytest.param(b"cargparse\nNamespace\n)\x81.", Call(Global("argparse", "Namespace"), (), new=True), id="NEWOBJ"),
    pytest.param(
        b"cargparse\nNamespace\n)\x81}\x8c\x01aK\x01sb.",
        Call(Global("argparse", "Namespace"), (), True, {"a": 1}),
        id="BUILD",
    ),
    pytest.param(
        b"ccollections\nOrderedDict\n)RK\x01K\x02s(K\x03K\x04u.",
        Call(Global("collections", "OrderedDict"), pairs=[(1, 2), (3, 4)]),
        id="SETITEM-on-an-object",
    ),
    pytest.param(
        b"cmegatron.x\nQueue\n)\x81K\x01a(K\x02K\x03e.",
        Call(Global("megatron.x", "Queue"), new=True, items=[1, 2, 3]),
        id="APPEND-on-an-object",
    ),
    pytest.param(
        b"cmegatron.x\nFoo\nK\x01\x85}\x8c\x01aK\x02s\x92.",
        Call(Global("copyreg", "__newobj_ex__"), (Global("megatron.x", "Foo"), (1,), {"a": 2})),
        id="NEWOBJ_EX",
    ),
    pytest.param(b"\x8f(K\x01K\x02\x90.", Call(Global("__builtin__", "set"), ([1, 2],)), id="EMPTY_SET-ADDITEMS"),
    pytest.param(b"(K\x01K\x02\x91.", Call(Global("__builtin__", "frozenset"), ([1, 2],)), id="FROZENSET"),
    pytest.param(
        b"\x96\x02\x00\x00\x00\x00\x00\x00\x00ab.", Call(Global("__builtin__", "bytearray"), (b"ab",)), id="BYTEARRAY8"
    ),
]


@pytest.mark.parametrize(("data", "expected"), CALLS)
def test_calls_become_descriptions(data: bytes, expected: Call) -> None:
    read = read_pickle(data, where="test")
    assert isinstance(read, Call)
    assert (read.func, read.args, read.new) == (expected.func, expected.args, expected.new)
    assert read.state == expected.state
    assert (list(read.items), list(read.pairs)) == (list(expected.items), list(expected.pairs))


def test_every_opcode_of_pickle_is_read_or_refused_by_name() -> None:
    """An opcode that a later Python adds is refused until somebody has thought about it."""
    read = {
        opcode.name
        for data in [case.values[0] for case in (*PLAIN, *CALLS)] + [data for _, data, _ in OBJECTS]
        if isinstance(data, bytes)
        for opcode, _, _ in pickletools.genops(data)
    }
    refused = {"PERSID", "STRING", "BINSTRING", "SHORT_BINSTRING", "INST", "OBJ", "NEXT_BUFFER", "READONLY_BUFFER"}
    by_name = {"EXT1", "EXT2", "EXT4"}
    assert read | refused | by_name | {"PROTO", "STOP"} == {opcode.name for opcode in pickletools.opcodes}
    assert not read & (refused | by_name)


@pytest.mark.parametrize("code", sorted(set(range(256)) - {ord(opcode.code) for opcode in pickletools.opcodes}))
def test_a_byte_that_is_no_opcode_is_refused(code: int) -> None:
    with pytest.raises(FormatError, match=f"0x{code:02x}"):
        read_pickle(b"N" + bytes((code,)) + b".", where="test")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"P0\n.", id="PERSID"),
        pytest.param(b"S'a'\n.", id="STRING"),
        pytest.param(b"U\x01a.", id="SHORT_BINSTRING"),
        pytest.param(b"T\x01\x00\x00\x00a.", id="BINSTRING"),
        pytest.param(b"(cargparse\nNamespace\no.", id="OBJ"),
        pytest.param(b"(iargparse\nNamespace\n.", id="INST"),
        pytest.param(b"\x97.", id="NEXT_BUFFER"),
        pytest.param(b"N\x98.", id="READONLY_BUFFER"),
    ],
)
def test_opcodes_that_torch_never_writes_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="never writes"):
        read_pickle(data, where="test")


def test_state_that_comes_before_the_items_is_kept() -> None:
    data = b"ccollections\nOrderedDict\n)R}\x8c\x09_metadataNsb(K\x01K\x02u."
    real = pickle.loads(write_pickle(read_pickle(data, where="test")))
    assert real == {1: 2}
    assert real._metadata is None
