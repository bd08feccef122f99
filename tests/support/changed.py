"""Copies of a golden set's source and metadata, to be changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt2pt.discover import discover
from ckpt2pt.discover.request import Request
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.torchfile.trees import with_attrs
from ckptfiles import Tensor, ckpt
from conversions import request_for
from results import Result, convert_request, edit_tree

HEAD, EMBEDDING = "language_model.output_layer.weight", "language_model.embedding.word_embeddings.weight"


def copied(folder: Path, tmp_path: Path) -> Request:
    request = request_for(folder, tmp_path / "out")
    for path, name in ((request.source, "ms"), (metadata_of(request), "pt_meta")):
        shutil.copytree(path, tmp_path / name)
    for path in (tmp_path / "ms").rglob("*.ckpt"):
        path.chmod(0o600)
    return replace(request, source=tmp_path / "ms", metadata=tmp_path / "pt_meta")


def metadata_of(request: Request) -> Path:
    assert request.metadata
    return request.metadata


def edit_map(request: Request, name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = metadata_of(request) / name
    document = json.loads(path.read_text())
    edited = edit(document)
    path.write_text(json.dumps(document if edited is None else edited))


def append(request: Request, rank: int, *tensors: Tensor) -> None:
    path = request.source / f"rank_{rank}" / "network.ckpt"
    path.write_bytes(path.read_bytes() + ckpt(tensors))


def payload(request: Request, rank: int, name: str) -> bytes:
    path = request.source / f"rank_{rank}" / "network.ckpt"
    extent = index_file(path)[name].extents[0]
    return path.read_bytes()[extent.offset : extent.offset + extent.nbytes]


def drop(request: Request, rank: int, part: str) -> None:
    """Write the source again without the entries that have ``part`` in their name."""
    path = request.source / f"rank_{rank}" / "network.ckpt"
    kept = [ref for name, ref in index_file(path).items() if part not in name]
    path.write_bytes(ckpt(Tensor(ref.name, ref.dtype, ref.shape, payload(request, rank, ref.name)) for ref in kept))


def tie(request: Request) -> None:
    """Make the set one with tied embeddings: the last stage's output layer is the copy, in a bucket name of its own."""
    for path in metadata_of(request).glob("args_*.pt"):
        edit_tree(
            path,
            lambda tree: tree.update(args=with_attrs(tree["args"], {"untie_embeddings_and_output_weights": False})),
        )

    def rename(document: dict[str, Any]) -> dict[str, Any]:
        return {key.replace(HEAD, "word_embeddings.weight"): entry for key, entry in document.items()}

    edit_map(request, "param_map_buffer0_dp0tp0pp1vpp0.json", rename)


def converted(request: Request) -> Callable[[], Result]:
    """Convert what is there now; whatever is changed later is compared with that."""
    result = convert_request(request)
    return lambda: Result(request, discover(request), result.folder)
