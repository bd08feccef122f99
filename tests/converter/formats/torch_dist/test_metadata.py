"""Damaged and hostile distributed checkpoints: a clear error with exit code 65 or 66, and nothing of them is executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.errors import FormatError, InputError, MissingInputError, UnsafePickleError
from ckpt2pt.formats.torch_dist.metadata import Chunk, Entry, Item, read_metadata
from ckpt2pt.formats.torch_dist.metadata_out import write_metadata
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import Call, Global, Value
from torchdist import Piece, of_layers, whole, write_folder

SHAPE = (2, 6, 4)
MODULE = "torch.distributed.checkpoint.metadata"
FC2 = "decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    array = np.arange(48, dtype="<f4").reshape(SHAPE)
    pieces = [Piece((layer, 0, 0), (1, 6, 4), f"__{layer}_0.distcp") for layer in range(2)]
    norm = np.ones((2, 4), "<f4")
    keys = {FC2: (array, pieces), "decoder.layers.input_layernorm.weight": (norm, whole(norm))}
    return write_folder(tmp_path / "iter_0000003", keys)


def replaced(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) >= 1
    path.write_bytes(data.replace(old, new))


def cut(path: Path, nbytes: int) -> None:
    os.truncate(path, nbytes)


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a file lost": (lambda p: (p / "__1_0.distcp").unlink(), 66, "__1_0.distcp is not there"),
    "a file cut": (lambda p: cut(p / "__0_0.distcp", 500), 65, "the file has 500 bytes"),
    "a file that grew": (lambda p: grown(p / "__0_0.distcp"), 65, "says that it ends at byte"),
    "the index lost": (lambda p: (p / ".metadata").unlink(), 66, "there is no .metadata"),
    "the index cut": (lambda p: cut(p / ".metadata", 700), 65, "the pickle"),
    "the index empty": (lambda p: cut(p / ".metadata", 0), 65, "the pickle ends too early"),
    "the common state lost": (lambda p: (p / "common.pt").unlink(), 66, "there is no common.pt"),
    "the common state cut": (lambda p: cut(p / "common.pt", 100), 65, "cut short"),
    "an item that is none": (
        lambda p: (p / "__0_0.distcp").write_bytes(bytes((p / "__0_0.distcp").stat().st_size)), 65, "archive",
    ),
    "an item of another tensor": (
        lambda p: (p / "__0_0.distcp").write_bytes((p / "__1_0.distcp").read_bytes()), 65, "ends at byte",
    ),
    "another format": (
        lambda p: (p / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1})),
        65, "'zarr'",
    ),
    "no JSON": (lambda p: (p / "metadata.json").write_text("{"), 65, "cannot be read as JSON"),
    "a type nobody knows": (lambda p: replaced(p / ".metadata", b"ctorch\nfloat32\n", b"ctorch\nfloat8_e5m2\n"), 65, "type"),
    "a path that leads elsewhere": (lambda p: replaced(p / ".metadata", b"__1_0.distcp", b"/tmp/a.distc"), 65, "no file of"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_in_words(folder: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    harm, code, words = DAMAGE[damage]
    harm(folder)
    for command in (["inspect", str(folder)], ["verify", str(folder), str(folder)]):
        assert main(command) == code
        reported = capsys.readouterr().err
        assert words in reported
        assert "hint:" in reported
        assert "Traceback" not in reported


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp", "__1_0.distcp"])
def test_no_flipped_byte_of_a_header_is_a_bug(folder: Path, tmp_path: Path, name: str) -> None:
    """Whatever is read is refused with a reason, or means what it meant: other values lie in the payload alone."""
    origin = (folder / name).read_bytes()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for at in range(0, len(origin), 7):
        data = bytearray(origin)
        data[at] ^= 0xFF
        (copy / name).write_bytes(data)
        with suppress(InputError, MissingInputError):
            ckpt2pt.open(copy).close()


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/ckpt2pt-was-here",)


def test_a_hostile_index_is_refused_by_name(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"a": Hostile()}))
    with pytest.raises(UnsafePickleError, match=r"names (posix|nt)\.system"):
        ckpt2pt.open(folder)


def test_a_class_that_no_index_has_is_refused_by_name(folder: Path) -> None:
    replaced(
        folder / ".metadata", b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"ctorch.distributed.rpc\nRRef\n"
    )
    with pytest.raises(UnsafePickleError, match=r"names torch\.distributed\.rpc\.RRef"):
        ckpt2pt.open(folder)


@pytest.mark.parametrize("tree", [None, [], {"a": 1}, 7])
def test_an_index_of_something_else_is_refused(folder: Path, tree: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(tree))
    with pytest.raises(FormatError, match="there is no Metadata where one has to be"):
        ckpt2pt.open(folder)


def test_an_index_by_the_class_of_megatron_itself_is_read(tmp_path: Path) -> None:
    """As 0.15 pickles it, where torch alone has no place for the shapes of flattened tensors."""
    array = of_layers(4)
    key = "decoder.layers.input_layernorm.weight"
    found = read_metadata(write_folder(tmp_path / "x", {key: (array, whole(array))}, own_class=True))
    assert found.tensors[key].shape == (3, 4)


def test_files_that_hold_no_part_are_a_warning(folder: Path) -> None:
    shutil.copy(folder / "__0_0.distcp", folder / "__7_0.distcp")
    assert ckpt2pt.open(folder).warnings == ("__7_0.distcp hold no part of the checkpoint",)


CHUNKS = 150_000
READ = """
import resource, sys, time
from pathlib import Path
from ckpt2pt.formats.torch_dist.metadata import read_metadata
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
before = peak()
chunks = sum(len(entry.chunks) for entry in read_metadata(Path(sys.argv[1])).tensors.values())
print(chunks, peak() - before)
"""


@pytest.mark.slow
def test_an_index_of_very_many_chunks_takes_memory_for_each_of_them_and_no_more(tmp_path: Path) -> None:
    """671 billion parameters with their optimizer are some 200,000 chunks; a pickle of ten million opcodes held 137,000."""
    tensors: dict[str, Entry] = {}
    for number in range(CHUNKS // 10):
        items = (Item("__0_0.distcp", 1000 * (10 * number + part), 1000) for part in range(10))
        chunks = tuple(Chunk((256 * part, 0), (256, 7168), item) for part, item in enumerate(items))
        tensors[f"decoder.layers.{number}.mlp.linear_fc1.weight"] = Entry("float32", (2560, 7168), chunks)
    (tmp_path / ".metadata").write_bytes(write_metadata(tensors, {}))
    (tmp_path / "__0_0.distcp").touch()
    cut(tmp_path / "__0_0.distcp", 1000 * CHUNKS)
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True)
    found, nbytes = map(int, done.stdout.split())
    assert found == CHUNKS
    assert nbytes < 2560 * CHUNKS


def test_attributes_that_two_objects_share_are_refused(folder: Path) -> None:
    """They are emptied as they are read: a second object gets none, and no part of the checkpoint."""
    size = Call(Global("torch", "Size"), ((1,),))
    state: dict[Value, Value] = {"offsets": size, "sizes": size}
    chunks: list[Value] = [Call(Global(MODULE, "ChunkStorageMetadata"), new=True, state=state) for _ in range(2)]
    properties = Call(Global(MODULE, "TensorProperties"), new=True, state=(Global("torch", "float32"),))
    held: dict[Value, Value] = {"properties": properties, "size": size, "chunks": chunks}
    tensors: dict[Value, Value] = {"x": Call(Global(MODULE, "TensorStorageMetadata"), new=True, state=held)}
    tree: dict[Value, Value] = {"state_dict_metadata": tensors, "storage_data": {}}
    (folder / ".metadata").write_bytes(write_pickle(Call(Global(MODULE, "Metadata"), new=True, state=tree)))
    with pytest.raises(InputError, match=r"no file holds x|a size is not a tuple"):
        read_metadata(folder)
