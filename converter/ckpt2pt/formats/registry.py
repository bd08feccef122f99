"""Which format a folder is of, told by what is in it."""

from __future__ import annotations

from pathlib import Path

from ckpt2pt.core.foldernames import is_rank, iterations
from ckpt2pt.core.names import Rules
from ckpt2pt.errors import FormatError, MissingInputError, UsageError
from ckpt2pt.formats.checkpoint import OPTION, Checkpoint, Selection
from ckpt2pt.formats.torch_dist.metadata import is_distributed
from ckpt2pt.io.paths import is_folder, is_there, listing

FORMATS = ("mindspore", "megatron", "torch_dist")
MINDSPORE_FILES = ("ckpt", "safetensors")

_SUFFIXES = {".pt": "megatron", ".ckpt": "mindspore", ".safetensors": "mindspore"}


def detect(path: Path) -> str:
    """``mindspore``, ``megatron`` or ``torch_dist``.

    Raises :class:`FormatError` for a folder that is neither and for a single file, :class:`MissingInputError` for nothing.
    """
    if not is_there(path, OPTION):
        raise MissingInputError("there is no such folder", where=path, hint="check the path")
    if not is_folder(path, OPTION):
        raise FormatError(
            "this is a file, and a checkpoint is read with the files of all its ranks",
            where=path,
            hint="name the folder that holds the folders of the ranks",
        )
    places = [path, *reversed(iterations(listing(path, option=OPTION)))]
    for place in places:
        for folder in listing(place, option=OPTION):
            for file in listing(folder, option=OPTION) if is_rank(folder.name) else ():
                if found := _SUFFIXES.get(file.suffix):
                    return found
    if any(map(is_distributed, places)):
        return "torch_dist"
    raise FormatError(
        "neither a MindSpore training output (rank_*/*.ckpt, *.safetensors) nor a Megatron checkpoint (mp_rank_*/*.pt, *.distcp)",
        where=path,
        hint="name the folder that holds the folders of the ranks, or iterations of them",
    )


def read(
    path: Path,
    *,
    source_format: str = "auto",
    tensor: int | None = None,
    pipeline: int | None = None,
    iteration: int | None = None,
    rules: Rules | None = None,
    weights_alone: bool = False,
) -> Checkpoint:
    """Find one iteration of a checkpoint and read its headers.

    ``source_format`` is ``auto``, one of :data:`FORMATS`, or one of the two formats of MindSpore's files.
    ``weights_alone`` does not look at the optimizer of a Megatron checkpoint, which may be missing, wrong or of an unknown form.
    """
    wanted = Selection(
        tensor=tensor, pipeline=pipeline, iteration=iteration, rules=rules or Rules(), weights_alone=weights_alone
    )
    chosen = detect(path) if source_format == "auto" else source_format
    if chosen in {"mindspore", *MINDSPORE_FILES}:
        from ckpt2pt.formats.mindspore.read import open_mindspore  # noqa: PLC0415

        return open_mindspore(path, wanted, wanted_format=None if chosen == "mindspore" else chosen)
    if chosen == "megatron":
        from ckpt2pt.formats.megatron.read import open_megatron  # noqa: PLC0415 - numpy and more

        return open_megatron(path, wanted)
    if chosen == "torch_dist":
        from ckpt2pt.formats.torch_dist.read import open_torch_dist  # noqa: PLC0415 - numpy

        return open_torch_dist(path, wanted)
    raise UsageError(f"no format {chosen}", where="source_format", hint=f"give auto or one of {', '.join(FORMATS)}")
