"""Hostile and damaged pickles: nothing runs, nothing hangs, and the message names what was found."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import pickletools
import struct
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt2pt.errors import Ckpt2ptError, FormatError, UnsafePickleError
from ckpt2pt.formats.torchfile import unpickle
from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from goldens import golden_root


@contextmanager
def quick() -> Iterator[None]:
    """The block must take little time, on a busy machine too."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 10


def touch(path: Path) -> str:
    return f"{sys.executable} -c \"open('{path}', 'w')\""


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


class Reduced:
    """Pickled as whatever call it is given."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


# ------------------------------------------------------------------------------------------- pickles that run something

SYSTEM = f"{os.system.__module__}.system"  # posix.system


def by_reduce(protocol: int) -> Callable[[Path], bytes]:
    return lambda path: pickle.dumps({"args": Reduced(os.system, (touch(path),))}, protocol=protocol)


HOSTILE: list[Any] = [
    *(pytest.param(by_reduce(protocol), SYSTEM, id=f"os.system-protocol-{protocol}") for protocol in range(6)),
    pytest.param(lambda p: b"cos\nsystem\n" + text(touch(p)) + b"\x85R.", "os.system", id="GLOBAL-os.system"),
    pytest.param(lambda p: b"cposix\nsystem\n" + text(touch(p)) + b"\x85R.", "posix.system", id="GLOBAL-posix.system"),
    pytest.param(
        lambda p: pickle.dumps(Reduced(eval, (f"open('{p}', 'w')and None",)), protocol=4), "builtins.eval", id="eval"
    ),
    pytest.param(
        lambda p: pickle.dumps(Reduced(exec, (f"open('{p}', 'w')",)), protocol=2), "__builtin__.exec", id="py2-exec"
    ),
    pytest.param(
        lambda p: b"csubprocess\ngetoutput\n" + text(touch(p)) + b"\x85R.",
        "subprocess.getoutput",
        id="subprocess",
    ),
    pytest.param(
        lambda p: pickle.dumps(OrderedDict(a=[(1, {"b": Reduced(os.system, (touch(p),))})]), protocol=2),
        SYSTEM,
        id="inside-an-ordered-dict",
    ),
    pytest.param(
        lambda p: pickle.dumps(argparse.Namespace(a=Reduced(os.system, (touch(p),))), protocol=2),
        SYSTEM,
        id="inside-a-namespace",
    ),
    pytest.param(
        lambda p: b"ctorch\nSize\ncos\nsystem\n" + text(touch(p)) + b"\x85R\x85\x85R.",
        "os.system",
        id="inside-the-arguments-of-an-allowed-call", marks=pytest.mark.torch,
    ),
    pytest.param(
        lambda p: b"}cos\nsystem\n" + text(touch(p)) + b"\x85RNs.", "os.system", id="as-a-key"
    ),
    pytest.param(
        lambda p: b"cos\nsystem\n" + text(touch(p)) + b"\x85R0N.", "os.system", id="called-and-dropped"
    ),
    pytest.param(
        lambda p: b"c__builtin__\ngetattr\nc__builtin__\n__import__\n" + text("os") + b"\x85R" + text("system")
        + b"\x86R" + text(touch(p)) + b"\x85R.",
        "__builtin__.__import__",
        id="getattr-chain",
    ),
    pytest.param(
        lambda p: b"\x80\x04" + text("argparse") + text("_os.system") + b"\x93" + text(touch(p)) + b"\x85R.",
        "argparse._os.system",
        id="STACK_GLOBAL-through-an-attribute",
    ),
    pytest.param(
        lambda p: b"cargparse\nNamespace\n)\x81}" + text("__setstate__") + b"cos\nsystem\nsb" + text(touch(p)) + b"b.",
        "os.system",
        id="BUILD-of-__setstate__",
    ),
    pytest.param(lambda p: b"(V" + touch(p).encode() + b"\nios\nsystem\n.", "os.system", id="INST"),
    pytest.param(lambda p: b"(cos\nsystem\nV" + touch(p).encode() + b"\no.", "os.system", id="OBJ"),
    pytest.param(
        lambda p: b"cfunctools\npartial\ncos\nsystem\n" + text(touch(p)) + b"\x86R)R.", "functools.partial", id="partial"
    ),
    pytest.param(
        lambda p: b"cshutil\ncopyfile\n" + text(__file__) + text(str(p)) + b"\x86R.", "shutil.copyfile", id="shutil"
    ),
    pytest.param(
        lambda p: b"c_io\nopen\n" + text(str(p)) + text("w") + b"\x86R.", "_io.open", id="open"
    ),
    pytest.param(
        lambda p: b"\x80\x04" + text("pathlib") + text("Path.touch") + b"\x93cpathlib\nPath\n" + text(str(p)) + b"\x85R\x85R.",
        "pathlib.Path.touch",
        id="method-of-an-allowed-class",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "named"), HOSTILE)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_a_pickle_calls_is_run(make: Callable[[Path], bytes], named: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    data = make(sentinel)
    with quick(), pytest.raises(UnsafePickleError) as caught:
        read_pickle(data, where="args_tp00_pp000.pt")
    assert named in caught.value.what
    assert caught.value.where == "args_tp00_pp000.pt"
    assert not sentinel.exists()
    # The same bytes do run where a pickle is trusted: the case is a real one.
    pickle.loads(data)
    assert sentinel.exists()


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"], ids=["EXT1", "EXT2", "EXT4"])
def test_a_name_by_its_registered_number_is_refused(code: bytes) -> None:
    with pytest.raises(UnsafePickleError, match="copyreg"):
        read_pickle(b"\x80\x02" + code + b".", where="test")


def test_a_second_state_is_refused_even_where_all_names_are_good() -> None:
    data = b"cargparse\nNamespace\n)\x81}" + text("__setstate__") + b"c_codecs\nencode\nsb" + text("x") + b"b."
    with pytest.raises(FormatError, match="twice"):
        read_pickle(data, where="test")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"ccollections\nOrderedDict\n)R)R.", id="a-call"),
        pytest.param(text("os.system") + b")R.", id="text"),
        pytest.param(b"N)\x81.", id="none"),
        pytest.param(b"ctorch\nSize\n]R.", id="arguments-in-a-list"),
        pytest.param(b"ctorch\nSize\nNR.", id="no-arguments"),
    ],
)
def test_only_a_name_can_be_called(data: bytes) -> None:
    with pytest.raises(FormatError, match="calls something"):
        read_pickle(data, where="test")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"ctorch\nSize\n}b.", id="a-class"),
        pytest.param(b"}}b.", id="a-dict"),
        pytest.param(b"N}b.", id="none"),
    ],
)
def test_only_an_object_is_given_state(data: bytes) -> None:
    with pytest.raises(FormatError, match="gives state"):
        read_pickle(data, where="test")


# ---------------------------------------------------------------------------------------------------------------- bombs


def tuple_bomb() -> bytes:
    """A key whose hash visits 2**100 tuples: each holds the one before twice."""
    return b"})" + b"".join(b"2\x86" for _ in range(100)) + b"Ns."


def colliding_keys() -> bytes:
    """Integers of one hash: a dict of n of them takes n * n steps."""
    keys = (pickle.encode_long((2**61 - 1) * n) for n in range(1, 60_000))
    return b"}(" + b"".join(b"\x8a" + bytes((len(key),)) + key + b"N" for key in keys) + b"u."


def laughs(levels: int) -> bytes:
    return b"]" + b"".join(b"q%c0](" % n + b"h%c" % n * 10 + b"e" for n in range(levels)) + b"."


BOMBS: list[Any] = [
    pytest.param(b"Nr\xff\xff\xff\xff0N", "ends too early", id="memo-index-and-no-end"),
    pytest.param(b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "frame", id="FRAME-of-16-exabytes"),
    pytest.param(b"\x8d" + struct.pack("<Q", 2**62) + b"abc.", "declares", id="BINUNICODE8-of-4-exabytes"),
    pytest.param(b"X\xff\xff\xff\xffabc.", "declares", id="BINUNICODE-of-4-gigabytes"),
    pytest.param(b"B\xff\xff\xff\xffabc.", "declares", id="BINBYTES-of-4-gigabytes"),
    pytest.param(b"\x8e" + struct.pack("<Q", 2**63) + b"abc.", "declares", id="BINBYTES8-of-8-exabytes"),
    pytest.param(b"\x96" + struct.pack("<Q", 2**40) + b"abc.", "declares", id="BYTEARRAY8-of-a-terabyte"),
    pytest.param(b"\x8b" + struct.pack("<I", 10**8) + b"\x01" * 10**8 + b".", "integer of", id="LONG4-of-100-MB"),
    pytest.param(b"\x8b\xff\xff\xff\xff.", "integer of", id="LONG4-of-negative-length"),
    pytest.param(b"I" + b"9" * 10**6 + b"\n.", "does not end", id="INT-of-a-million-digits"),
    pytest.param(b"L" + b"9" * 5000 + b"L\n.", "does not end", id="LONG-of-5000-digits"),
    pytest.param(b"c" + b"a" * 10**6 + b"\nb\n.", "does not end", id="GLOBAL-of-a-megabyte"),
    pytest.param(tuple_bomb(), "key", id="hash-of-a-tower-of-tuples"),
    pytest.param(colliding_keys(), "key", id="integers-of-one-hash"),
    pytest.param(b"]" * 100_000 + b"a" * 99_999 + b".", "deep", id="lists-100000-deep"),
    pytest.param(b")" + b"\x85" * 100_000 + b".", "deep", id="tuples-100000-deep"),
    pytest.param(b"}N" * 100_000 + b".", "one value", id="many-values-and-no-container"),
    pytest.param(b"N" + b"Q" * 100_000 + b".", "not to a storage", id="storages-100000-deep"),
    pytest.param(b"(" * 2_000_000, "open at once", id="two-million-marks"),
    pytest.param(b"(" * 100_000 + b"t" * 100_000 + b".", "open at once", id="marks-100000-deep"),
    pytest.param(b"ctorch\nSize\nq\x000" + b"h\x00)R" * 200_000 + b".", "one value", id="calls-that-are-never-used"),
    pytest.param(b"]q\x00h\x00a.", "contains itself", id="list-in-itself"),
    pytest.param(b"}q\x00K\x01h\x00s.", "contains itself", id="dict-in-itself"),
    pytest.param(b"]q\x00h\x00\x85a.", "contains itself", id="list-in-its-tuple"),
    pytest.param(text("a") * 500_000 + b".", "one value", id="half-a-million-strings"),
    pytest.param(b"](" + b"N" * 500_000 + b"eq\x00h\x00a.", "contains itself", id="long-list-in-itself"),
    pytest.param(b"cmegatron.x\nFoo\n)\x81q\x00h\x00b.", "contains itself", id="object-that-is-its-own-state"),
    pytest.param(b"\x8fq\x00(h\x00\x90.", "contains itself", id="set-in-itself"),
    pytest.param(b"N" * 1000 + b"0" * 10_000_000, "stack", id="pops-without-end"),
    pytest.param(b"N0" * 6_000_000, "opcodes", id="twelve-million-opcodes"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "word"), BOMBS)
def test_bombs_are_refused_in_no_time(data: bytes, word: str) -> None:
    with quick(), pytest.raises(FormatError, match=word):
        read_pickle(data, where="test")


def test_the_largest_memo_index_costs_nothing() -> None:
    with quick():
        assert read_pickle(b"Nr\xff\xff\xff\xff0j\xff\xff\xff\xff.", where="test") is None


def test_a_billion_laughs_are_read_and_written_small() -> None:
    data = laughs(100)
    with quick():
        assert len(write_pickle(read_pickle(data, where="test"))) < 2 * len(data)


def test_a_pickle_of_more_than_256_mebibytes_is_refused() -> None:
    with quick(), pytest.raises(FormatError, match="268435457"):
        read_pickle(bytes(2**28 + 1), where="test")


# -------------------------------------------------------------------------------------------------------------- damage

DAMAGED: list[Any] = [
    pytest.param(b"", "ends too early", id="nothing"),
    pytest.param(b"\x80", "ends too early", id="half-a-header"),
    pytest.param(b"\x80\x06N.", "protocol", id="protocol-6"),
    pytest.param(b".", "one value", id="no-value"),
    pytest.param(b"NN.", "one value", id="two-values"),
    pytest.param(b"N(.", "one value", id="open-mark"),
    pytest.param(b"(N.", "one value", id="value-after-an-open-mark"),
    pytest.param(b"N", "ends too early", id="no-STOP"),
    pytest.param(b"N..", "followed by 1", id="a-second-STOP"),
    pytest.param(b"N.N.", "followed by 2", id="a-second-pickle"),
    pytest.param(b"G\x00\x00.", "declares 8 bytes", id="half-a-float"),
    pytest.param(b"J\x00.", "declares 4 bytes", id="half-an-integer"),
    pytest.param(b"M\x00", "ends too early", id="half-a-short"),
    pytest.param(b"h\x00.", "recalls value 0", id="unknown-memo"),
    pytest.param(b"gxyz\n.", "number", id="memo-index-is-text"),
    pytest.param(b"Npyes\n.", "number", id="memo-index-to-keep-is-text"),
    pytest.param(b"I1_000\n.", "number", id="integer-with-underscore"),
    pytest.param(b"Fabc\n.", "number", id="float-is-text"),
    pytest.param(b"q\x00N.", "stack", id="memo-of-nothing"),
    pytest.param(b"0N.", "stack", id="pop-of-nothing"),
    pytest.param(b"1N.", "stack", id="pop-of-no-mark"),
    pytest.param(b"tN.", "stack", id="tuple-without-mark"),
    pytest.param(b"N\x86.", "stack", id="tuple-of-too-few"),
    pytest.param(b"K\x01(\x85.", "stack", id="tuple-across-a-mark"),
    pytest.param(b"(K\x01a.", "stack", id="append-across-a-mark"),
    pytest.param(b"NK\x01a.", "not a list", id="append-to-none"),
    pytest.param(b"}K\x01a.", "not a list", id="append-to-a-dict"),
    pytest.param(b"](K\x01u.", "without a value", id="odd-items"),
    pytest.param(b"(K\x01d.", "without a value", id="odd-dict"),
    pytest.param(b"]K\x01K\x02s.", "not a dict", id="item-of-a-list"),
    pytest.param(b"}]Ns.", "key", id="list-as-key"),
    pytest.param(b"}}Ns.", "key", id="dict-as-key"),
    pytest.param(b"](N\x90.", "not a set", id="items-for-a-list"),
    pytest.param(b"X\x01\x00\x00\x00\xff.", "not text", id="not-utf-8"),
    pytest.param(b"c\xff\nx\n.", "not text", id="name-is-not-utf-8"),
    pytest.param(b"K\x01K\x02\x93.", "not text", id="name-by-numbers"),
    pytest.param(b"V\\uzzzz\n.", "not text", id="bad-escape"),
    pytest.param(text("0") + b"Q.", "not to a storage", id="storage-by-its-key-alone"),
    pytest.param(
        b"(" + text("storage") + b"ctorch\nfloat32\n" + text("0") + text("cpu") + b"K\x06tQ.", "not to a storage", id="storage-of-a-dtype"
    ),
    pytest.param(
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"J\xff\xff\xff\xfftQ.",
        "not to a storage",
        id="storage-of-minus-one",
    ),
    pytest.param(b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "tensor", id="tensor-of-nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "word"), DAMAGED)
def test_damage_is_named(data: bytes, word: str) -> None:
    with pytest.raises(FormatError, match=word) as caught:
        read_pickle(data, where="args_tp00_pp000.pt")
    assert caught.value.where == "args_tp00_pp000.pt"
    assert caught.value.hint


# -------------------------------------------------------------------------------------------------------------- mutation


@cache
def golden_pickles() -> tuple[bytes, ...]:
    """A small optimizer file, and the arguments of a run."""
    folder = golden_root() / "megatron06" / "j_tp1pp2dp2"
    files = [next((folder / "A").rglob("distrib_optim.pt")), folder / "pt_meta_params" / "args_tp00_pp000.pt"]
    found = []
    for path in files:
        with zipfile.ZipFile(path) as archive:
            found.append(archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl"))))
    return tuple(found)


def survives(data: bytes) -> None:
    """Refused as an error a user can read, or read and written: nothing else may happen."""
    try:
        tree = read_pickle(data, where="test")
    except Ckpt2ptError:
        return
    once = write_pickle(tree)
    assert write_pickle(read_pickle(once, where="test")) == once


@settings(max_examples=600, deadline=None)
@given(
    st.integers(0, 1),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2), st.binary(max_size=3)), min_size=1, max_size=4),
)
def test_a_mutated_pickle_is_refused_or_read(which: int, edits: list[tuple[float, int, bytes]]) -> None:
    data = golden_pickles()[which]
    for position, length, replacement in edits:
        start = int(position * len(data))
        data = data[:start] + replacement + data[start + length :]
    survives(data)


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 1))
def test_a_truncated_pickle_is_refused(part: float) -> None:
    data = golden_pickles()[0]
    with pytest.raises(FormatError):
        read_pickle(data[: int(part * (len(data) - 1))], where="test")


pieces = st.sampled_from(
    [bytes((code,)) for code in b"NK)]}(012tlduaesbRcQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]
    + [b"K\x01", b"q\x00", b"h\x00", b"q\x01", b"h\x01", text("a"), text("storage"), b"C\x01x", b"\x8a\x01\x05"]
    + [b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n", b"ctorch\nFloatStorage\n", b"cmegatron.x\nFoo\n"]
    + [b"]", b"}", b")", b"K\x02"]
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(pieces, max_size=40))
def test_any_sequence_of_opcodes_is_refused_or_read(sequence: list[bytes]) -> None:
    survives(b"".join(sequence) + b".")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    survives(data)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"}" * 31_000_000, id="31-million-dictionaries"),
        pytest.param(b"]q\x00" * 3_000_000, id="lists-that-are-remembered"),
        pytest.param(b"\x8f" * 5_000_000, id="five-million-sets"),
        pytest.param(b"N" + b"\x85" * 5_000_000 + b".", id="five-million-tuples-in-each-other"),
        pytest.param(b"](" + b"}" * 3_000_000 + b"e.", id="a-list-of-dictionaries"),
    ],
)
def test_a_pickle_costs_what_its_size_can_explain(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="more values than a file of its size"):
            read_pickle(data, where="test")
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data) + (64 << 20)
    finally:
        tracemalloc.stop()


def test_what_torch_writes_is_never_too_much() -> None:
    """Small tensors with attributes, whose pickles make the most values for their size."""

    def marked(number: int) -> torch.Tensor:
        tensor: Any = torch.zeros(1, 1)
        tensor.a, tensor.b = number, True
        return cast("torch.Tensor", tensor)

    stream = io.BytesIO()
    torch.save({number: {"x": marked(number)} for number in range(20_000)}, stream)
    with zipfile.ZipFile(stream) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    costs = sum(unpickle._COSTS[ord(opcode.code)] for opcode, _, _ in pickletools.genops(data))
    assert costs < unpickle._NBYTES_PER_BYTE * len(data)
