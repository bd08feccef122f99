"""Results to damage: a golden set converted, and single elements, keys and bytes of it changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from archives import take_apart, write_archive
from ckpt2pt.discover import Discovered, discover
from ckpt2pt.discover.request import Request
from ckpt2pt.formats.torchfile.archive import Archive
from ckpt2pt.formats.torchfile.pickles import read_pickle, write_pickle
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.gather import width
from ckpt2pt.verification.leaves import TensorLeaf, open_pt
from ckpt2pt.verification.prove import verify_rank
from ckpt2pt.verification.report import Report
from conversions import Quiet, request_for

Tree = dict[Any, Any]


class Result(NamedTuple):
    """One conversion."""

    request: Request
    chosen: Discovered
    folder: Path

    def verify(self, rank: tuple[int, int] = (0, 0), reader: Any = "own") -> Report:
        return verify_rank(self.request, self.chosen, rank, self.folder, reader=reader)

    def file(self, name: str, rank: tuple[int, int] = (0, 0)) -> Path:
        return self.folder / self.request.topology.directory(*rank) / name

    def copied(self, target: Path) -> Result:
        """The same result in another place, to be damaged."""
        shutil.copytree(self.request.target, target)
        request = replace(self.request, target=target)
        return Result(request, self.chosen, target / self.folder.name)

    @property
    def model(self) -> Path:
        return self.file("model_optim_rng.pt")

    @property
    def optim(self) -> Path:
        return self.file("distrib_optim.pt")


def convert(folder: Path, target: Path, *, full: bool = True, **more: object) -> Result:
    """Convert a golden set; ``more`` are fields of the request."""
    return convert_request(request_for(folder, target, full=full, **more))


def convert_request(request: Request) -> Result:
    outcome = run(request, range(request.topology.pipeline), Quiet())
    assert outcome.published
    return Result(request, discover(request), outcome.target.folder)


def tree_of(path: Path) -> Tree:
    return cast("Tree", read_pickle(Archive.open(path).pickle, where=str(path)))


def edit_tree(path: Path, edit: Callable[[Tree], None]) -> None:
    """Change the tree of a .pt in memory and write the file again, checksums right."""
    tree = tree_of(path)
    edit(tree)
    parts = take_apart(path)
    write_archive(path, parts.stem, write_pickle(tree), parts.payloads, parts.serialization_id)


def set_element(path: Path, leaf: str, index: int, data: bytes, *, correct_crc: bool = True) -> bytes:
    """Overwrite elements of a tensor from one on, and correct the checksums; returns the bytes that were there."""
    tensor = open_pt(path)[leaf]
    assert isinstance(tensor, TensorLeaf)
    assert len(data) % width(tensor.dtype) == 0
    offset = tensor.extents[0].offset + index * width(tensor.dtype)
    whole = bytearray(path.read_bytes())
    before = bytes(whole[offset : offset + len(data)])
    assert before != data, "a test must be able to fail"
    if not correct_crc:
        whole[offset : offset + len(data)] = data
        path.write_bytes(whole)
        return before
    parts = take_apart(path)
    storages = list(Archive.open(path).storages.values())
    for number, storage in enumerate(storages):
        if storage.offset <= offset < storage.offset + storage.nbytes:
            payload = parts.payloads[number]
            start = offset - storage.offset
            parts.payloads[number] = payload[:start] + data + payload[start + len(data) :]
    write_archive(path, parts.stem, parts.pickle, parts.payloads, parts.serialization_id)
    return before


def flip(path: Path, leaf: str, index: int, *, correct_crc: bool = True) -> None:
    """Turn the lowest bit of one element."""
    tensor = open_pt(path)[leaf]
    assert isinstance(tensor, TensorLeaf)
    size, extent = width(tensor.dtype), tensor.extents[0]
    raw = bytearray(path.read_bytes()[extent.offset + index * size :][:size])
    raw[0] ^= 1
    set_element(path, leaf, index, bytes(raw), correct_crc=correct_crc)
