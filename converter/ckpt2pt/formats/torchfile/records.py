"""Records that a pickle holds by the hundred thousand: one pattern for each attribute in place of its opcodes.

    c torch.distributed.checkpoint.metadata ChunkStorageMetadata   ) NEWOBJ     by the machine, as anything else
    q. } q. (   h. "offsets" <Size>   h. "sizes" <Size>   u b                   here, with what the memo keeps of it

What looks otherwise is left to the machine, opcode by opcode.  Bytes as CPython's Pickler writes an object with a ``__dict__``
(Lib/pickle.py, ``save_reduce``), in protocol 2 and in 4; an attribute is None, an integer, a text or a ``torch.Size``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache

from ckpt2pt.formats.torchfile.trees import MISSING, Global, Record, Value

_PUT = rb"(\x94|q.|r.{4})"
_GET = rb"(?:h.|j.{4})"
_INT = rb"(?:K.|M..|J.{4}|\x8a(?:\x03.{3}|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_SIZE = rb"(%b)(?:\(?((?:%b){1,16})[\x85\x86\x87t]%b|(%b))\x85%bR%b" % (_GET, _INT, _PUT, _GET, _PUT, _PUT)
_HEAD = re.compile(rb"%b\}%b\(" % (_PUT, _PUT), re.DOTALL)
_ATTRIBUTE = re.compile(rb"(%b)(?:%b|(N|%b|%b)|(X.{4}|\x8c.))" % (_GET, _SIZE, _INT, _GET), re.DOTALL)
_KEPT = re.compile(_PUT, re.DOTALL)
_INTEGERS = re.compile(_INT, re.DOTALL)
_PLAIN = frozenset({int, str, type(None)})


def read_record(
    data: bytes, pos: int, memo: list[Value], kind: Global, names: Collection[str]
) -> tuple[Record, int] | None:
    """An object of class ``kind`` whose state begins at ``pos``, with the attributes ``names``, None where it has no such; and where it ends.

    The memo keeps what the machine would keep of it, but for dictionaries and arguments, which nothing recalls.  None, and the
    memo as it was, where the bytes are others or there are other attributes.
    """
    before = len(memo)
    head = _HEAD.match(data, pos)
    if head and _keep(memo, head[1], MISSING) and _keep(memo, head[2], MISSING):
        pos, values = head.end(), dict[str, Value]()
        while attribute := _read_attribute(data, pos, memo):
            name, value, pos = attribute
            if not isinstance(name, str) or name not in names:
                break
            values[name] = value
            if data[pos : pos + 2] == b"ub":
                memo[before] = made = Record((kind, *map(values.get, names)))
                return made, pos + 2
    del memo[before:]
    return None


def _read_attribute(data: bytes, pos: int, memo: list[Value]) -> tuple[Value, Value, int] | None:
    """Its name, which was read before, its value, and where it ends."""
    match = _ATTRIBUTE.match(data, pos)
    if match is None:
        return None
    name, size, lengths, put, shape, args, made, plain, text = match.groups()
    value: Value
    if plain:
        value = None if plain == b"N" else _recall(memo, plain) if plain[0] in b"hj" else _integer(plain)
        if type(value) not in _PLAIN and not _is_shape(value):
            return None
        return _recall(memo, name), value, match.end()
    if text:
        start = match.end()
        stop = start + int.from_bytes(text[1:], "little")
        kept = _KEPT.match(data, stop)
        value = data[start:stop].decode("utf-8", "surrogatepass")
        return (_recall(memo, name), value, kept.end()) if kept and _keep(memo, kept[1], value) else None
    called, value = _recall(memo, size), _recall(memo, shape) if shape else _shape(lengths)
    if not isinstance(called, Global) or (called.module, called.name) != ("torch", "Size") or not _is_shape(value):
        return None
    if (put and not _keep(memo, put, value)) or not (_keep(memo, args, MISSING) and _keep(memo, made, value)):
        return None
    return _recall(memo, name), value, match.end()


def _keep(memo: list[Value], put: bytes, value: Value) -> bool:
    """Picklers count on: any other number is for the machine."""
    if put != b"\x94" and int.from_bytes(put[1:], "little") != len(memo):
        return False
    memo.append(value)
    return True


def _recall(memo: list[Value], get: bytes) -> Value:
    index = int.from_bytes(get[1:], "little")
    return memo[index] if index < len(memo) else MISSING


def _is_shape(value: Value) -> bool:
    return type(value) is tuple and all(type(number) is int for number in value)


def _integer(code: bytes) -> int:
    """BININT1 and BININT2 have no sign, BININT and LONG1 have one."""
    start = 2 if code[0] == 0x8A else 1
    return int.from_bytes(code[start:], "little", signed=code[0] in b"J\x8a")


@lru_cache(1 << 16)
def _shape(lengths: bytes) -> tuple[int, ...]:
    """Most chunks are of few shapes, and the roles of a tensor have the same origins: they share them."""
    return tuple(map(_integer, _INTEGERS.findall(lengths)))
