"""How far the training had come: iteration and consumed samples from what the checkpoint says of itself.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ckpt2pt.errors import InputError, aside, ref

STEP_ENTRIES = ("iteration", "epoch_num", "step_num", "num_steps", "state_step", "global_step")
"""Entries of a MindSpore file that tell the time; all are scalars."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """The time of a checkpoint; ``iteration_source`` names the evidence, ``conflicts`` what contradicts it.

    ``as_saved`` is True where the template is of this very checkpoint, so that nothing of it is set to this time: the steps of
    the optimizer are less than iterations where some were skipped.
    """

    iteration: int
    samples: int | None
    iteration_source: str
    conflicts: tuple[str, ...] = ()
    as_saved: bool = False


def read_training_step(
    facts: Mapping[str, float], *, global_batch_size: int | None, named: tuple[int, int] | None, where: str
) -> TrainingStep:
    """Weigh the evidence.

    ``facts`` are scalars of the file (:data:`STEP_ENTRIES`), ``named`` the (epoch, step) in its file name.  ``step_num``
    counts inside the epoch, so it is the iteration only in epoch 0; later the scheduler's sample count divided by
    the batch size is, and last the optimizer's own ``state_step`` (MindSpeed-Core-MS feature-0.1,
    mindspeed_ms/training/training.py and core/optimizer).  Raises :class:`InputError` when nothing tells the time.
    """
    epoch = int(facts["epoch_num"]) if "epoch_num" in facts else named[0] if named else None
    step = int(facts["step_num"]) if "step_num" in facts else named[1] if named else None
    samples = int(facts["num_steps"]) if facts.get("num_steps", 0) > 0 else None
    by_samples = (
        samples // global_batch_size if samples and global_batch_size and not samples % global_batch_size else None
    )
    evidence = {
        "the entry iteration": _positive(facts.get("iteration")),
        "step_num in epoch 0": step if epoch == 0 else None,
        f"num_steps / global_batch_size ({samples} / {global_batch_size})": by_samples,
        "state_step": _positive(facts.get("state_step")),
        "global_step": _positive(facts.get("global_step")),
    }
    known = {why: value for why, value in evidence.items() if value is not None}
    if not known:
        raise InputError(
            "nothing in the checkpoint tells its iteration (no iteration, step_num in epoch 0, num_steps or state_step)",
            where=where,
            hint=f"say it with {ref('source.iteration')}",
            field="source.iteration",
        )
    iteration_source, iteration = next(iter(known.items()))
    # mint.AdamW starts its count at -1: one less than the iteration is no contradiction.
    conflicts = tuple(
        f"{why} says {value}"
        for why, value in known.items()
        if value != iteration and not (why == "state_step" and value == iteration - 1)
    )
    misnamed = name_conflict(named, facts)
    if misnamed:
        conflicts += (f"the file is {misnamed}",)
    if samples is None and global_batch_size:
        samples = iteration * global_batch_size
    return TrainingStep(iteration=iteration, samples=samples, iteration_source=iteration_source, conflicts=conflicts)


def name_conflict(named: tuple[int, int] | None, facts: Mapping[str, float]) -> str:
    """``named 0_400, and holds step_num 2`` where a file contradicts its name; empty where it does not.

    A name without an epoch (``named`` has 0) may count the steps of all epochs: ``iter_0000400``, ``network_rank_0_400``.
    """
    if named is None:
        return ""
    epoch, step = named
    if not epoch and step in {facts.get(entry) for entry in ("iteration", "state_step", "global_step")}:
        return ""
    wanted = {"epoch_num": epoch, "step_num": step} | ({} if epoch else {"iteration": step})
    held = [f"{entry} {facts[entry]:g}" for entry, value in wanted.items() if facts.get(entry, value) != value]
    return f"named {epoch}_{step}, and holds {' and '.join(held)}" if held else ""


def _positive(value: float | None) -> int | None:
    return int(value) if value is not None and value > 0 and value == int(value) else None


def agree(facts: Mapping[Path, Mapping[str, float]], root: Path) -> None:
    """Refuse ranks that saved at different steps: the names may agree where the contents do not."""
    seen: dict[tuple[tuple[str, float], ...], Path] = {}
    for path, stated in facts.items():
        seen.setdefault(tuple(sorted(stated.items())), path)
    if len(seen) > 1:
        (one, path), (other, rival) = list(seen.items())[:2]
        differing = sorted(dict(set(one) ^ set(other)))
        raise InputError(
            "ranks are at different steps: "
            + "; ".join(f"{name} is {dict(one).get(name)} and {dict(other).get(name)}" for name in differing),
            where=f"{path} and {rival}",
            hint=f"choose a checkpoint that every rank has finished{aside('source.iteration')}, "
            f"or remove the files of the broken save from {root}",
        )
