"""Training arguments that the MindSpore checkpoint tells: they stand where a description says nothing.  Pure.

max_lr, min_lr, eps, start_wd, ...              -> lr, min_lr, adam_eps, weight_decay, ...
num_steps / iteration                           -> global_batch_size
wd_incr_steps, lr_decay_steps, lr_warmup_steps  -> train_iters, lr_decay_iters, lr_warmup_iters  (they count samples)

The scheduler's counts are those of megatron/training.py, ``get_optimizer_param_scheduler`` (Megatron-LM cac60ce4), which
MindSpeed-Core-MS follows (feature-0.1, mindspeed_ms/training/training.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckpt2pt.core.stated import Statement
from ckpt2pt.formats.ptmeta.gpt import Argument

_COUNTS = {"wd_incr_steps": "train", "lr_decay_steps": "lr_decay", "lr_warmup_steps": "lr_warmup"}


def reported_by_checkpoint(
    given: Mapping[str, Argument], statement: Statement, facts: Mapping[str, float]
) -> dict[str, Argument]:
    """Arguments that the checkpoint tells and ``given`` does not; ``facts`` are the entries that tell the time."""
    batch = given.get("global_batch_size") or _batch(facts)
    stated: dict[str, Argument] = {"global_batch_size": batch} if batch else {}
    stated |= dict(_rates(statement))
    stated |= dict(_counts(statement, batch, samples="train_samples" in given, fraction="lr_warmup_fraction" in given))
    return {name: value for name, value in stated.items() if name not in given}


def _batch(facts: Mapping[str, float]) -> int | None:
    """Samples of an iteration, where the checkpoint tells both; ``step_num`` counts inside an epoch."""
    step = facts.get("step_num") if facts.get("epoch_num") == 0 else None
    steps, samples = facts.get("iteration") or step or facts.get("global_step"), facts.get("num_steps")
    return int(samples // steps) if steps and samples and samples % steps == 0 else None


def _rates(statement: Statement) -> Iterator[tuple[str, Argument]]:
    for argument, name in (("lr", "max_lr"), ("min_lr", "min_lr"), ("adam_eps", "eps")):
        stated = statement.scheduler.get(name) or statement.in_all_groups(name)
        if stated is not None:
            yield argument, float(stated.exact)
    style, first, last = (statement.scheduler.get(name) for name in ("wd_incr_style", "start_wd", "end_wd"))
    if first is not None and last is not None:
        if style is None or style.value == "constant":
            yield "weight_decay", float(last.exact)
        else:
            yield from (
                ("weight_decay_incr_style", str(style.value)),
                ("start_weight_decay", float(first.exact)),
                ("end_weight_decay", float(last.exact)),
            )
    if "lr_decay_style" in statement.scheduler:
        yield "lr_decay_style", str(statement.scheduler["lr_decay_style"].value)


def _counts(statement: Statement, batch: Argument, *, samples: bool, fraction: bool) -> Iterator[tuple[str, Argument]]:
    unit = 1 if samples else batch
    for name, argument in _COUNTS.items():
        stated = statement.scheduler.get(name)
        if stated is None or not isinstance(unit, int) or (fraction and argument == "lr_warmup"):
            continue
        count = float(stated.exact) / unit
        if count == int(count):
            yield f"{argument}_{'samples' if samples else 'iters'}", int(count)
