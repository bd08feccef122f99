"""Look into a checkpoint of any parallel sizes: which layers changed most between two iterations, or what one holds.

python examples/read_checkpoint.py ms_ckpt                     the largest weights, and the norms of their moments
python examples/read_checkpoint.py ms_ckpt megatron_pt         how far each weight of the second is from the first
"""

from __future__ import annotations

import sys

import numpy as np

import ckpt2pt


def main(*paths: str) -> None:
    with ckpt2pt.open(paths[0]) as checkpoint:
        print(f"{checkpoint.format}, iteration {checkpoint.iteration}, tp {checkpoint.tp}, pp {checkpoint.pp}")
        if len(paths) > 1:
            distances(checkpoint, paths[1])
        else:
            summary(checkpoint)


def summary(checkpoint: ckpt2pt.Checkpoint) -> None:
    """Type, shape and parts of each weight; root mean square of the weight and of its second moment."""
    moments = set(checkpoint.keys("exp_avg_sq"))
    for name in checkpoint:
        info = checkpoint.info(name)
        second = rms(checkpoint.get(name, "exp_avg_sq")) if name in moments else float("nan")
        shape = "x".join(map(str, info.shape))
        print(f"{name:60} {info.dtype:9} {shape:14} {len(info.parts)} parts {rms(checkpoint[name]):.3e} {second:.3e}")


def distances(one: ckpt2pt.Checkpoint, path: str) -> None:
    """Relative distance of each weight, whatever the parallel sizes of the other checkpoint are."""
    with ckpt2pt.open(path) as other:
        for name in one:
            if name in other:
                print(f"{name:60} {rms(one[name] - other[name]) / (rms(one[name]) or 1):.3e}")


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype="f8"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
