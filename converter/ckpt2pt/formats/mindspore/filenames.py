"""What the name of a checkpoint file says: its step, the rank it belongs to, whether it is a checkpoint to go on from.

rank_{R}/{prefix}_rank_{R}[_{k}]-{epoch}_{step}[_dp_merged].{ckpt|safetensors}       MindSpeed-Core-MS feature-0.1, mindformers
rank_{R}/{prefix}_rank_{R}_{step}.ckpt                                               feature-0.1, core/ddp/checkpointing.py
mp_rank_{tp}[_{pp}]/[{prefix}_]model_optim_rng[_{k}][_dp_merged].ckpt                br_master
opt_shard_info/rank_{R}/dist_opt_shard_info_rank_{R}-0_0.json                        feature-0.1
"""

from __future__ import annotations

import re
from pathlib import Path

from ckpt2pt.core.foldernames import MODEL_RANK, model_rank_of, rank_name, rank_of
from ckpt2pt.errors import InputError

CheckpointId = tuple[int, int]
"""(epoch, step) as in a file's name; files without one share ``UNNAMED``.  An iteration of MindFormers has the epoch -1."""
UNNAMED: CheckpointId = (-1, -1)

_NAMED = re.compile(r".*-(?P<epoch>\d{1,12})_(?P<step>\d{1,12})(?P<merged>_dp_merged)?\.(?:ckpt|safetensors)")
_GLOBAL = re.compile(r".*_rank_\d+_(?P<step>\d{1,12})(?P<merged>_dp_merged)?\.(?:ckpt|safetensors)")
_SKIPPED = re.compile(r"\..*|.*_best_rank_\d+-.*|.*_breakpoint\.ckpt|.*\.tmp|stratey\d+\.ckpt|strategy\d+\.ckpt")
# Behind the rank come only numbers (a rerun's, epoch, step) and mindformers' kind of file.
_RANK = re.compile(r"(?:.*[_.-])?rank_(\d+)(?:[-_](?:\d+|network|trainable|trainable_params))*(?:_dp_merged)?\.[a-z]+")
_MODEL_RANK = re.compile(rf"(?:.*_)?({MODEL_RANK})_model_optim_rng.*")


def is_passed_by(name: str) -> bool:
    """Whether a file of this name is no checkpoint to go on from: hidden, a best one, a breakpoint, a strategy."""
    return _SKIPPED.fullmatch(name) is not None


def when_of_name(name: str) -> CheckpointId:
    """(epoch, step) as a file's name tells them, ``UNNAMED`` if it does not."""
    found = _NAMED.fullmatch(name) or _GLOBAL.fullmatch(name)
    return (int(found.groupdict().get("epoch") or 0), int(found["step"])) if found else UNNAMED


def shown(when: CheckpointId | None) -> str:
    """``0_12``, or ``12`` where there is no epoch, for a person."""
    if when is None or when == UNNAMED:
        return "a file without a step in its name"
    return f"{when[0]}_{when[1]}" if when[0] >= 0 else str(when[1])


def rank_of_name(name: str) -> str:
    """``rank_3`` or ``mp_rank_00_001`` as a file's name has it; empty when the name says no rank."""
    model = _MODEL_RANK.fullmatch(name)
    if model:
        return model[1]
    found = _RANK.fullmatch(name)
    return rank_name(int(found[1])) if found else ""


def check_rank(path: Path) -> None:
    """Refuse a file whose name says another rank than its folder: :class:`InputError`."""
    named, folder = rank_of_name(path.name), path.parent.name
    alike = named and named.startswith("mp_") == folder.startswith("mp_")
    if alike and None is not _place(folder) != _place(named):
        raise InputError(
            f"{path.name} is named after {named}, but lies in {folder}",
            where=path.parent,
            hint="put the file of each rank into the folder of its rank; if the folders were renumbered on purpose, "
            "rename the files to match",
        )


def _place(name: str) -> int | tuple[int, int] | None:
    """``mp_rank_00`` and ``mp_rank_00_000`` are one rank."""
    return model_rank_of(name) or rank_of(name)
