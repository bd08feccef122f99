"""Pickles without execution: bytes to a tree of inert values, and the tree back to bytes as torch.save writes them.

    data.pkl --unpickle--> stack of inert values --vetting--> tree (trees) --write_pickle--> data.pkl

Reading looks nothing up: a call becomes a :class:`Call`, a class a :class:`Global`, and a name that has no business
in a checkpoint is refused when it is mentioned, called or not.  Pure: bytes in, tree out, no files.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, cast

from ckpt2pt.formats.torchfile.trees import (
    ENCODE,
    MISSING,
    ORDERED_DICT,
    REBUILD_TENSOR,
    STORAGES,
    Call,
    Global,
    Persistent,
    StoredTensor,
    Value,
)
from ckpt2pt.formats.torchfile.unpickle import MAX_OPCODES, Reader, Records, Shorten
from ckpt2pt.formats.torchfile.vetting import check_tree

__all__ = ["Records", "Shorten", "read_pickle", "write_pickle"]

_BYTES = Global("__builtin__", "bytes")
_U32 = struct.Struct("<I").pack
_TUPLE_ENDS = (b")", b"\x85", b"\x86", b"\x87", b"t")
_BATCH = 1000  # CPython's Pickler fills lists and dicts in portions of this many


def read_pickle(
    data: bytes,
    *,
    where: str,
    allow: Collection[str] = (),
    opcodes: int = MAX_OPCODES,
    shorten: Shorten = MappingProxyType({}),
    records: Records = MappingProxyType({}),
) -> Value:
    """The tree a pickle describes; nothing it names is imported or called.

    It may ask for 48 MiB and for 20 bytes for each of its own, of which it may have 256 MiB, and may have ``opcodes``.
    ``shorten`` saves memory where a pickle holds very many objects of a few classes, and ``records`` time as well.

    ``allow`` holds further names, as ``module.name``; the standard library, numpy and torch cannot be among them.
    """
    return Reader(data, where, frozenset(allow), opcodes, shorten, records).read()


def write_pickle(value: Value, *, check: bool = True) -> bytes:
    """Pickle ``value`` in protocol 2 as torch.save does, to the byte; what is shared is written once.

    ``check=False`` takes the caller's word that no value contains itself: for a tree made of what was read and checked.
    """
    if check:
        check_tree(value, "the tree to be written")
    writer = _Writer()
    writer.save(value)
    return b"\x80\x02" + writer.out + b"."


@lru_cache(4096)
def _int(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return b"M" + value.to_bytes(2, "little")
    if -(2**31) <= value < 2**31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    # One bit more than the magnitude for the sign, none for -2**(8n - 1).
    nbytes = (value if value >= 0 else ~value).bit_length() // 8 + 1
    head = b"\x8a%c" % nbytes if nbytes < 256 else b"\x8b" + nbytes.to_bytes(4, "little")
    return head + value.to_bytes(nbytes, "little", signed=True)


class _Writer:
    """Follows CPython's C Pickler, whose choices torch.save inherits."""

    __slots__ = ("count", "made", "memo", "out")

    def __init__(self) -> None:
        self.out = bytearray()
        # Names by value, the rest by identity as in CPython. An id stays unique while its object lives: the tree keeps
        # its own nodes alive, ``made`` those that are not in the tree.
        self.memo: dict[object, int] = {}
        self.count = 0
        self.made: list[Call] = []

    def save(self, value: Value) -> None:
        kind = type(value)
        if kind in _PLAIN:
            _PLAIN[kind](self, value)
            return
        index = self.memo.get(value if kind is Global else id(value))
        if index is not None:
            self.out += b"j%b" % _U32(index) if index > 255 else b"h%c" % index
            return
        save = _SAVERS.get(kind)
        if save is None:
            raise TypeError(f"{kind.__name__} is no node of a tree")
        save(self, value)

    def keep(self, key: object) -> None:
        self.memo[key] = self.count
        self.pass_by()

    def pass_by(self) -> None:
        """The pickle remembers what was just made; nothing will ask for it again."""
        index = self.count
        self.out += b"r%b" % _U32(index) if index > 255 else b"q%c" % index
        self.count += 1

    def save_constant(self, value: bool | None) -> None:
        self.out += b"N" if value is None else b"\x88" if value else b"\x89"

    def save_int(self, value: int) -> None:
        self.out += _int(value)

    def save_float(self, value: float) -> None:
        self.out += b"G" + struct.pack(">d", value)

    def save_str(self, value: str) -> None:
        text = value.encode("utf-8", "surrogatepass")
        self.out += b"X%b%b" % (_U32(len(text)), text)
        self.keep(id(value))

    def save_bytes(self, value: bytes) -> None:
        # Protocol 2 knows no bytes, so they are made by a call.
        made = Call(ENCODE, (value.decode("latin1"), "latin1")) if value else Call(_BYTES)
        self.made.append(made)
        self.save_call(made)
        self.memo[id(value)] = self.memo.pop(id(made))

    def save_tuple(self, value: tuple[Value, ...]) -> None:
        if not value:
            self.out += b")"
            return
        self.out += b"(" if len(value) > 3 else b""
        if {*map(type, value)} == {int}:  # the state of a random generator is 600 of them
            self.out += b"".join(map(_int, cast("tuple[int, ...]", value)))
        else:
            for item in value:
                self.save(item)
        self.out += _TUPLE_ENDS[min(len(value), 4)]
        self.keep(id(value))

    def save_list(self, value: list[Value]) -> None:
        self.out += b"]"
        self.keep(id(value))
        self.fill([(item,) for item in value], b"a", b"e", known_length=True)

    def save_dict(self, value: dict[Value, Value]) -> None:
        self.out += b"}"
        self.keep(id(value))
        self.fill(list(value.items()), b"s", b"u", known_length=True)

    def save_global(self, value: Global) -> None:
        self.out += f"c{value.module}\n{value.name}\n".encode()
        self.keep(value)

    def save_persistent(self, value: Persistent) -> None:
        self.save(value.id)
        self.out += b"Q"

    def save_tensor(self, value: StoredTensor) -> None:
        """The call that rebuilds it: of its parts only names and key can be anywhere else in the tree."""
        self.save(REBUILD_TENSOR)
        self.out += b"(("
        for part in ("storage", STORAGES[value.dtype], value.key, value.location):
            self.save(part)
        self.save_int(value.storage_numel)
        self.out += b"t"
        self.pass_by()
        self.out += b"Q"
        self.save_int(value.offset)
        self.save_ints(value.shape)
        self.save_ints(value.stride)
        self.out += b"\x89"
        self.save(ORDERED_DICT)
        self.out += b")R"
        self.pass_by()
        self.out += b"t"
        self.pass_by()
        self.out += b"R"
        self.keep(id(value))

    def save_ints(self, value: tuple[int, ...]) -> None:
        """A tuple that is nowhere else."""
        self.out += b"(" if len(value) > 3 else b""
        for number in value:
            self.save_int(number)
        self.out += _TUPLE_ENDS[min(len(value), 4)]
        if value:
            self.pass_by()

    def save_call(self, value: Call) -> None:
        self.save(value.func)
        self.save(value.args)
        self.out += b"\x81" if value.new else b"R"
        self.keep(id(value))
        self.fill([(item,) for item in value.items], b"a", b"e", known_length=False)
        self.fill(value.pairs, b"s", b"u", known_length=False)
        if value.state is not MISSING:
            self.save(value.state)
            self.out += b"b"

    def fill(self, rows: Sequence[tuple[Value, ...]], one: bytes, many: bytes, *, known_length: bool) -> None:
        """Put ``rows`` into the container just made; a portion of one needs no mark unless it is the rest of a list."""
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            alone = len(batch) == 1 and not (known_length and start)
            self.out += b"" if alone else b"("
            items = [item for row in batch for item in row]
            if {*map(type, items)} == {int}:
                self.out += b"".join(map(_int, cast("list[int]", items)))
            else:
                for item in items:
                    self.save(item)
            self.out += one if alone else many


# By exact type: a subclass, such as numpy's float64, would lose what it is.  Plain values are written each time.
_PLAIN: Final[dict[type, Callable[[_Writer, Any], None]]] = {
    type(None): _Writer.save_constant,
    bool: _Writer.save_constant,
    int: _Writer.save_int,
    float: _Writer.save_float,
}
_SAVERS: Final[dict[type, Callable[[_Writer, Any], None]]] = {
    str: _Writer.save_str,
    bytes: _Writer.save_bytes,
    tuple: _Writer.save_tuple,
    list: _Writer.save_list,
    dict: _Writer.save_dict,
    Global: _Writer.save_global,
    Call: _Writer.save_call,
    Persistent: _Writer.save_persistent,
    StoredTensor: _Writer.save_tensor,
}
