"""The pickle machine with inert values on its stack: opcodes of protocols 0 to 5 in, a tree out, nothing executed.

``pickle.Unpickler`` is not used: it would import and call, and its memo grows to whatever index a file asks for.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NoReturn

from ckpt2pt.formats.torchfile.records import read_record
from ckpt2pt.formats.torchfile.trees import GETATTRS, MISSING, Call, Global, Persistent, Value
from ckpt2pt.formats.torchfile.vetting import check_member, check_name, check_tree, damaged, is_key, refuse_mention

_MAX_NBYTES = 256 << 20
MAX_OPCODES = 10_000_000
"""Enough for the pickle in a ``.pt`` file: it takes seconds."""
# Memory that a pickle may ask for. Torch's own needs up to 16 bytes for each of its bytes, an endless row of empty
# dictionaries 90.
_FREE_NBYTES = 48 << 20
_NBYTES_PER_BYTE = 20
_MAX_LONG_NBYTES = 1024
_MAX_LINE_NBYTES = 1024
_MAX_MARKS = 1000
_MAX_PROTOCOL = 5
_STOP = ord(".")
# As protocol 2 spells them, so that a set looks the same whatever protocol it came in, and keeps its order.
_SET = Global("__builtin__", "set")
_FROZENSET = Global("__builtin__", "frozenset")
_BYTEARRAY = Global("__builtin__", "bytearray")
_NEWOBJ_EX = Global("copyreg", "__newobj_ex__")


Shorten = Mapping[Global, Callable[[Value], Value]]
"""What to hold in place of an object that a call of this name makes, from its arguments; or of the state that it is given."""
Records = Mapping[Global, tuple[str, ...]]
"""Classes of very many objects, and their attributes: each becomes a :class:`Record` of these, None where it has no such."""


class Reader:
    """The pickle machine, with inert values on its stack."""

    __slots__ = (
        "allow",
        "data",
        "far",
        "known",
        "marks",
        "memo",
        "opcodes",
        "pending",
        "pos",
        "records",
        "shorten",
        "stack",
        "where",
    )

    def __init__(
        self,
        data: bytes,
        where: str,
        allow: frozenset[str],
        opcodes: int = MAX_OPCODES,
        shorten: Shorten = MappingProxyType({}),
        records: Records = MappingProxyType({}),
    ) -> None:
        self.data, self.where, self.allow, self.opcodes, self.shorten = data, where, allow, opcodes, shorten
        self.records = records
        self.pos = 0
        self.stack: list[Value] = []
        self.marks: list[list[Value]] = []
        # Picklers count from 0 on. A list of all indexes would have to be as long as the largest, which a file can put at 2**32.
        self.memo: list[Value] = []
        self.far: dict[int, Value] = {}
        self.known: dict[tuple[str, str], Global] = {}
        # A getattr that has not been called yet.
        self.pending: Global | None = None

    def read(self) -> Value:
        """Run to STOP."""
        data, do, costs = self.data, _OPCODES, _COSTS
        if len(data) > _MAX_NBYTES:
            self.fail(f"holds {len(data)} bytes, more than {_MAX_NBYTES}")
        try:
            left = _FREE_NBYTES + _NBYTES_PER_BYTE * len(data)
            for _ in range(self.opcodes):
                code = data[self.pos]
                self.pos += 1
                if code == _STOP:
                    break
                left -= costs[code]
                if left < 0:
                    self.fail("makes more values than a file of its size can need")
                do[code](self)
            else:
                self.fail(f"has more than {self.opcodes} opcodes")
        except IndexError:
            self.fail("ends too early" if self.pos >= len(data) else "takes more from its stack than is there")
        except UnicodeError:
            self.fail("holds text that is not text")
        return self.stop()

    def stop(self) -> Value:
        if self.marks or len(self.stack) != 1:
            self.fail("does not end with one value")
        if self.pos != len(self.data):
            self.fail(f"is followed by {len(self.data) - self.pos} more bytes")
        if self.pending is not None:
            refuse_mention(self.pending, self.where)
        self.memo.clear()  # the check needs as much
        check_tree(self.stack[0], self.where)
        return self.stack[0]

    def fail(self, what: str) -> NoReturn:
        raise damaged(f"the pickle {what} (byte {self.pos})", self.where)

    def refuse(self) -> None:
        self.fail(f"uses opcode 0x{self.data[self.pos - 1]:02x}, which torch.save never writes")

    # Taking bytes.

    def take(self, nbytes: int) -> bytes:
        start = self.pos
        if not 0 <= nbytes <= len(self.data) - start:
            self.fail(f"declares {nbytes} bytes where {len(self.data) - start} are left")
        self.pos = start + nbytes
        return self.data[start : self.pos]

    def uint(self, nbytes: int) -> int:
        start = self.pos
        self.pos = stop = start + nbytes
        if stop > len(self.data):
            self.fail("ends too early")
        return int.from_bytes(self.data[start:stop], "little")

    def line(self, limit: int = _MAX_LINE_NBYTES) -> bytes:
        end = self.data.find(b"\n", self.pos, self.pos + limit)
        if end < 0:
            self.fail("holds a line that does not end")
        start, self.pos = self.pos, end + 1
        return self.data[start:end]

    # Names.

    def name(self, module: str, name: str) -> None:
        found = self.known.get((module, name))
        if found is None:
            check_name(module, name, self.allow, self.where)
            found = self.known[module, name] = Global(module, name)
        if found in GETATTRS:
            self.pending = found
        self.stack.append(found)

    def op_global(self) -> None:
        self.name(self.line().decode(), self.line().decode())

    def op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            self.fail("names something by a value that is not text")
        self.name(module, name)

    def op_inst(self) -> None:
        self.op_global()
        self.fail("makes an object by opcode INST, which torch.save never writes")

    def op_extension(self) -> None:
        check_name("copyreg", "_extension_registry", frozenset(), self.where)

    # Calls.

    def call(self, func: Value, args: Value, *, new: bool) -> None:
        if not isinstance(func, Global) or not isinstance(args, tuple):
            self.fail("calls something that is not a name, or with arguments that are not a tuple")
        if func.name == "getattr" and func in GETATTRS:
            check_member(func, args, self.allow, self.where)
            self.pending = None
        self.stack.append(Call(func, args, new))

    def op_reduce(self) -> None:
        args, func = self.stack.pop(), self.stack.pop()
        shorten = self.shorten.get(func) if isinstance(func, Global) else None
        if shorten:
            self.stack.append(shorten(args))
        else:
            self.call(func, args, new=False)

    def op_newobj(self) -> None:
        args, kind = self.stack.pop(), self.stack.pop()
        names = self.records.get(kind) if isinstance(kind, Global) and args == () and not self.far else None
        # It takes no more memory for each of its bytes than any pickle may (_NBYTES_PER_BYTE).
        found = read_record(self.data, self.pos, self.memo, kind, names) if names and isinstance(kind, Global) else None
        if found:
            made, self.pos = found
            self.stack.append(made)
        else:
            self.call(kind, args, new=True)

    def op_newobj_ex(self) -> None:
        keywords, args, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        # Protocol 2 has no such opcode; copyreg's function of the same meaning is called instead.
        self.stack.append(Call(_NEWOBJ_EX, (kind, args, keywords)))

    def op_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        # The second state could be handed to a __setstate__ that the first one brought.
        if not isinstance(made, Call) or made.state is not MISSING:
            self.fail("gives state to something that takes none, or twice")
        shorten = self.shorten.get(made.func)
        made.state = shorten(state) if shorten else state

    def op_persistent(self) -> None:
        self.stack.append(Persistent(self.stack.pop()))

    # Containers.

    def op_mark(self) -> None:
        if len(self.marks) >= _MAX_MARKS:
            self.fail(f"has {_MAX_MARKS} containers open at once")
        self.marks.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Value]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def op_pop_mark(self) -> None:
        self.since_mark()

    def op_pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.op_pop_mark()

    def append(self, values: Sequence[Value]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Call):
            if not isinstance(target.items, list):
                target.items = []
            target.items.extend(values)
        else:
            self.fail("appends to something that is not a list")

    def op_add_items(self) -> None:
        values, target = self.since_mark(), self.stack[-1]
        held = target.args[0] if isinstance(target, Call) and target.func == _SET and target.args else None
        if not isinstance(held, list):
            self.fail("adds to something that is not a set")
        held.extend(values)

    def set_items(self, values: list[Value]) -> None:
        target = self.stack[-1]
        if len(values) % 2:
            self.fail("sets a key without a value")
        keys, items = values[::2], values[1::2]
        if isinstance(target, Call):
            if not isinstance(target.pairs, list):
                target.pairs = []
            target.pairs.extend(zip(keys, items, strict=True))
        elif isinstance(target, dict):
            for key, item in zip(keys, items, strict=True):
                if type(key) is not str and not is_key(key):
                    self.fail("has a dict key that is neither a plain value nor a small tuple of such")
                target[key] = item
        else:
            self.fail("sets an item of something that is not a dict")

    def op_set_item(self) -> None:
        value = self.stack.pop()
        self.set_items([self.stack.pop(), value])

    def op_dict(self) -> None:
        values = self.since_mark()
        self.stack.append({})
        self.set_items(values)

    def put(self, index: int) -> None:
        value, memo = self.stack[-1], self.memo
        if index == len(memo):
            memo.append(value)
            self.far.pop(index, None)
        elif 0 <= index < len(memo):
            memo[index] = value
        else:
            self.far[index] = value

    def get(self, index: int) -> None:
        value = self.memo[index] if 0 <= index < len(self.memo) else self.far.get(index, MISSING)
        if value is MISSING:
            self.fail(f"recalls value {index}, which it never kept")
        self.stack.append(value)

    def op_memoize(self) -> None:
        if self.far:
            self.put(len(self.memo) + len(self.far))
        else:
            self.memo.append(self.stack[-1])

    def op_protocol(self) -> None:
        if self.uint(1) > _MAX_PROTOCOL:
            self.fail(f"is of a protocol later than {_MAX_PROTOCOL}")

    def op_frame(self) -> None:
        nbytes = self.uint(8)
        if nbytes > len(self.data) - self.pos:
            self.fail(f"declares a frame of {nbytes} bytes where {len(self.data) - self.pos} are left")

    def decimal(self) -> int:
        text = self.line()
        if not re.fullmatch(rb"-?[0-9]+L?", text):
            self.fail("holds a number that is none")
        return int(text.removesuffix(b"L"))

    def op_int(self) -> None:
        flag = self.data[self.pos : self.pos + 3]
        number = self.decimal()
        self.stack.append(number == 1 if flag in (b"00\n", b"01\n") else number)

    def op_float(self) -> None:
        try:
            self.stack.append(float(self.line()))
        except ValueError:
            self.fail("holds a number that is none")

    def long(self, nbytes: int) -> None:
        if nbytes > _MAX_LONG_NBYTES:
            self.fail(f"holds an integer of {nbytes} bytes")
        self.stack.append(int.from_bytes(self.take(nbytes), "little", signed=True))

    def text(self, nbytes: int) -> None:
        self.stack.append(self.take(nbytes).decode("utf-8", "surrogatepass"))

    # The opcodes a torch archive is full of, so without a lambda between.

    def op_binput(self) -> None:
        self.put(self.uint(1))

    def op_long_binput(self) -> None:
        self.put(self.uint(4))

    def op_binget(self) -> None:
        index = self.data[self.pos]
        self.pos += 1
        if index < len(self.memo):
            self.stack.append(self.memo[index])
        else:
            self.get(index)

    def op_long_binget(self) -> None:
        index = self.uint(4)
        if index < len(self.memo):
            self.stack.append(self.memo[index])
        else:
            self.get(index)

    def op_binint1(self) -> None:
        self.stack.append(self.data[self.pos])
        self.pos += 1

    def op_binint2(self) -> None:
        self.stack.append(self.uint(2))

    def op_tuple1(self) -> None:
        self.stack[-1] = (self.stack[-1],)

    def op_tuple2(self) -> None:
        last = self.stack.pop()
        self.stack[-1] = (self.stack[-1], last)

    def op_tuple3(self) -> None:
        last, middle = self.stack.pop(), self.stack.pop()
        self.stack[-1] = (self.stack[-1], middle, last)

    def op_empty_tuple(self) -> None:
        self.stack.append(())

    def op_empty_dict(self) -> None:
        self.stack.append({})

    def op_binunicode(self) -> None:
        self.text(self.uint(4))


_Op = Callable[[Reader], None]


def _push(make: Callable[[Reader], Value]) -> _Op:
    def op(reader: Reader) -> None:
        value = make(reader)  # first: it may put another stack in place
        reader.stack.append(value)

    return op


# Left out on purpose: text persistent ids (P), Python 2 strings (S T U), OBJ (o), out-of-band buffers (0x97 0x98).
_OPS: Final[dict[bytes, _Op]] = {
    b"\x80": Reader.op_protocol, b"\x95": Reader.op_frame,
    b"N": _push(lambda r: None), b"\x88": _push(lambda r: True), b"\x89": _push(lambda r: False),
    b"I": Reader.op_int, b"L": _push(lambda r: r.decimal()), b"F": Reader.op_float,
    b"K": Reader.op_binint1, b"M": Reader.op_binint2, b"J": lambda r: r.long(4),
    b"\x8a": lambda r: r.long(r.uint(1)), b"\x8b": lambda r: r.long(r.uint(4)),
    b"G": _push(lambda r: struct.unpack(">d", r.take(8))[0]),
    b"V": _push(lambda r: str(r.line(_MAX_NBYTES), "raw-unicode-escape")),
    b"\x8c": lambda r: r.text(r.uint(1)), b"X": Reader.op_binunicode, b"\x8d": lambda r: r.text(r.uint(8)),
    b"C": _push(lambda r: r.take(r.uint(1))), b"B": _push(lambda r: r.take(r.uint(4))),
    b"\x8e": _push(lambda r: r.take(r.uint(8))),
    b"\x96": _push(lambda r: Call(_BYTEARRAY, (r.take(r.uint(8)),))),
    b")": Reader.op_empty_tuple, b"t": _push(lambda r: tuple(r.since_mark())),
    b"\x85": Reader.op_tuple1, b"\x86": Reader.op_tuple2, b"\x87": Reader.op_tuple3,
    b"]": _push(lambda r: []), b"l": _push(lambda r: r.since_mark()),
    b"a": lambda r: r.append((r.stack.pop(),)), b"e": lambda r: r.append(r.since_mark()),
    b"}": Reader.op_empty_dict, b"d": Reader.op_dict,
    b"s": Reader.op_set_item, b"u": lambda r: r.set_items(r.since_mark()),
    b"\x8f": _push(lambda r: Call(_SET, ([],))), b"\x90": Reader.op_add_items,
    b"\x91": _push(lambda r: Call(_FROZENSET, (r.since_mark(),))),
    b"(": Reader.op_mark, b"0": Reader.op_pop, b"1": Reader.op_pop_mark, b"2": _push(lambda r: r.stack[-1]),
    b"p": lambda r: r.put(r.decimal()), b"q": Reader.op_binput, b"r": Reader.op_long_binput,
    b"\x94": Reader.op_memoize,
    b"g": lambda r: r.get(r.decimal()), b"h": Reader.op_binget, b"j": Reader.op_long_binget,
    b"c": Reader.op_global, b"\x93": Reader.op_stack_global, b"i": Reader.op_inst,
    b"\x82": Reader.op_extension, b"\x83": Reader.op_extension, b"\x84": Reader.op_extension,
    # By way of the object: a dialect makes other values of these.
    b"R": lambda r: r.op_reduce(), b"\x81": lambda r: r.op_newobj(), b"\x92": Reader.op_newobj_ex,
    b"b": lambda r: r.op_build(), b"Q": lambda r: r.op_persistent(),
}  # fmt: skip
# Bytes that an opcode's value takes; containers are counted threefold, of which torch writes few.
_COSTS = [8] * 256
for _codes, _cost in (
    (b"MJ\x8a\x8bGFIL", 40), (b"VX\x8c\x8dCB\x8e", 64), (b"pqr\x94", 9), (b"s", 120),
    (b"t\x85\x86\x87Q", 64), (b"RuU\x81", 88), (b"]}ld", 250), (b"\x8f\x91\x92\x96", 600),
):  # fmt: skip
    for _code in _codes:
        _COSTS[_code] = _cost
_OPCODES = [_OPS.get(bytes((code,)), Reader.refuse) for code in range(256)]
