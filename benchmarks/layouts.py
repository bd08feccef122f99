"""What `run.py` measures of conversions into another parallel layout, and the way of torch, a process of its own.

    layouts.py recut FOLDER FROM TO META OUT    load every rank, join and cut each tensor, fill the buckets, torch.save

``recut`` is code of ours: it reads through our index, and skips the imports of Megatron-LM and MindSpore, which errs in its
favour.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import run
from roads import Words, copied, measure

if TYPE_CHECKING:
    import torch

    from run import Case

HERE = Path(__file__)
CUTS = ((2, 4), (4, 2))
ROLES = ("param", "exp_avg", "exp_avg_sq")
COLUMNS = ("attention.out_proj.weight", "mlp.projection.weight")


def layout(work: Path, case: Case, rounds: int, say: Callable[[str], None]) -> dict[str, object]:
    """``convert`` into another layout against cp of what it writes, against the same layout, and against torch."""
    result: dict[str, object] = {}
    for tensor, target in CUTS:
        say(f"tp {tensor} to tp {target}")
        source, other, out = work / f"tp{tensor}", work / f"meta{target}", work / "out"
        one = replace(case, folder=source, tp=tensor)
        one.build()
        replace(case, folder=other, tp=target).build(headers_only=True)
        metadata = other / "pt_meta"
        recut = one.convert(out, "--target-tp-size", str(target))
        recut[recut.index("--param-map-path") + 1] = str(metadata)
        made = work / f"made{target}"
        run([str(made) if word == str(out) else word for word in recut])
        files = sorted(made.rglob("mp_rank_*/*.pt"))
        methods: dict[str, Words] = {
            "cp": copied(files, out),
            "convert": recut,
            "convert, one process": [*recut, "--multiprocess-off"],
            f"convert, tp {tensor} as it is": one.convert(out),
            "torch": [sys.executable, HERE, "recut", source / "ms", str(tensor), str(target), metadata, out],
        }
        sources = [*source.glob("ms/*/*"), *files]
        result[f"{tensor} to {target}"] = {
            "source_bytes": sum(path.stat().st_size for path in source.glob("ms/*/*")),
            "megatron_bytes": sum(path.stat().st_size for path in files),
            "medians": measure(methods, sources, out, rounds, say),
        }
        for folder in (source, other, made):
            run(["rm", "-rf", folder])
    return result


def recut(source: Path, tensor: int, target: int, metadata: Path, out: Path) -> None:
    """Load everything, and save every rank."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from ckpt2pt.core.names import NameTable  # noqa: PLC0415
    from ckpt2pt.formats.mindspore import index_file  # noqa: PLC0415

    table = NameTable()
    loaded: list[dict[str, torch.Tensor]] = []
    for rank in range(tensor):
        (path,) = (source / f"rank_{rank}").iterdir()
        found: dict[str, torch.Tensor] = {}
        for name, ref in index_file(path).items():
            if ref.shape:
                parts = [np.fromfile(e.path, np.float32, e.nbytes // 4, offset=e.offset) for e in ref.extents]
                found[name] = torch.from_numpy(np.concatenate(parts)).reshape(ref.shape)
        loaded.append(found)
    whole = {name: join(name, [found.pop(name) for found in loaded]) for name in list(loaded[0])}
    for rank in range(target):
        places = json.loads((metadata / f"param_map_buffer0_dp0tp{rank}pp0vpp0.json").read_text())
        numel = max(stop for _, _, _, stop, _ in places.values())
        buckets = {role: torch.zeros(numel) for role in ROLES}
        model: dict[str, torch.Tensor] = {}
        for raw, (_, _, start, stop, _) in places.items():
            name = raw.removeprefix("module.")
            mindspore = table.to_mindspore(name, lambda layer: layer)[0]
            for role in ROLES:
                entry = mindspore if role == "param" else f"{role}.{mindspore}"
                part = cut(mindspore, whole[entry], rank, target)
                buckets[role][start:stop] = part.flatten()
                if role == "param":
                    model[name] = part.to(torch.bfloat16)
        save(out / f"mp_rank_{rank:02d}", {"model": model}, {0: {(torch.bfloat16, torch.float32): buckets}})


def join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The tensor of all ranks."""
    import torch  # noqa: PLC0415

    if "norm." in name:
        return parts[0]
    if ".mapping." in name:
        return torch.cat([torch.cat([part.chunk(2)[half] for part in parts]) for half in (0, 1)])
    return torch.cat(parts, 1 if name.endswith(COLUMNS) else 0)


def cut(name: str, whole: torch.Tensor, rank: int, of: int) -> torch.Tensor:
    """A rank's part of it."""
    import torch  # noqa: PLC0415

    if "norm." in name:
        return whole
    if ".mapping." in name:
        return torch.cat([half.chunk(of)[rank] for half in whole.chunk(2)])
    return whole.chunk(of, 1 if name.endswith(COLUMNS) else 0)[rank]


def save(folder: Path, model: Mapping[str, Any], optimizer: Mapping[Any, Any]) -> None:
    """``torch.save`` with fsync."""
    import torch  # noqa: PLC0415

    folder.mkdir(parents=True)
    for name, tree in (("model_optim_rng.pt", model), ("distrib_optim.pt", optimizer)):
        with (folder / name).open("wb") as file:
            torch.save(tree, file)
            file.flush()
            os.fsync(file.fileno())


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["recut", folder, tensor, target, metadata, out]:
            recut(Path(folder), int(tensor), int(target), Path(metadata), Path(out))
        case _:
            raise SystemExit(__doc__)
