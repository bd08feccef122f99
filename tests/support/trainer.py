"""A training of a pod, as far as its output goes: rank by rank, at its pace, as MindSpore 2.10 saves.

python trainer.py OUTPUT MODEL STEPS PAUSE [ENDING]

Its rank is the completion index of its Job.  The tensors are those of MODEL, a checkpoint that real MindSpore has
written; each step is written by the project's own writer, in pieces, under a temporary name, renamed when whole, and
then nobody may write to it any more.  ``fails`` ends without success, ``stops`` before the last step, ``stays`` goes on
until it is killed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.formats.mindspore.entries import Entry, number_entry
from ckpt2pt.formats.mindspore.writer import CkptFile

PIECES = 4


def main() -> int:
    """Save every step, then end as asked."""
    output, model, steps, pause = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
    ending = sys.argv[5] if len(sys.argv) > 5 else ""
    rank = int(os.environ.get("JOB_COMPLETION_INDEX", "0"))
    [path] = (model / f"rank_{rank}").glob("*.ckpt")
    folder = output / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    saved = [int(step) for step in steps.split(",") if step]
    for step in saved[:-1] if ending == "stops" and rank == 1 else saved:
        time.sleep(pause)  # the training itself
        save(folder, rank, step, checkpoint(path, step), pause)
    while ending == "stays":
        time.sleep(1)
    return 1 if ending == "fails" else 0


def checkpoint(path: Path, step: int) -> bytes:
    """The file of a step."""
    training_step = {"epoch_num": (0, "int64"), "step_num": (step, "int64"), "num_steps": (4 * step, "int32")}
    entries = [
        number_entry(name, *training_step[name])
        if name in training_step
        else Entry(name=name, dtype=ref.dtype, shape=ref.shape, source=payload(ref))
        for name, ref in index_file(path).items()
    ]
    layout = CkptFile(name="it", entries=tuple(entries)).lay_out()
    fd = os.memfd_create("checkpoint")
    layout.finish(fd, [])
    return os.pread(fd, layout.nbytes, 0)


def payload(ref: TensorRef) -> bytes:
    """Its elements."""
    found = b""
    for extent in ref.extents:
        with Path(extent.path).open("rb") as file:
            file.seek(extent.offset)
            found += file.read(extent.nbytes)
    return found


def save(folder: Path, rank: int, step: int, data: bytes, pause: float) -> None:
    """As MindSpore saves, only slower."""
    partial = folder / f"network_rank_{rank}-0_{step}.tmp"
    with partial.open("wb", buffering=0) as out:
        size = -(-len(data) // PIECES)
        for start in range(0, len(data), size):
            out.write(data[start : start + size])
            time.sleep(pause / PIECES)
    partial.rename(partial.with_suffix(".ckpt")).chmod(0o400)


if __name__ == "__main__":
    sys.exit(main())
