"""Which format a folder is of, told by what is in it."""

from __future__ import annotations

import re
from pathlib import Path

from ckpt2pt.errors import FormatError, MissingInputError
from ckpt2pt.folders import checkpoint_files, iteration_folder
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.megatron import open_megatron
from ckpt2pt.formats.mindspore import open_mindspore
from ckpt2pt.mapping.names import Rules
from ckpt2pt.system.paths import is_folder, is_there, listing

READERS = {"mindspore": open_mindspore, "megatron": open_megatron}
"""Format -> what reads its headers."""

_OPTION = "the checkpoint's path"
_MINDSPORE = re.compile(r"(?:.*/)?(?:rank_\d+|mp_rank_\d+(?:_\d+)?)/[^/]*\.(?:ckpt|safetensors)")
_MEGATRON = re.compile(r"(?:.*/)?mp_rank_\d+(?:_\d+)?/[^/]*\.pt")


def detect(path: Path) -> str:
    """``mindspore`` or ``megatron``.  Raises :class:`FormatError` for a folder that is neither."""
    if not is_there(path, _OPTION):
        raise MissingInputError("there is no such folder", where=path, mend="check the path")
    if not is_folder(path, _OPTION):
        raise FormatError(
            "a single file is a part of a checkpoint", where=path, mend="name the folder of the whole checkpoint"
        )
    folder = iteration_folder(path)
    names = checkpoint_files(folder)
    for format_name, pattern in (("megatron", _MEGATRON), ("mindspore", _MINDSPORE)):
        if any(map(pattern.fullmatch, names)):
            return format_name
    if listing(folder, "*.distcp", _OPTION):
        return "megatron"  # whose reader says what it does not read
    raise FormatError(
        "neither a MindSpore training output (rank_*/*.ckpt, *.safetensors) nor a Megatron checkpoint (mp_rank_*/*.pt)",
        where=path,
        mend="name the folder that holds the folders of the ranks, or iterations of them",
    )


def read(
    path: Path,
    *,
    source_format: str = "auto",
    tensor: int | None = None,
    pipeline: int | None = None,
    iteration: int | None = None,
    rules: Rules | None = None,
) -> Checkpoint:
    """Find one iteration of a checkpoint and read its headers."""
    chosen = detect(path) if source_format == "auto" else source_format
    return READERS[chosen](path, tensor=tensor, pipeline=pipeline, iteration=iteration, rules=rules or Rules())
