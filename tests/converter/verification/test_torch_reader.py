"""Real torch as a second reader: the same leaves as our own, and nothing that a file names is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from archives import write_archive
from ckpt2pt.errors import FormatError, UnsafePickleError, UsageError
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import MISSING, Call, Global, Value, tensor
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.leaves import Leaf, Symbol, TensorLeaf, open_pt, same_scalar
from ckpt2pt.verification.torch_reader import open_with_torch

ENUM = Call(Global("megatron.core.enums", "ModelType"), (1,))


def write(tmp_path: Path, tree: Value, payloads: list[bytes] | None = None) -> Path:
    path = tmp_path / "x.pt"
    write_archive(path, "x", write_pickle(tree), payloads or [])
    return path


def equal(left: Leaf, right: Leaf) -> bool:
    if isinstance(left, TensorLeaf) and isinstance(right, TensorLeaf):
        with Files() as files:
            data = [leaf.elements.block(files, 0, leaf.numel).tobytes() for leaf in (left, right)]
        return str(left) == str(right) and data[0] == data[1]
    return same_scalar(left, right)


@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_both_readers_see_the_same_in_megatrons_own_files(golden_set: Path, name: str) -> None:
    for path in sorted((golden_set / "A").rglob(name)):
        ours, theirs = open_pt(path), open_with_torch(path, weights_only=name == "distrib_optim.pt")
        # torch makes bytes of an encoded text, we leave the call as it stands.
        encoded = {path for path, leaf in ours.items() if leaf == Symbol("_codecs.encode")}
        below = {path for path in ours if any(path.startswith(f"{top}/") for top in encoded)}
        assert ours.keys() - below == theirs.keys()
        assert [path for path in theirs if path not in encoded and not equal(ours[path], theirs[path])] == []
        assert all(isinstance(theirs[path], bytes) for path in encoded)


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param({"e": ENUM, "f": ENUM}, id="enumeration"),
        pytest.param({"n": Call(Global("argparse", "Namespace"), new=True, state={"a": 1})}, id="namespace"),
        pytest.param({"n": Call(Global("argparse", "Namespace"), new=True)}, id="namespace-without-state"),
        pytest.param(
            {"c": Call(Global("megatron.core", "Config"), (1, "x"), new=True, state={"a": [1]}, pairs=[("k", 2)])},
            id="made-and-filled",
        ),
        pytest.param({"l": Call(Global("megatron.core", "List"), (), items=[1, 2])}, id="a-list-of-its-own"),
        pytest.param({"t": Global("torch", "bfloat16"), "c": Global("megatron.core", "Class")}, id="names"),
        pytest.param({(Global("torch", "float16"), "x"): [1]}, id="dtype-in-a-key"),
        pytest.param({ENUM: 1}, id="a-stand-in-as-key"),
        pytest.param(
            {"x": tensor("bfloat16", "0", 4, 1, (3,)), "y": tensor("bfloat16", "0", 4, 0, (2, 2))}, id="tensors"
        ),
        pytest.param([1, (2.5, None, True), "x"], id="plain"),
    ],
)
def test_both_readers_see_the_same(tmp_path: Path, tree: Value) -> None:
    path = write(tmp_path, tree, [b"abcdefgh"])
    ours, theirs = open_pt(path), open_with_torch(path)
    if isinstance(tree, dict) and ENUM in tree:
        assert len(ours) == len(theirs)
        return
    assert list(ours) == list(theirs)
    assert all(equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("module", "name", "argument"),
    [
        ("os", "mkdir", "trap"),
        ("builtins", "eval", "__import__('os').mkdir('trap')"),
        ("posix", "system", "mkdir trap"),
        ("torch", "load", "trap"),
        ("torch._utils", "_import_dotted_name", "os"),
    ],
)
@pytest.mark.parametrize("weights_only", [True, False])
def test_what_would_run_something_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, argument: str, weights_only: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, {"x": Call(Global(module, name), (argument,), state=MISSING)})
    with pytest.raises(UnsafePickleError, match=f"{module}.{name}"):
        open_with_torch(path, weights_only=weights_only)
    assert not (tmp_path / "trap").exists()


def test_a_class_of_a_fork_is_let_in_by_the_rule_file(tmp_path: Path) -> None:
    path = write(tmp_path, {"x": Call(Global("fork.args", "Mode"), (1,))})
    with pytest.raises(UnsafePickleError):
        open_with_torch(path)
    assert open_with_torch(path, allow=["fork.args.Mode"])["/x"] == Symbol("fork.args.Mode")


def test_without_torch_the_hint_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, {"x": 1})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError) as caught:
        open_with_torch(path)
    assert "the extra torch" in caught.value.hint
    assert caught.value.exit_code == 64


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:200], id="cut"),
        pytest.param(lambda _: b"nothing of the kind", id="something-else"),
        pytest.param(lambda _: b"", id="empty"),
    ],
)
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, damage: Any) -> None:
    path = write(tmp_path, {"x": tensor("float32", "0", 2, 0, (2,))}, [bytes(8)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError):
        open_with_torch(path)


def test_a_storage_shorter_than_its_tensor_is_refused_where_torch_reads_on(tmp_path: Path) -> None:
    path = write(tmp_path, {"x": tensor("float32", "0", 2, 0, (2,))}, [bytes(4)])
    assert torch.load(path, mmap=True, weights_only=True)["x"].numel() == 2
    with pytest.raises(FormatError, match="storage 0 of 8 bytes, the record holds 4"):
        open_with_torch(path, weights_only=True)


def test_what_torch_refuses_is_reported_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, {"x": ENUM})
    with pytest.raises(FormatError) as caught:
        open_with_torch(path, weights_only=True)
    assert caught.value.what == f"torch {torch.__version__} cannot load it: Weights only load failed"


def test_a_pickle_that_asks_for_a_huge_memo_takes_no_memory(tmp_path: Path) -> None:
    """Five bytes, an index of two thousand million: CPython's own machine would allot 32 GB."""
    path = tmp_path / "x.pt"
    write_archive(path, "x", b"\x80\x02}r\xff\xff\xff\x7fX\x01\0\0\0aK\x01s.", [])
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))\n"
        "from pathlib import Path; from ckpt2pt.verification.torch_reader import open_with_torch\n"
        "assert open_with_torch(Path(sys.argv[1]))['/a'] == 1"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environment)
