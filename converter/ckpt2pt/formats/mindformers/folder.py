"""Which folder holds an iteration of a MindFormers checkpoint, and what its files are called.

    latest_checkpointed_iteration.txt              the newest iteration, in decimal
    iteration_00000500/[prefix-]model-0000003-0000016.safetensors    file 3 of 16 of the weights
                       [prefix-]opt-0000003-0000016.safetensors      and of the optimizer
                       common.json                                   steps, batch size
                       metadata.json                                 only where a training had more than one rank

MindFormers 2.0.0 and 2.1.0, mindformers/checkpoint/utils.py (``get_checkpoint_iter_dir``, ``get_checkpoint_name``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from ckpt2pt.core.foldernames import TRACKER, mindformers_iteration_name, mindformers_iteration_of, tracked_number
from ckpt2pt.errors import InputError, MissingInputError, ref
from ckpt2pt.io.inputs import read_object
from ckpt2pt.io.paths import is_file, is_folder, listing
from ckpt2pt.io.text import short
from ckpt2pt.publish import read_tracker

METADATA = "metadata.json"
COMMON = "common.json"
ADAPTER = "mindformers_adapter_config.json"
_FILE = re.compile(r"(?:[^/\\\0]+-)?(model|opt)-([0-9]{7,12})-([0-9]{7,12})\.safetensors")
_MAX_COMMON_BYTES = 1 << 20
_OPTION = ref("source.path")
_HINT = "copy the whole iteration again from where it was written"

Kind = Literal["model", "opt"]


def file_kind(name: str) -> Kind | None:
    """Whether a file of this name holds weights or the optimizer; None for any other name."""
    found = _FILE.fullmatch(name)
    return cast("Kind", found[1]) if found else None


def files_of(folder: Path) -> dict[str, tuple[Kind, int]]:
    """The files of an iteration by name: what each holds, and how many of that kind there are."""
    found = {path.name: _FILE.fullmatch(path.name) for path in listing(folder, option=_OPTION)}
    return {name: (cast("Kind", match[1]), int(match[3])) for name, match in found.items() if match}


def holds_iteration(folder: Path) -> bool:
    """Whether a folder is that of an iteration."""
    return any(kind == "model" for kind, _ in files_of(folder).values())


def _iterations(root: Path) -> Mapping[int, Path]:
    found = {mindformers_iteration_of(path.name): path for path in listing(root, option=_OPTION)}
    return {number: path for number, path in sorted(found.items(), key=lambda one: one[0] or 0) if number is not None}


def iteration_folder(path: Path, iteration: int | None) -> Path:
    """The folder of an iteration, by default of the one that the tracker names; a folder of one iteration is itself.

    Raises :class:`MissingInputError` where it is not there, :class:`InputError` where nothing says which of several counts.
    """
    if holds_iteration(path):
        own = mindformers_iteration_of(path.name)
        if iteration not in {None, own} and own is not None:
            raise _no_iteration(path, iteration or 0, [own])
        return path
    there = _iterations(path)
    text = read_tracker(path)
    named = tracked_number(text)
    if iteration is None and text and named is None:
        raise InputError(
            f"the tracker says {short(text)}, which is no iteration",
            where=path / TRACKER,
            hint=f"write the number of an iteration that is there into it, or say it with {ref('source.iteration')}",
        )
    wanted = iteration if iteration is not None else named
    if wanted is None and len(there) > 1:
        raise InputError(
            f"{len(there)} iterations and no {TRACKER}",
            where=path,
            hint=f"say one of them with {ref('source.iteration')}, such as {max(there)}",
            field="source.iteration",
        )
    found = path / mindformers_iteration_name(wanted) if wanted is not None else next(iter(there.values()), path)
    if not is_folder(found, _OPTION) or not holds_iteration(found):
        raise _no_iteration(path, wanted, list(there))
    return found


def _no_iteration(path: Path, iteration: int | None, there: list[int]) -> MissingInputError:
    listed = f"; there {'is' if len(there) == 1 else 'are'} {', '.join(map(str, there[:8]))}" if there else ""
    what = "there is no iteration" + ("" if iteration is None else f" {iteration}") + listed
    return MissingInputError(what, where=path, hint="copy the whole iteration, or ask for one that is there")


@dataclass(frozen=True, slots=True)
class Common:
    """``common.json``: numbers by name.  MindFormers 2.1.0, mindformers/checkpoint/checkpoint.py, ``CommonInfo``."""

    numbers: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def iteration(self) -> int | None:
        """Steps of the training."""
        return self.numbers.get("global_step")

    @property
    def samples(self) -> int | None:
        """Consumed samples: as stated since 2.1, before that steps of one batch size."""
        stated, batch = self.numbers.get("consumed_samples"), self.numbers.get("global_batch_size")
        if stated is not None or batch is None or self.iteration is None:
            return stated
        return self.iteration * batch

    @property
    def unhealthy(self) -> bool:
        """Whether the training marked what it saved as unhealthy (``CkptHealthStatus.ABNORMAL``)."""
        return self.numbers.get("ckpt_status") == 1


def read_common(folder: Path) -> Common:
    """The numbers of an iteration; none where there is no such file."""
    path = folder / COMMON
    if not is_file(path, _OPTION):
        return Common()
    values = read_object(path, _OPTION, _MAX_COMMON_BYTES, _HINT)
    return Common({name: value for name, value in values.items() if type(value) is int and 0 <= value < 1 << 62})
