"""What MSAdapter pickles is read as torch would have saved it, without running anything; what neither writes is refused."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckpt2pt.errors import FormatError, InputError, UnsafePickleError
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.msadapter import is_msadapter, read_tree
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Persistent, StoredTensor, Value, entries
from ckpt2pt.io.foreign import recognise
from msadapter import FAMILIES, rewrite_file, write_archive

TENSOR = Global("mindspore.common.tensor", "Tensor")
TYPING = "mindspore._c_expression.typing"


def of_pickle(tmp_path: Path, pickle: bytes, payloads: dict[str, bytes] | None = None) -> Value:
    write_archive(tmp_path / "x.pt", pickle, payloads or {"0": bytes(24)})
    return read_tree(Archive.open(tmp_path / "x.pt"))


def tensor(
    shape: tuple[Value, ...] = (3, 2), stride: Value = None, *, kind: str = "FloatStorage", numel: Value = 6, offset: Value = 0
) -> Value:  # fmt: skip
    storage = Persistent(("storage", kind, "0", "cpu", numel))
    steps: Value = [1, 3] if stride is None else stride
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    view: tuple[Value, ...] = (storage, offset, shape, steps, False, None, None)
    return Call(Global("torch._tensor", "_rebuild_from_type_v2"), (rebuild, TENSOR, view, None))


def dtype(name: str, *bits: Value) -> Value:
    return Call(Global(TYPING, name), (), True, bits)


@pytest.mark.parametrize(
    ("pickle", "foreign"),
    [
        (b"\x80\x02cmindspore.common.tensor\nTensor\n.", True),
        (b"\x80\x02cmindspore._c_expression.typing\nBFloat\n.", True),
        (b"\x80\x02cmsadapter._utils\n_rebuild_tensor_v2\n.", True),
        (b"\x80\x02cmindtorch.torch._tensor\n_rebuild_from_type_v2\n.", True),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", False),
        (b"\x80\x02X\x20\x00\x00\x00cmsadapterfest\nnothing of it at all.", False),
        (b"", False),
    ],
)
def test_msadapter_is_reported_by_the_names_of_its_pickle(pickle: bytes, foreign: bool) -> None:
    assert is_msadapter(pickle) is foreign


def test_every_corner_of_the_real_writer_is_read_in_c_order(golden: Path) -> None:
    archive = Archive.open(golden / "msadapter" / "corners.pt")
    expected = np.load(golden / "msadapter" / "corners_expected.npz")
    found = dict(entries(read_tree(archive)) or ())
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        held = found[name]
        assert isinstance(held, StoredTensor)
        assert held.is_contiguous
        extent = archive.storages[held.key]
        data = Path(extent.path).read_bytes()[extent.offset :][: extent.nbytes]
        assert (held.shape, data) == (wanted.shape, wanted.tobytes()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_all_releases_mean_the_same(family: str, golden: Path, tmp_path: Path) -> None:
    source = golden / "reference_torch/moe_ep2/iter_0000002/mp_rank_00_000/distrib_optim.pt"
    rewrite_file(source, tmp_path / "x.pt", family)
    archive = Archive.open(tmp_path / "x.pt")
    assert is_msadapter(archive.pickle)
    tree = read_tree(archive)
    assert isinstance(tree, list)
    [first, _] = tree
    assert isinstance(first, dict)
    buffers = first[0]
    assert isinstance(buffers, dict)
    assert list(buffers) == [(Global("torch", "bfloat16"), Global("torch", "float32"))]


@pytest.mark.parametrize(
    ("name", "bits", "torch"),
    [
        ("Float", (16,), "float16"), ("Float", (32,), "float32"), ("Float", (64,), "float64"), ("BFloat", (16,), "bfloat16"),
        ("Int", (8,), "int8"), ("Int", (64,), "int64"), ("UInt", (8,), "uint8"), ("Bool", (), "bool"), ("Complex", (64,), "complex64"),
    ],
)  # fmt: skip
def test_types_of_mindspore_are_those_of_torch(name: str, bits: tuple[int, ...], torch: str, tmp_path: Path) -> None:
    one = dtype(name, *bits)
    tree = of_pickle(tmp_path, write_pickle({"a": one, "b": one, (one, one): 1}, check=False))
    known = Global("torch", torch)
    assert tree == {"a": known, "b": known, (known, known): 1}


def test_a_parameter_with_attributes_keeps_them(tmp_path: Path) -> None:
    made = tensor()
    assert isinstance(made, Call)
    made.args = (*made.args[:3], {"tensor_model_parallel": True})
    tree = of_pickle(tmp_path, write_pickle([made], check=False))
    assert isinstance(tree, list)
    [call] = tree
    assert isinstance(call, Call)
    _, kind, view, state = call.args
    assert (kind, state) == (Global("torch", "Tensor"), {"tensor_model_parallel": True})
    assert isinstance(view, tuple)
    assert view[1:5] == (0, (3, 2), (2, 1), False)


NOT_WRITTEN: dict[str, tuple[Value, str]] = {
    "a storage of no type": (tensor(kind="DoubleDutchStorage"), "which torch does not have"),
    "a storage that is too small": (tensor(numel=5), "does not lie inside its storage"),
    "a storage of a negative size": (tensor(numel=-6), "does not lie inside its storage"),
    "a storage of an absurd size": (tensor((1 << 62, 4), numel=1 << 70), "does not lie inside its storage"),
    "an offset": (tensor(offset=1), "not whole"),
    "sizes that are none": (tensor((3, "2")), "not whole"),
    "a size that is true": (tensor((3, True)), "not whole"),
    "a negative size": (tensor((-3, -2)), "does not lie inside its storage"),
    "a stride of another length": (tensor(stride=[1]), "not whole"),
    "a type of no size": (dtype("Float", 24), "that torch does not have"),
    "a type without a size": (Call(Global(TYPING, "Float"), (), True), "without its size"),
    "a type that is called": (Call(Global(TYPING, "Float"), (32,), True, (32,)), "with arguments"),
    "a type whose size is a text": (dtype("Float", "32"), "that torch does not have"),
}


@pytest.mark.parametrize(("value", "said"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_what_msadapter_never_writes_is_refused(value: Value, said: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=said):
        of_pickle(tmp_path, write_pickle([tensor(), value], check=False))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("msadapter", "load"), ("msadapter._utils", "eval"), ("mindtorch.torch.hub", "load"), ("msadapter.os", "system"),
        ("mindspore", "load_checkpoint"), ("mindspore.common.tensor", "Tensor.__init__"), (TYPING, "eval"), ("os", "system"),
        ("mindspore.common.initializer", "Zero"), ("builtins", "eval"), ("msadapter.serialization", "load"),
    ],
)  # fmt: skip
def test_nothing_is_run_and_no_other_name_passes(module: str, name: str, tmp_path: Path) -> None:
    hostile = Call(Global(module, name), ("touch /tmp/never",))
    with pytest.raises(UnsafePickleError, match=f"the pickle names {module}.{name}"):
        of_pickle(tmp_path, write_pickle([tensor(), hostile], check=False))


def test_a_tensor_is_never_a_cycle_or_a_key(tmp_path: Path) -> None:
    own: list[Value] = [tensor()]
    own.append(own)
    with pytest.raises(FormatError, match="contains itself"):
        of_pickle(tmp_path, write_pickle(own, check=False))


def test_random_damage_is_an_error_in_words_or_leaves_a_tree_that_torch_could_hold(
    golden: Path, tmp_path: Path
) -> None:
    source = golden / "msadapter/moe_ep2/iter_0000002/mp_rank_00_000/distrib_optim.pt"
    archive, random_ = Archive.open(source), random.Random(13)
    outcomes = Counter[bool]()
    for _ in range(1500):
        data = bytearray(archive.pickle)
        for _ in range(random_.randrange(1, 4)):
            at = random_.randrange(len(data))
            data[at : at + random_.randrange(3)] = random_.randbytes(random_.randrange(3))
        outcomes[is_refused(replace(archive, pickle=bytes(data)))] += 1
    assert outcomes[True] > outcomes[False] > 0


def is_refused(archive: Archive) -> bool:
    """Whether it is refused in words; what passes is written again."""
    try:
        write_pickle(read_tree(archive))
    except InputError as error:
        return bool(error.hint)
    return False


def test_a_file_of_msadapter_that_was_cut_is_reported(golden: Path, tmp_path: Path) -> None:
    data = (golden / "msadapter/corners.pt").read_bytes()
    assert recognise(data[:512]).startswith("a zip archive")
    for stop in range(0, len(data), 97):
        (tmp_path / "x.pt").write_bytes(data[:stop])
        with pytest.raises(FormatError):
            read_tree(Archive.open(tmp_path / "x.pt"))
