"""Names of the folders of a checkpoint, and the text of its tracker: every pattern of them is here.  Pure: names only.

iter_0000500, release               one iteration; more than seven digits from iteration 10,000,000 on
mp_rank_01, mp_rank_01_003          (tp, pp)
mp_rank_01_003_002                  (tp, pp, expert parallel rank); mp_rank_01_002 with one pipeline stage
rank_3                              a global rank of MindSpore
iteration_00000500                  one iteration of MindFormers
latest_checkpointed_iteration.txt   ``500`` or ``release``

Megatron-LM cac60ce4, megatron/checkpointing.py, ``get_checkpoint_name`` and ``read_metadata``; MindSpeed-Core-MS br_master
07c5198, mindspeed_ms/training (V2), feature-0.1 83d0ef1 (V1).  MindFormers 2.1.0, mindformers/checkpoint/utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ckpt2pt.errors import FormatError, InputError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
MODEL_RANK = r"mp_rank_[0-9]{2,9}(?:_[0-9]{3,9})?"
"""Pattern of the folder of one (tp, pp), for names of files that carry it."""

_ITERATION = re.compile(r"iter_([0-9]{1,18})")
_MINDFORMERS_ITERATION = re.compile(r"iteration_([0-9]{8,18})")
_RANK = re.compile(r"rank_([0-9]{1,9})")
_MODEL_RANK = re.compile(r"mp_rank_([0-9]{2,9})(?:_([0-9]{3,9}))?")
_ANY_MODEL_RANK = re.compile(r"mp_rank_([0-9]{2,9})(?:_([0-9]{3,9}))?(?:_([0-9]{3,9}))?")
_EXPERT_RANK = re.compile(r"mp_rank_[0-9]{2,9}_[0-9]{3,9}_[0-9]{3,9}")
_TRACKED = re.compile(r"[0-9]{1,18}")


def iteration_name(iteration: int) -> str:
    """``500`` -> ``iter_0000500``."""
    return f"iter_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """``iter_0000500`` -> 500; None for any other name, ``release`` included."""
    found = _ITERATION.fullmatch(name)
    return int(found[1]) if found else None


def is_iteration(name: str) -> bool:
    """Whether a folder of this name holds one iteration."""
    return name == RELEASE or iteration_of(name) is not None


def iterations(paths: Iterable[Path]) -> list[Path]:
    """Those named after an iteration, in the order of their numbers; ``release`` first, as any other is newer."""
    numbers = {path: -1 if path.name == RELEASE else iteration_of(path.name) for path in paths}
    return sorted((path for path, number in numbers.items() if number is not None), key=lambda path: numbers[path] or 0)


def tracked_name(text: str, *, overwritten: bool = False) -> str:
    """The folder that a tracker of this text names, ``iter_0000500`` or ``release``; empty for any other text.

    MindSpore rewrites its tracker without truncating it: ``overwritten`` ignores what follows the number or the word.
    """
    text = text.strip()
    if overwritten and text.startswith(RELEASE):
        return RELEASE
    digits = _TRACKED.match(text) if overwritten else _TRACKED.fullmatch(text)
    return iteration_name(int(digits[0])) if digits else RELEASE if text == RELEASE else ""


def mindformers_iteration_name(iteration: int) -> str:
    """``500`` -> ``iteration_00000500``, as MindFormers names it."""
    return f"iteration_{iteration:08d}"


def mindformers_iteration_of(name: str) -> int | None:
    """``iteration_00000500`` -> 500; None for any other name."""
    found = _MINDFORMERS_ITERATION.fullmatch(name)
    return int(found[1]) if found else None


def any_iteration_of(name: str) -> int | None:
    """The iteration of a folder that Megatron-LM or MindFormers named; None for any other name."""
    number = iteration_of(name)
    return mindformers_iteration_of(name) if number is None else number


def tracked_number(text: str) -> int | None:
    """The iteration that a tracker of this text names; None for any other text."""
    return int(text) if _TRACKED.fullmatch(text := text.strip()) else None


def rank_name(rank: int) -> str:
    """``3`` -> ``rank_3``."""
    return f"rank_{rank}"


def rank_of(name: str) -> int | None:
    """``rank_3`` -> 3; None for any other name."""
    found = _RANK.fullmatch(name)
    return int(found[1]) if found else None


def ranks_of(names: Iterable[str]) -> list[int]:
    """The ranks among ``names``, ascending."""
    return sorted(rank for name in names if (rank := rank_of(name)) is not None)


def model_rank_name(tp: int, pp: int | None, ep: int | None = None) -> str:
    """``mp_rank_01``, or ``mp_rank_01_003_002`` with the rank of a pipeline of more than one stage, and that of several of experts."""
    return "_".join([f"mp_rank_{tp:02d}", *(f"{number:03d}" for number in (pp, ep) if number is not None)])


def model_rank_of(name: str) -> tuple[int, int] | None:
    """``mp_rank_01_003`` -> (1, 3), ``mp_rank_01`` -> (1, 0); None for any other name, one of an expert included."""
    found = _MODEL_RANK.fullmatch(name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def expert_ranks(paths: Iterable[Path], *, pipelined: bool) -> dict[tuple[int, int, int], Path]:
    """(tp, pp, ep) -> its folder among ``paths``; ``pipelined`` says that a second number is that of a stage.

    Megatron-LM cac60ce4, megatron/checkpointing.py, ``get_checkpoint_name``.
    """
    found: dict[tuple[int, int, int], Path] = {}
    for path in paths:
        if match := _ANY_MODEL_RANK.fullmatch(path.name):
            tp, second, third = (int(number or 0) for number in match.groups())
            found[(tp, second, third) if pipelined or match[3] else (tp, 0, second)] = path
    return found


def model_ranks(paths: Iterable[Path]) -> dict[tuple[int, int], Path]:
    """(tp, pp) -> its folder among ``paths``.

    Raises :class:`FormatError` for a folder of an expert, :class:`InputError` for two folders of one rank.
    """
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        if _EXPERT_RANK.fullmatch(path.name):
            raise FormatError(
                f"{path.name} is of an expert parallel rank, and ckpt2pt does not read expert parallel checkpoints",
                where=path,
                hint="save the checkpoint with expert parallel size 1",
            )
        rank = model_rank_of(path.name)
        if rank is not None and found.setdefault(rank, path) != path:
            raise InputError(
                f"two folders of one rank: {found[rank].name} and {path.name}",
                where=path.parent,
                hint="copy one whole iteration, and nothing else into it",
            )
    return found


def parallel_sizes(ranks: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Tensor and pipeline parallel size: one more than the largest (tp, pp); 1 and 1 for none."""
    tensor, pipeline = zip((0, 0), *ranks, strict=True)
    return 1 + max(tensor), 1 + max(pipeline)


def is_rank(name: str) -> bool:
    """Whether a folder of this name holds the files of a rank, in any layout; those of experts too."""
    return any(form.fullmatch(name) for form in (_RANK, _MODEL_RANK, _EXPERT_RANK))
