"""Reading a pickle without running it and writing it back, judged by real torch and real pickle."""

from __future__ import annotations

import argparse
import io
import pickle
import random
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Value, namespace_attrs, tensor, with_attrs
from goldens import golden_root
from torchload import megatron_names, same


def again(data: bytes) -> bytes:
    return write_pickle(read_pickle(data, where="test"))


def archives(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.pt"))


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def with_pickle(path: Path, data: bytes, target: Path) -> Path:
    """A copy of an archive with another pickle in it."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
        for name in source.namelist():
            copy.writestr(name, data if name.endswith("/data.pkl") else source.read(name))
    return target


def load(path: Path) -> Any:
    with megatron_names():
        return torch.load(path, map_location="cpu", weights_only=False)


def same_tree(left: Any, right: Any) -> bool:
    """Equal in types, order of keys, attributes, and every bit of every tensor."""
    if type(left).__qualname__ != type(right).__qualname__:
        return False
    if isinstance(left, argparse.Namespace):
        return same_tree(vars(left), vars(right))
    if isinstance(left, dict):
        return (
            list(left) == list(right)
            and all(same_tree(left[key], right[key]) for key in left)
            and same_tree(getattr(left, "_metadata", None), getattr(right, "_metadata", None))
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same_tree, left, right))
    return same(left, right)


# ---------------------------------------------------------------------------------------------------------- real files


def test_every_golden_pickle_comes_back_byte_for_byte(golden_set: Path) -> None:
    files = archives(golden_set)
    assert files
    assert not [path for path in files if again(pickle_of(path)) != pickle_of(path)]


def test_torch_loads_the_same_from_a_pickle_written_again(golden_set: Path, tmp_path: Path) -> None:
    for path in archives(golden_set):
        copy = with_pickle(path, again(pickle_of(path)), tmp_path / "copy.pt")
        assert same_tree(load(copy), load(path)), path


def test_torch_sees_a_changed_argument_and_nothing_else_changed(golden_set: Path, tmp_path: Path) -> None:
    path = golden_set / "pt_meta" / "args_tp00_pp000.pt"
    tree = read_pickle(pickle_of(path), where=str(path))
    assert isinstance(tree, dict)
    tree["args"] = with_attrs(tree["args"], {"consumed_train_samples": 4711, "brand_new": [1, "two"]})
    changed, original = load(with_pickle(path, write_pickle(tree), tmp_path / "copy.pt")), load(path)
    assert changed["args"].consumed_train_samples == 4711
    assert changed["args"].brand_new == [1, "two"]
    assert list(vars(changed["args"]))[:-1] == list(vars(original["args"]))
    changed["args"].consumed_train_samples = original["args"].consumed_train_samples
    del changed["args"].brand_new
    assert same_tree(changed, original)


def test_arguments_can_be_read_without_megatron(golden_set: Path) -> None:
    path = golden_set / "pt_meta" / "args_tp00_pp000.pt"
    tree = read_pickle(pickle_of(path), where=str(path))
    assert isinstance(tree, dict)
    args = namespace_attrs(tree["args"])
    assert args["hidden_size"] == 64
    assert args["params_dtype"] == Global("torch", "bfloat16")
    model_type = args["model_type"]
    assert isinstance(model_type, Call)
    assert model_type.func == Global("megatron.core.enums", "ModelType")


def test_numpy_arrays_keep_the_name_of_the_numpy_that_wrote_them(golden_set: Path) -> None:
    for path in archives(golden_set):
        data = pickle_of(path)
        if b"_reconstruct" in data:
            old, new = b"cnumpy.core.multiarray\n" in data, b"cnumpy._core.multiarray\n" in data
            assert (b"cnumpy.core.multiarray\n" in again(data), b"cnumpy._core.multiarray\n" in again(data)) == (
                old,
                new,
            )
            assert old != new


# --------------------------------------------------------------------------------------------------- what real pickle makes

OBJECTS: list[Any] = [
    pytest.param(None, id="none"),
    pytest.param([True, False, 0, 1, 255, 256, 65535, 65536, -1, -(2**31), 2**31 - 1], id="small-integers"),
    pytest.param(
        [2**31, -(2**31) - 1, 2**63, -(2**63), 2**64, 10**50, -(10**50), 2**2040, -(2**2039)], id="long-integers"
    ),
    pytest.param([0.0, -0.0, 1e-300, float("inf"), -float("inf")], id="floats"),
    pytest.param(["", "a", "ä", "模型", "\U0001f600", "\ud800", "x" * 70000, "line\nline\\u0041\x1a\r"], id="text"),
    pytest.param([b"", b"abc", bytes(range(256)), b"y" * 70000], id="bytes"),
    pytest.param([(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),))], id="tuples"),
    pytest.param([[], [1], list(range(999)), list(range(1000)), list(range(1001)), list(range(2500))], id="lists"),
    pytest.param([{}, {1: 2}, {n: str(n) for n in range(1001)}, {(1, "a"): None, None: 1.5, b"k": 2}], id="dicts"),
    pytest.param([OrderedDict(), OrderedDict(a=1), OrderedDict((n, n) for n in range(1001))], id="ordered-dicts"),
    pytest.param([{1, 2, 3}, frozenset({"a"}), set(), bytearray(b"abc"), bytearray()], id="sets-and-bytearrays"),
    pytest.param([argparse.Namespace(), argparse.Namespace(a=1, b=argparse.Namespace(c=[2]))], id="namespaces"),
    pytest.param([SimpleNamespace(a=1), complex(1, 2), slice(1, 2, 3)], id="odds-and-ends"),
    pytest.param([Path("a/b"), Path("/")], id="paths"),
    pytest.param([np.arange(6, dtype="<f4").reshape(2, 3), np.float32(1.5), np.dtype("int64")], id="numpy"),
    pytest.param([np.array(["a", None], dtype=object), np.asfortranarray(np.ones((2, 3)))], id="odd-arrays"),
    pytest.param([torch.float32, torch.Size([1, 2]), torch.device("cpu"), torch.strided], id="torch"),
    pytest.param([random.Random(1).getstate(), np.random.RandomState(1).get_state()], id="random-states"),
]


@pytest.mark.parametrize("value", OBJECTS)
def test_writing_again_what_pickle_wrote_in_protocol_2_changes_no_byte(value: Any) -> None:
    data = pickle.dumps(value, protocol=2)
    assert again(data) == data


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", OBJECTS)
def test_a_pickle_of_any_protocol_means_the_same_after_it_was_written_again(value: Any, protocol: int) -> None:
    loaded = pickle.loads(again(pickle.dumps(value, protocol=protocol)))
    assert pickle.dumps(loaded, protocol=4) == pickle.dumps(
        pickle.loads(pickle.dumps(value, protocol=protocol)), protocol=4
    )


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_buffer_such_as_transformer_engine_keeps_comes_back(protocol: int) -> None:
    buffer = pickle.loads(again(pickle.dumps(io.BytesIO(b"state"), protocol=protocol)))
    assert buffer.getvalue() == b"state"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.integers(-(2**70), 2**70),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(-(2**60), 2**60) | st.tuples(st.text(), st.integers(0, 9)), inner)
        | st.tuples(inner).map(lambda pair: [pair[0], pair[0]])  # shared
    ),
    max_leaves=40,
)


@given(plain)
def test_a_plain_tree_is_written_as_pickle_writes_it(tree: Any) -> None:
    assert write_pickle(tree) == pickle.dumps(tree, protocol=2)


@given(plain, st.integers(0, 5))
def test_a_plain_tree_is_read_as_pickle_reads_it(tree: Any, protocol: int) -> None:
    data = pickle.dumps(tree, protocol=protocol)
    assert write_pickle(pickle.loads(again(data))) == write_pickle(pickle.loads(data))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_class_with_keywords_to_new_survives_protocol_2(protocol: int) -> None:
    data = pickle.dumps(WithKeywords(2, name="n"), protocol=4)
    loaded = pickle.loads(write_pickle(read_pickle(data, where="test", allow={f"{__name__}.WithKeywords"})))
    assert (loaded.number, loaded.name) == (2, "n")
    assert type(loaded) is WithKeywords


class WithKeywords:
    """Pickled by NEWOBJ_EX."""

    number: int
    name: str

    def __new__(cls, number: int, *, name: str) -> WithKeywords:
        made = super().__new__(cls)
        made.number, made.name = number, name
        return made

    def __getnewargs_ex__(self) -> tuple[tuple[int], dict[str, str]]:
        return (self.number,), {"name": self.name}

    def __getstate__(self) -> None:
        return None


# -------------------------------------------------------------------------------------------------------------- sharing


def test_shared_containers_are_shared_again_and_written_once() -> None:
    inner = list(range(5000))
    loaded = pickle.loads(again(pickle.dumps({"a": inner, "b": (inner, inner)}, protocol=2)))
    assert loaded["a"] is loaded["b"][0] is loaded["b"][1]
    assert len(again(pickle.dumps([inner] * 100, protocol=2))) < len(pickle.dumps(inner, protocol=2)) + 500


def test_shared_structure_that_would_fill_the_memory_if_unfolded_stays_small() -> None:
    tower: Any = ["lol"]
    for _ in range(60):
        tower = [tower] * 10
    data = pickle.dumps(tower, protocol=2)
    assert again(data) == data


def test_bytes_made_on_the_way_are_never_taken_for_another_string() -> None:
    # Their text lives for a moment only; if its address were remembered, the next string there would be lost.
    tree: list[Value] = [[str(n).encode() * 3, str(n) * 3] for n in range(2000)]
    assert pickle.loads(write_pickle(tree)) == tree


@pytest.mark.parametrize("value", [np.float64(1.5), {1, 2}, object(), range(3)], ids=lambda value: type(value).__name__)
def test_a_value_that_is_no_node_cannot_be_written(value: Any) -> None:
    with pytest.raises(TypeError, match="no node of a tree"):
        write_pickle([value])


def test_reading_takes_microseconds_a_tensor() -> None:
    words = "experts.local_experts.linear_fc1.weight." * 4
    tree: dict[Value, Value] = {
        f"{words}{n}": tensor("float32", str(n), 1 << 20, 0, (1024, 1024)) for n in range(20_000)
    }
    data = write_pickle(tree)
    start = time.process_time()
    read = read_pickle(data, where="test")
    assert time.process_time() - start < 5  # 0.7 s on an idle core
    assert isinstance(read, dict)
    assert len(read) == 20_000


def test_the_committed_sets_hold_every_kind_of_file() -> None:
    names = {path.name.partition("_tp")[0] for path in archives(golden_root())}
    assert names >= {"args", "model_optim_rng.pt", "distrib_optim.pt"}
