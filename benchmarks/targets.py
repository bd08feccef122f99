"""What `run.py` measures of the formats of today's Megatron-LM, and the ways of torch, each a process of its own.

    targets.py save FOLDER OUT    load everything, torch.save of weights, main parameters and moments as one file
    targets.py dcp  FOLDER OUT    the same state by torch.distributed.checkpoint.save

Both are code of ours: they read through our index, and skip the imports of Megatron-LM, which errs in their favour.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from measure import run
from roads import Words, copied, measure

if TYPE_CHECKING:
    import torch

    from run import Case

HERE = Path(__file__)
FORMATS = ("torch_dist", "megatron")


def targets(work: Path, case: Case, rounds: int, say: Callable[[str], None]) -> dict[str, object]:
    """Each format against cp of what it writes and torch; then one target written by several workers."""
    case.build()
    result: dict[str, object] = {}
    out = work / "out"
    saved: dict[str, Words] = {
        "torch.save": [sys.executable, HERE, "save", case.folder, out],
        "torch.distributed.checkpoint.save": [sys.executable, HERE, "dcp", case.folder, out],
    }
    for name in FORMATS:
        say(name)
        files, convert = made(work, case, name)
        methods: dict[str, Words] = {
            "cp": copied(files, out),
            "convert": convert(out),
            "convert digest": convert(out, "--verify", "digest"),
            **(saved if name == "torch_dist" else {}),
        }
        result[name] = {
            "written_bytes": sum(path.stat().st_size for path in files),
            "medians": measure(methods, [*case.sources, *files], out, rounds, say),
        }
        shutil.rmtree(work / name)
    shutil.rmtree(case.folder)
    say("workers on one target: tp 2, pp 2")
    four = replace(case, tp=2, pp=2, layers=case.layers + case.layers % 2)
    four.build()
    for name in FORMATS:
        files, convert = made(work, four, name)
        workers = {f"{number} workers": convert(out, "--process-limit", str(number)) for number in (1, 2, 4)}
        result[f"{name}, workers"] = {
            "written_bytes": sum(path.stat().st_size for path in files),
            "medians": measure({"cp": copied(files, out), **workers}, [*four.sources, *files], out, rounds, say),
        }
        shutil.rmtree(work / name)
    shutil.rmtree(four.folder)
    return result


def made(work: Path, case: Case, name: str) -> tuple[list[Path], Callable[..., Words]]:
    """The files of a conversion into a format, and the command that makes them."""

    def convert(out: Path, *more: str) -> Words:
        return case.convert(out, "--target-format", name, *more)

    run(convert(work / name))
    return [path for end in ("pt", "distcp") for path in sorted((work / name).rglob(f"*.{end}"))], convert


# ------------------------------------------------------------------------------------------------- processes of their own


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Weights in bfloat16, main parameters and moments in float32."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from ckpt2pt.formats.mindspore import index_file  # noqa: PLC0415

    state: dict[str, torch.Tensor] = {}
    for path in folder.glob("ms/*/*.ckpt"):
        index = index_file(path)
        for name, ref in index.items():
            if ref.shape:
                parts = [np.fromfile(e.path, np.float32, e.nbytes // 4, offset=e.offset) for e in ref.extents]
                state[name] = torch.from_numpy(np.concatenate(parts)).reshape(ref.shape)
                if f"exp_avg.{name}" in index:
                    state[f"weight.{name}"] = state[name].to(torch.bfloat16)
    return state


def save(folder: Path, out: Path) -> None:
    import torch  # noqa: PLC0415

    out.mkdir()
    with (out / "state.pt").open("wb") as file:
        torch.save(loaded(folder), file)
        file.flush()
        os.fsync(file.fileno())


def dcp(folder: Path, out: Path) -> None:
    import warnings  # noqa: PLC0415

    import torch.distributed.checkpoint as checkpoint  # noqa: PLC0415

    warnings.simplefilter("ignore")  # that there is one process
    checkpoint.save(loaded(folder), storage_writer=checkpoint.FileSystemWriter(out), no_dist=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["save", folder, out]:
            save(Path(folder), Path(out))
        case ["dcp", folder, out]:
            dcp(Path(folder), Path(out))
        case _:
            raise SystemExit(__doc__)
