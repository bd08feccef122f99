"""A checkpoint of MindSpeed-LLM on MSAdapter: the files of Megatron-LM 0.8 to 0.12 in archives that no torch reads.

Its directories, names of parameters and optimizer files are Megatron-LM's own, so that it is read as one of it; what differs is
reported in ``torchfile.msadapter``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckpt2pt.errors import FormatError, ref
from ckpt2pt.formats.checkpoint import Checkpoint, Selection
from ckpt2pt.formats.families import Seen
from ckpt2pt.formats.folders import source_folder
from ckpt2pt.formats.megatron.read import open_megatron

WITHOUT_RNG = "the states of random generators are MindSpore's, and are left out"


def check_msadapter(folder: Path) -> None:
    """Raise :class:`FormatError` for the folder of an iteration whose files torch wrote."""
    if Seen(folder).of_msadapter:
        return
    raise FormatError(
        "torch wrote this checkpoint, not MSAdapter",
        where=folder,
        hint=f"choose megatron in {ref('source.format')}, or leave it out",
        field="source.format",
    )


def open_msadapter(path: Path, wanted: Selection) -> Checkpoint:
    """Read the headers of every rank of one iteration, as :func:`open_megatron` does.

    Raises :class:`FormatError` for files that torch wrote.
    """
    check_msadapter(source_folder(path, wanted.iteration))
    return replace(open_megatron(path, wanted), format="msadapter", warnings=(WITHOUT_RNG,))
