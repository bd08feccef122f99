"""Conversions into torch_dist of golden sets."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.cli.commands import main
from goldens import golden_root

SETS = golden_root() / "megatron06"
TIED, CUT, NOOP = (SETS / name for name in ("a2_tp1pp1_tied_bias", "b_st_tp2pp2_safetensors", "e_tp1pp2vpp2_noop_tail"))


def convert(source: Path, target: Path, *more: str | Path) -> int:
    words = ["--source", source, "--target", target, "--target-format", "torch_dist", "--progress", "none", *more]
    return main(["convert", "--multiprocess-off", *map(str, words)])


def of_mindspore(folder: Path, target: Path, *more: str | Path) -> int:
    return convert(folder / "ms", target, "--param-map-path", folder / "pt_meta", *more)
