"""Records of a pickle: read by patterns as the machine would read them opcode by opcode, and left to it where they look otherwise."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType
from typing import Any, cast

import pytest

from ckpt2pt.errors import FormatError, UnsafePickleError
from ckpt2pt.formats.torchfile.pickles import Shorten, read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Record, Value

KIND = Global("megatron", "Place")
NAMES = ("key", "origin", "nbytes")


class Size(tuple[int, ...]):
    """As torch.Size pickles itself."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[Size], tuple[tuple[int, ...]]]:
        return Size, (tuple(self),)


class Place:
    """An object with attributes."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, module, name in ((Size, "torch", "Size"), (Place, KIND.module, KIND.name)):
        fake = ModuleType(module)
        monkeypatch.setattr(fake, name, kind, raising=False)
        monkeypatch.setattr(kind, "__module__", module)
        monkeypatch.setitem(sys.modules, module, fake)


def places(count: int = 400) -> list[Place]:
    """More than a byte counts in the memo; keys, sizes and objects that are shared, and numbers of every length."""
    shared = Size((1, 2, 3, 4))
    found: list[Place] = []
    for number in range(count):
        origin = shared if number % 3 == 0 else None if number % 7 == 0 else Size(range(1 + number % 5))
        # A text of its own, as gathered from another rank, and one that is recalled.
        key = f"key {number}" if number % 2 else "recalled"
        found.append(Place(key=key, origin=origin, nbytes=[1, 300, 70_000, 1 << 31, 1 << 40, 1 << 55][number % 6]))
    return [*found, found[3], Place(nbytes=5, key="recalled"), Place(key="ä", nbytes=-5)]


def attributes(node: Value) -> list[Value]:
    if isinstance(node, Record):
        assert node[0] == KIND
        return list(node[1:])
    assert isinstance(node, Call)
    assert isinstance(node.state, dict)
    return [made(node.state.get(name)) for name in NAMES]


def made(value: Value) -> Value:
    return value.args[0] if isinstance(value, Call) else value


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_records_hold_is_what_the_machine_reads(protocol: int) -> None:
    data = pickle.dumps([places(), "recalled", "behind"], protocol)
    slow = cast("list[Any]", read_pickle(data, where="here"))
    # As those who ask for records do: else a size that the machine has read is a call, which no record recalls.
    shorten: Shorten = {Global("torch", "Size"): lambda args: cast("tuple[Value, ...]", args)[0]}
    fast = cast("list[Any]", read_pickle(data, where="here", shorten=shorten, records={KIND: NAMES}))
    assert slow[1:] == fast[1:] == ["recalled", "behind"]
    assert [*map(attributes, fast[0])] == [*map(attributes, slow[0])]
    # The first spells its attributes, and a frame of protocol 4 may begin inside another.
    assert sum(isinstance(one, Record) for one in fast[0]) > 395
    assert fast[0][400] is fast[0][3]


@pytest.mark.parametrize(
    "state",
    [
        {"key": "k", "other": 1, "nbytes": 1},
        {"key": "k", "origin": [1], "nbytes": 1},
        {"key": "k", "origin": {}, "nbytes": 1},
        {"key": "k", "origin": 1.5, "nbytes": 1},
        {"key": "k", "origin": Call(Global("torch", "device"), ((1,),)), "nbytes": 1},
        {"key": "k", "origin": ("a", 1), "nbytes": 1},
    ],
    ids=["another-attribute", "list", "dictionary", "float", "another-call", "tuple-of-texts"],
)
def test_an_object_of_another_form_is_left_to_the_machine(state: dict[Value, Value]) -> None:
    plain: dict[Value, Value] = {"key": "k", "origin": None, "nbytes": 7}
    objects: list[Value] = [Call(KIND, new=True, state=dict(one)) for one in (plain, state, plain)]
    data = write_pickle([*objects, state.get("origin"), "key"])
    found = cast("list[Any]", read_pickle(data, where="here", records={KIND: NAMES}))
    slow = cast("list[Any]", read_pickle(data, where="here"))
    assert isinstance(found[1], Call)
    assert repr(found[1]) == repr(slow[1])
    assert repr(found[3:]) == repr(slow[3:])
    assert attributes(found[2]) == ["k", None, 7]


def test_a_list_that_is_recalled_is_no_attribute() -> None:
    shared: list[Value] = [1]
    objects: list[Value] = [
        Call(KIND, new=True, state={"key": "k", "origin": origin, "nbytes": 1}) for origin in (None, shared)
    ]
    found = cast("list[Any]", read_pickle(write_pickle([shared, *objects]), where="here", records={KIND: NAMES}))
    assert isinstance(found[2], Call)


def test_equal_records_are_two_keys() -> None:
    rows: dict[Value, Value] = {
        Call(KIND, new=True, state={"key": "k", "origin": None, "nbytes": 7}): number for number in range(5)
    }
    found = cast("dict[Value, Value]", read_pickle(write_pickle(rows), where="here", records={KIND: NAMES}))
    assert len(found) == 5
    assert sum(isinstance(key, Record) for key in found) == 4


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_was_cut_or_changed_is_refused_or_read_as_the_machine_reads_it(protocol: int) -> None:
    data = pickle.dumps(places(4), protocol)
    for stop in range(len(data)):
        with pytest.raises(FormatError):
            read_pickle(data[:stop], where="here", records={KIND: NAMES})
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        try:
            slow = [*map(attributes, cast("list[Any]", read_pickle(changed, where="here")))]
        except (FormatError, UnsafePickleError, AssertionError, TypeError, AttributeError):
            continue
        fast = [*map(attributes, cast("list[Any]", read_pickle(changed, where="here", records={KIND: NAMES})))]
        assert fast == slow, at
