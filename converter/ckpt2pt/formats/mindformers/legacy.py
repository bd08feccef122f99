"""The older form of MindFormers (``use_legacy_format: True``): one file a rank, with weights, moments and numbers in it.

    rank_0/qwen3_rank_0-1_500.safetensors    epoch 1, step 500
    rank_0/meta.json

Which part of a tensor a rank of several holds is said by strategy files of MindSpore alone (``output/strategy``), which are not read.
MindFormers 2.0.0, mindformers/core/callback/callback.py (``CheckpointMonitor``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ckpt2pt.core.extents import TensorRef
from ckpt2pt.core.foldernames import rank_of
from ckpt2pt.errors import MissingInputError, UnsupportedFormatError, ref
from ckpt2pt.formats.mindformers.folder import Common
from ckpt2pt.formats.mindspore import index_file, read_scalars
from ckpt2pt.io.paths import listing

_FILE = re.compile(r".+_rank_([0-9]{1,9})-([0-9]{1,9})_([0-9]{1,12})\.(?:safetensors|ckpt)")
_NUMBERS = ("epoch_num", "step_num", "global_step", "global_batch_size")
_OPTION = ref("source.path")


def is_legacy(path: Path) -> bool:
    """Whether a folder holds ranks of this form."""
    return bool(_ranks(path))


def _ranks(path: Path) -> dict[int, list[Path]]:
    """The files of each rank."""
    folders = {
        number: folder for folder in listing(path, option=_OPTION) if (number := rank_of(folder.name)) is not None
    }
    found = {
        number: [file for file in listing(folder, option=_OPTION) if _FILE.fullmatch(file.name)]
        for number, folder in folders.items()
    }
    return {number: files for number, files in found.items() if files}


def find_file(path: Path, iteration: int | None) -> tuple[Path, Mapping[str, TensorRef], Common]:
    """The file of an iteration, by default of the newest, its header and its numbers.

    Raises :class:`UnsupportedFormatError` for files of several ranks, :class:`MissingInputError` where there is no such iteration.
    """
    ranks = _ranks(path)
    if len(ranks) > 1 or (ranks and 0 not in ranks):
        raise UnsupportedFormatError(
            f"{len(ranks)} ranks of MindFormers' older form are there, and which part each holds only strategy files of MindSpore say",
            where=path,
            hint="load it in the training that wrote it, and save it with use_legacy_format: False, which writes metadata.json",
        )
    found: list[tuple[int | None, Path, Mapping[str, TensorRef], Common]] = []
    files = sorted(ranks.get(0, []), key=_when)
    for file in files if iteration is not None else files[-1:]:
        header = index_file(file)
        common = _common(header)
        if iteration in {None, common.iteration}:
            found.append((common.iteration, file, header, common))
    if not found:
        raise MissingInputError(
            "there is no checkpoint" if iteration is None else f"there is no iteration {iteration}",
            where=path,
            hint="ask for one that is there, or leave the iteration out for the newest",
        )
    return found[-1][1:]


def _when(file: Path) -> tuple[int, int]:
    found = _FILE.fullmatch(file.name)
    assert found, "only such files are listed"
    return int(found[2]), int(found[3])


def _common(header: Mapping[str, TensorRef]) -> Common:
    """Numbers of the training.  ``step_num`` counts in its epoch, so that it is the iteration in the first one alone."""
    scalars = read_scalars(header[name] for name in _NUMBERS if name in header and header[name].numel == 1)
    numbers = {name: int(value) for name, value in scalars.items() if isinstance(value, int | float) and value >= 0}
    if not numbers.get("global_step"):
        numbers.pop("global_step", None)
        if numbers.get("epoch_num", 1) <= 1 and numbers.get("step_num"):
            numbers["global_step"] = numbers["step_num"]
    return Common(numbers)
