"""Which format a checkpoint is of, known by what is in it: one table, a row for each format that is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ckpt2pt.core.names import Rules
from ckpt2pt.errors import FormatError, MissingInputError, UsageError
from ckpt2pt.formats.checkpoint import OPTION, Checkpoint, Selection
from ckpt2pt.formats.families import Seen, refuse_unsupported
from ckpt2pt.formats.mindformers.flags import Flags, refuse_flags
from ckpt2pt.formats.torch_dist.metadata import is_distributed
from ckpt2pt.io.paths import is_folder, is_there

MINDSPORE_FILES = ("ckpt", "safetensors")


@dataclass(frozen=True, slots=True)
class Format:
    """A format that is read: its sign, and its reader."""

    is_here: Callable[[Seen], bool]
    open: Callable[[Path, Selection], Checkpoint]


def _mindspore(path: Path, wanted: Selection, only: str | None = None) -> Checkpoint:
    from ckpt2pt.formats.mindspore.read import open_mindspore  # noqa: PLC0415

    return open_mindspore(path, wanted, wanted_format=only)


def _megatron(path: Path, wanted: Selection) -> Checkpoint:
    from ckpt2pt.formats.megatron.read import open_megatron  # noqa: PLC0415 - numpy and more

    return open_megatron(path, wanted)


def _msadapter(path: Path, wanted: Selection) -> Checkpoint:
    from ckpt2pt.formats.msadapter import open_msadapter  # noqa: PLC0415 - as above

    return open_msadapter(path, wanted)


def _torch_dist(path: Path, wanted: Selection) -> Checkpoint:
    from ckpt2pt.formats.torch_dist.read import open_torch_dist  # noqa: PLC0415 - numpy

    return open_torch_dist(path, wanted)


def _huggingface(path: Path, wanted: Selection) -> Checkpoint:
    from ckpt2pt.formats.huggingface.read import open_huggingface  # noqa: PLC0415 - as the others

    return open_huggingface(path, wanted)


def _mindformers(path: Path, wanted: Selection) -> Checkpoint:
    from ckpt2pt.formats.mindformers.read import open_mindformers  # noqa: PLC0415 - as the others

    return open_mindformers(path, wanted)


_READERS = {
    "mindformers": Format(lambda seen: seen.of_mindformers, _mindformers),
    "mindspore": Format(lambda seen: seen.suffix in {".ckpt", ".safetensors"}, _mindspore),
    "msadapter": Format(lambda seen: seen.of_msadapter, _msadapter),
    "megatron": Format(lambda seen: seen.suffix == ".pt", _megatron),
    "torch_dist": Format(lambda seen: any(map(is_distributed, seen.places)), _torch_dist),
    "huggingface": Format(lambda seen: seen.of_huggingface, _huggingface),
}
"""By name, in the order in which they are looked for."""
FORMATS = tuple(_READERS)


def detect(path: Path) -> str:
    """The name of the format of a folder, one of :data:`FORMATS`.

    Raises :class:`UnsupportedFormatError` for a family that is not read, :class:`FormatError` for a folder that nothing tells
    and for a single file, :class:`MissingInputError` for nothing.
    """
    if not is_there(path, OPTION):
        raise MissingInputError("there is no such folder", where=path, hint="check the path")
    refuse_unsupported(path)
    if not is_folder(path, OPTION):
        raise FormatError(
            "this is a file, and a checkpoint is read with the files of all its ranks",
            where=path,
            hint="name the folder that holds the folders of the ranks",
        )
    seen = Seen(path)
    for name, known in _READERS.items():
        if known.is_here(seen):
            return name
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
    mindformers: Flags | None = None,
    described: bool = False,
) -> Checkpoint:
    """Find one iteration of a checkpoint and read its headers.

    ``source_format`` is ``auto``, one of :data:`FORMATS`, or one of the two formats of MindSpore's files.
    ``mindformers`` is what is said of the fused weights of MindFormers.
    ``weights_alone`` does not look at the optimizer of a Megatron checkpoint, which may be missing, wrong or of an unknown form.
    ``described`` is :attr:`Selection.described`.
    """
    wanted = Selection(
        tensor=tensor,
        pipeline=pipeline,
        iteration=iteration,
        rules=rules or Rules(),
        weights_alone=weights_alone,
        mindformers=mindformers or Flags(),
        described=described,
    )
    chosen = detect(path) if source_format == "auto" else source_format
    if chosen != "mindformers":
        refuse_flags(wanted.mindformers, path)
    if chosen in MINDSPORE_FILES:
        return _mindspore(path, wanted, chosen)
    if chosen not in _READERS:
        raise UsageError(f"no format {chosen}", where="source_format", hint=f"give auto or one of {', '.join(FORMATS)}")
    return _READERS[chosen].open(path, wanted)
