"""The nodes of a tree: torch's own spelling of tensors, namespaces and ordered dicts."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import (
    MISSING,
    STORAGE_CLASSES,
    Call,
    Global,
    Persistent,
    StoredTensor,
    Value,
    as_storage,
    as_tensor,
    contiguous_stride,
    entries,
    is_namespace,
    namespace,
    namespace_attrs,
    ordered_dict,
    tensor,
    with_attrs,
)


def saved_pickle(value: object, tmp_path: Path) -> bytes:
    torch.save(value, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        return archive.read("x/data.pkl")


def read(value: object, tmp_path: Path) -> Value:
    return read_pickle(saved_pickle(value, tmp_path), where="test")


# -------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("dtype", STORAGE_CLASSES)
def test_a_tensor_is_written_as_torch_writes_it(dtype: str, tmp_path: Path) -> None:
    real = torch.zeros((2, 3), dtype=getattr(torch, dtype))
    assert write_pickle(tensor(dtype, "0", 6, 0, (2, 3))) == saved_pickle(real, tmp_path)


@pytest.mark.parametrize(
    ("shape", "offset", "stride"),
    [
        pytest.param((), 0, None, id="scalar"),
        pytest.param((0, 4), 0, None, id="empty"),
        pytest.param((3, 2), 4, (1, 3), id="transposed-view"),
        pytest.param((2, 2), 3, (4, 2), id="gaps"),
        pytest.param((1, 4), 2, None, id="part"),
    ],
)
def test_views_are_written_and_read_as_torch_has_them(
    shape: tuple[int, ...], offset: int, stride: tuple[int, ...] | None, tmp_path: Path
) -> None:
    strides = contiguous_stride(shape) if stride is None else stride
    real = torch.as_strided(torch.arange(12.0), shape, strides, offset)
    node = tensor("float32", "0", 12, offset, shape, stride)
    assert write_pickle(node) == saved_pickle(real, tmp_path)
    found = as_tensor(read(real, tmp_path))
    assert found == StoredTensor(
        dtype="float32", key="0", location="cpu", storage_numel=12, offset=offset, shape=shape, stride=strides
    )
    assert found.numel == real.numel()
    assert found.is_contiguous == real.is_contiguous()


def test_two_tensors_of_one_storage_have_one_key(tmp_path: Path) -> None:
    base = torch.arange(12)
    tree = read([base[:4], base[4:]], tmp_path)
    assert isinstance(tree, list)
    first, second = as_tensor(tree[0]), as_tensor(tree[1])
    assert first
    assert second
    assert (first.key, second.key, second.offset, second.dtype) == ("0", "0", 4, "int64")


def test_a_parameter_is_the_tensor_it_holds(tmp_path: Path) -> None:
    found = as_tensor(read(torch.nn.Parameter(torch.zeros(2, 3)), tmp_path))
    assert found
    assert (found.dtype, found.shape) == ("float32", (2, 3))


def test_a_bare_storage_counts_bytes(tmp_path: Path) -> None:
    node = read(torch.zeros(3).untyped_storage(), tmp_path)
    assert isinstance(node, Persistent)
    assert as_storage(node) == ("uint8", "0", "cpu", 12)


STORAGE = Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 6))
HOOKS = Call(Global("collections", "OrderedDict"))


@pytest.mark.parametrize(
    "args",
    [
        pytest.param((), id="nothing"),
        pytest.param((STORAGE, 0, (2, 3), (3, 1), False), id="no-hooks"),
        pytest.param((STORAGE, 1, (2, 3), (3, 1), False, HOOKS), id="past-its-storage"),
        pytest.param((STORAGE, 0, (2, 3), (4, 1), False, HOOKS), id="stride-past-its-storage"),
        pytest.param((STORAGE, 0, (2, 3), (3,), False, HOOKS), id="stride-too-short"),
        pytest.param((STORAGE, -1, (2, 3), (3, 1), False, HOOKS), id="negative-offset"),
        pytest.param((STORAGE, True, (2, 1), (1, 1), False, HOOKS), id="offset-is-a-bool"),
        pytest.param((STORAGE, 0, (-2, -3), (3, 1), False, HOOKS), id="negative-shape"),
        pytest.param((STORAGE, 0, (2**63,), (0,), False, HOOKS), id="shape-past-64-bits"),
        pytest.param((STORAGE, 0, [2, 3], (3, 1), False, HOOKS), id="shape-is-a-list"),
        pytest.param((STORAGE, 0, (2.0,), (1,), False, HOOKS), id="shape-is-a-float"),
        pytest.param((STORAGE, 0, (2, 3), (3, 1), 0, HOOKS), id="flag-is-a-number"),
        pytest.param((STORAGE, 0, (2, 3), (3, 1), False, {}), id="hooks-are-a-dict"),
        pytest.param(("0", 0, (2, 3), (3, 1), False, HOOKS), id="no-storage"),
        pytest.param((Persistent("0"), 0, (0,), (1,), False, HOOKS), id="storage-without-id"),
        pytest.param(
            (Persistent(("storage", "FloatStorage", "0", "cpu", 6)), 0, (1,), (1,), False, HOOKS), id="no-class"
        ),
        pytest.param((STORAGE, 0, (2, 3), (3, 1), False, HOOKS, {}, {}), id="too-many"),
    ],
)
def test_what_torch_could_not_build_is_no_tensor(args: tuple[Value, ...]) -> None:
    assert as_tensor(Call(Global("torch._utils", "_rebuild_tensor_v2"), args)) is None


def test_tensors_among_others_are_written_as_torch_writes_them(tmp_path: Path) -> None:
    shape = (2, 3)
    reals = [torch.zeros(shape), torch.ones(shape), torch.zeros((1, 2, 3, 4), dtype=torch.int64), torch.zeros(())]
    nodes: list[Value] = [
        tensor("float32", "0", 6, 0, shape),
        tensor("float32", "2", 6, 0, shape),  # neither its shape nor its stride is the first one's
        tensor("int64", "1", 24, 0, (1, 2, 3, 4)),
        tensor("float32", "3", 1, 0, ()),
    ]
    first: dict[str, torch.Tensor] = {"a": reals[0], "b": reals[2]}
    tree: Value = [nodes[0], {"a": nodes[0], "b": nodes[2]}, nodes[1], nodes[2], nodes[3]]
    assert write_pickle(tree) == saved_pickle([reals[0], first, reals[1], reals[2], reals[3]], tmp_path)


def test_a_tensor_to_be_written_is_a_tensor() -> None:
    node = tensor("float32", "0", 6, 0, (2, 3))
    assert as_tensor(node) is node


def test_other_values_are_no_tensors(tmp_path: Path) -> None:
    good = read(torch.zeros(2, 3), tmp_path)
    assert isinstance(good, Call)
    assert as_tensor(good)
    assert as_tensor(Call(good.func, good.args, new=True)) is None
    assert as_tensor(Call(good.func, good.args, state={})) is None
    assert as_tensor("tensor") is None
    assert as_tensor(HOOKS) is None


# ----------------------------------------------------------------------------------------------------------- namespaces


def test_a_namespace_is_written_as_pickle_writes_it() -> None:
    real = argparse.Namespace(a=1, b=["x"])
    assert write_pickle(namespace({"a": 1, "b": ["x"]})) == pickle.dumps(real, protocol=2)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [argparse.Namespace, SimpleNamespace])
def test_attributes_are_found_whatever_protocol_wrote_them(kind: type, protocol: int) -> None:
    node = read_pickle(pickle.dumps(kind(a=1, b=None), protocol=protocol), where="test")
    assert is_namespace(node)
    assert namespace_attrs(node) == {"a": 1, "b": None}


def test_an_empty_namespace_has_no_attributes() -> None:
    node = read_pickle(pickle.dumps(argparse.Namespace(), protocol=2), where="test")
    assert namespace_attrs(node) == {}


def test_changing_attributes_leaves_the_original_alone_and_keeps_the_order() -> None:
    inner: list[Value] = [1]
    original = namespace({"a": 1, "b": inner, "c": 3})
    changed = with_attrs(original, {"a": 10, "d": 4})
    assert list(namespace_attrs(changed).items()) == [("a", 10), ("b", inner), ("c", 3), ("d", 4)]
    assert namespace_attrs(changed)["b"] is inner
    assert namespace_attrs(original) == {"a": 1, "b": inner, "c": 3}
    assert pickle.loads(write_pickle(changed)) == argparse.Namespace(a=10, b=[1], c=3, d=4)


def test_attributes_given_out_can_be_changed_without_changing_the_node() -> None:
    node = namespace({"a": 1})
    namespace_attrs(node)["a"] = 2
    assert namespace_attrs(node) == {"a": 1}


@pytest.mark.parametrize("value", [{}, None, HOOKS, Global("argparse", "Namespace")], ids=str)
def test_other_values_are_no_namespaces(value: Value) -> None:
    assert not is_namespace(value)
    with pytest.raises(TypeError, match="not a namespace"):
        namespace_attrs(value)


# -------------------------------------------------------------------------------------------------------- ordered dicts


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 1001])
def test_an_ordered_dict_is_written_as_pickle_writes_it(count: int) -> None:
    pairs: list[tuple[Value, Value]] = [(f"key {n}", n) for n in range(count)]
    assert write_pickle(ordered_dict(pairs)) == pickle.dumps(OrderedDict(pairs), protocol=2)


def test_attributes_of_an_ordered_dict_come_back() -> None:
    loaded = pickle.loads(
        write_pickle(ordered_dict([("a", 1)], attrs={"_metadata": ordered_dict([("", {"version": 1})])}))
    )
    assert loaded == OrderedDict(a=1)
    assert loaded._metadata == {"": {"version": 1}}


def test_entries_are_those_of_dicts_and_ordered_dicts() -> None:
    assert entries({"a": 1, 2: None}) == [("a", 1), (2, None)]
    assert entries(ordered_dict([("a", 1)])) == [("a", 1)]
    assert entries(ordered_dict([])) == []
    assert entries([("a", 1)]) is None
    assert entries(namespace({"a": 1})) is None


def test_an_object_without_state_differs_from_one_whose_state_is_none() -> None:
    assert Call(Global("m", "C")).state is MISSING
    data = b"\x80\x02cmegatron.x\nC\n)\x81Nb."
    node = read_pickle(data, where="test")
    assert isinstance(node, Call)
    assert node.state is None
