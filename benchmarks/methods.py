"""What `run.py` measures besides cp and the command line, each as a process of its own.

    methods.py build   FOLDER LAYERS HIDDEN VOCAB TP PP HEADERS_ONLY
    methods.py optim   FOLDER LAYERS OUT      our engine, distrib_optim.pt alone
    methods.py grow    FOLDER LAYERS OUT      the reference's method: load all, torch.cat for each parameter, torch.save
    methods.py prealloc FOLDER LAYERS OUT     load all, buckets allocated once, torch.save
    methods.py seal    FOLDER                 the source again: .ckpt with its checksum, .safetensors without and with
    methods.py import                         what `python` with our engine's imports costs before any work

``grow`` and ``prealloc`` read through our index, which is faster than the reference's protobuf parser, and skip the
reference's import of Megatron-LM: the comparison errs in their favour.  They take the buffer as our plan lays it out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ckpt2pt.core.tensor import Key, Role
    from ckpt2pt.discover import Prepared
    from ckpt2pt.discover.request import Request
    from ckpt2pt.formats.megatron.legacy import Chunk

Loaded = Mapping["Key", "torch.Tensor"]


def build(folder: Path, layers: int, hidden: int, vocab: int, tp: int, pp: int, headers_only: int) -> None:
    from ckpt2pt.core.topology import Topology  # noqa: PLC0415
    from synthetic import Model  # noqa: PLC0415
    from synthetic import build as write  # noqa: PLC0415

    cut = Topology(num_layers=layers, tensor=tp, pipeline=pp)
    model = Model(topology=cut, hidden=hidden, ffn=hidden * 11 // 4, heads=max(hidden // 64, 8), groups=4, vocab=vocab)
    write(folder, model, headers_only=bool(headers_only))
    for file in [*folder.glob("ms/*/*"), *folder.glob("pt_meta/*")]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def seal(folder: Path) -> None:
    """``ms`` as ``ms-crc``, ``safe`` and ``safe-crc``, as mindspore writes them (2.10.0, serialization.py, _exec_save)."""
    import json  # noqa: PLC0415

    from ckpt2pt.formats.mindspore import index_file  # noqa: PLC0415
    from ckpt2pt.io.checksums import crc32  # noqa: PLC0415

    codes = {"float32": "F32", "int64": "I64"}
    for path in folder.glob("ms/*/*.ckpt"):
        data = path.read_bytes()
        sealed = folder / "ms-crc" / path.parent.name / path.name
        sealed.parent.mkdir(parents=True, exist_ok=True)
        sealed.write_bytes(data + b"crc_num" + crc32(data, 0).to_bytes(10, "big"))
        index, header, payload, crc = index_file(path), dict[str, object](), bytearray(), 0
        for name in sorted(index):
            ref, start = index[name], len(payload)
            payload += b"".join(data[e.offset : e.offset + e.nbytes] for e in ref.extents)
            crc = crc32(payload[start:], crc32(name.encode(), crc))
            offsets = [start, len(payload)]
            header[name] = {"dtype": codes[ref.dtype], "shape": list(ref.shape), "data_offsets": offsets}
        for variant, metadata in (("safe", {"format": "ms"}), ("safe-crc", {"format": "ms", "crc_num": str(crc)})):
            text = json.dumps({"__metadata__": metadata} | header).encode()
            text += b" " * (-len(text) % 8)
            made = folder / variant / path.parent.name / f"{path.stem}.safetensors"
            made.parent.mkdir(parents=True, exist_ok=True)
            with made.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.write(payload)
        del data, payload


def prepared(folder: Path, layers: int, target: Path) -> tuple[Request, Prepared]:
    from ckpt2pt.core.topology import Topology  # noqa: PLC0415
    from ckpt2pt.discover import discover, prepare  # noqa: PLC0415
    from ckpt2pt.discover.request import Request  # noqa: PLC0415

    request = Request(
        topology=Topology(num_layers=layers), source=folder / "ms", metadata=folder / "pt_meta", target=target
    )
    return request, prepare(request, discover(request), (0, 0))


def optim(folder: Path, layers: int, out: Path) -> None:
    from ckpt2pt.core.moves import OPTIM_FILE  # noqa: PLC0415
    from ckpt2pt.engine.write import Stop, write_files  # noqa: PLC0415

    _, rank = prepared(folder, layers, out)
    only = [
        replace(move, sinks=sinks)
        for move in rank.moves()
        if (sinks := tuple(sink for sink in move.sinks if sink.file == OPTIM_FILE))
    ]
    files = [payload for payload in rank.files if payload.name == OPTIM_FILE]
    out.mkdir()
    write_files(out, files, only, stop=Stop(), advance=lambda _: None, check=False)


def grow(folder: Path, layers: int, out: Path) -> None:
    import torch  # noqa: PLC0415

    def bucket(chunk: Chunk, loaded: Loaded, role: Role, number: int) -> torch.Tensor:
        sources = {one.name: one.tensor.key._replace(role=role) for one in chunk.parameters}
        grown = torch.empty(0, dtype=torch.float32)
        assert chunk.buffer
        for placement in chunk.buffer.buckets[number].placements:
            grown = torch.cat((grown, loaded[sources[placement.name]].flatten()))
        return grown

    _save(folder, layers, out, bucket)


def prealloc(folder: Path, layers: int, out: Path) -> None:
    import torch  # noqa: PLC0415

    def bucket(chunk: Chunk, loaded: Loaded, role: Role, number: int) -> torch.Tensor:
        sources = {one.name: one.tensor.key._replace(role=role) for one in chunk.parameters}
        assert chunk.buffer
        place = chunk.buffer.buckets[number]
        whole = torch.zeros(place.numel, dtype=torch.float32)
        for placement in place.placements:
            tensor = loaded[sources[placement.name]].flatten()
            start = placement.start - place.start
            whole[start : start + tensor.numel()] = tensor
        return whole

    _save(folder, layers, out, bucket)


def _save(folder: Path, layers: int, out: Path, bucket: object) -> None:
    """Load the whole rank file, then write both files with ``torch.save``."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    assert callable(bucket)
    _, rank = prepared(folder, layers, out)
    loaded: dict[Key, torch.Tensor] = {}
    for key in rank.plan.held.index:
        ref = rank.plan.held.ref(key)
        parts = [np.fromfile(e.path, np.float32, e.nbytes // 4, offset=e.offset) for e in ref.extents]
        loaded[key] = torch.from_numpy(np.concatenate(parts)).reshape(ref.shape)
    out.mkdir()
    model: dict[str, object] = {"iteration": 500, "checkpoint_version": 3.0}
    optimizer: dict[int, object] = {}
    for chunk in rank.plan.chunks:
        model[chunk.key] = {one.name: loaded[one.tensor.key].to(torch.bfloat16) for one in chunk.parameters}
        assert chunk.buffer
        optimizer[chunk.vpp] = {
            (torch.bfloat16, torch.float32): [
                {role: bucket(chunk, loaded, role, number) for role in ("param", "exp_avg", "exp_avg_sq")}
                for number in range(len(chunk.buffer.buckets))
            ]
        }
    for name, tree in (("model_optim_rng.pt", model), ("distrib_optim.pt", optimizer)):
        with (out / name).open("wb") as file:
            torch.save(tree, file)
            file.flush()
            os.fsync(file.fileno())


def main(arguments: list[str]) -> None:
    method, *rest = arguments
    if method == "import":
        import ckpt2pt.run.conversion  # noqa: F401, PLC0415
    elif method == "seal":
        seal(Path(rest[0]))
    elif method == "build":
        folder, *numbers = rest
        layers, hidden, vocab, tp, pp, headers_only = map(int, numbers)
        build(Path(folder), layers, hidden, vocab, tp, pp, headers_only)
    else:
        {"optim": optim, "grow": grow, "prealloc": prealloc}[method](Path(rest[0]), int(rest[1]), Path(rest[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
