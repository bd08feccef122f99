"""What a checkpoint holds that is no tensor, from what it states itself and from a ``pt_meta``, as plain values."""

from __future__ import annotations

from typing import cast

from ckpt2pt.core.state import State, plain_values
from ckpt2pt.formats.architecture import check_architecture
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.megatron.payload import Template


def state_of(checkpoint: Checkpoint, given: Template | None, *, iteration: int | None, zero_samples: bool) -> State:
    """The state of a checkpoint; ``given`` is metadata that takes the place of its own.

    What a MindSpore file states of optimizer and scheduler counts more than what the metadata says.
    Raises :class:`FormatError` for metadata of another model.
    """
    template = given or checkpoint.template
    args = plain_values(cast("dict[str, object]", template.args)) if template else {}
    where = template.where if template else str(checkpoint.path)
    check_architecture(args, checkpoint.index, where=where, source=str(checkpoint.path))
    step = iteration or checkpoint.iteration or 0
    samples = checkpoint.samples
    if samples is None and template and template.global_batch_size:
        samples = step * template.global_batch_size
    carried = template.carried(checkpoint.statement) if template else None
    groups = zip(template.groups, carried.groups, strict=True) if template and carried else ()
    own = None if given or not template or not template.groups else template.groups[0].get("step")
    return State(
        where=where,
        iteration=step,
        samples=0 if zero_samples else samples,
        step=own if type(own) is int else step,
        args=args,
        groups=tuple(plain_values({**group, **more}) for group, more in groups),
        scheduler=plain_values(
            {**template.scheduler, **carried.scheduler, **({} if samples is None else {"num_steps": samples})}
        )
        if template and carried
        else {},
    )
