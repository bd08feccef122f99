"""Entries that a checkpoint does not hold, made from the training arguments that it does hold.

``--no-save-optim`` leaves out the parameter groups and the scheduler, ``--no-save-rng`` the random states.  A conversion
sets iteration and samples in all of them, so values at the start of the run will do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import cast

from ckpt2pt.core.layout import Parameter
from ckpt2pt.errors import FormatError, UsageError, ref
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.ptmeta.arguments import integer
from ckpt2pt.formats.ptmeta.gpt import Argument
from ckpt2pt.formats.ptmeta.rng import rng_state
from ckpt2pt.formats.ptmeta.schedule import param_groups, scheduler
from ckpt2pt.formats.torchfile.trees import Value

SYNTHESIZED: Mapping[str, tuple[str, str]] = {
    "optimizer": ("optimizer.param_groups", "by the rules of Adam in Megatron-LM 0.6 and the checkpoint's arguments"),
    "scheduler": ("opt_param_scheduler", "worked out from the checkpoint's arguments"),
    "rng": ("rng_state", "as at the start of a run with the checkpoint's seed"),
}
"""What ``pt-meta --synthesize`` takes: the entry that it makes, and what that rests on."""


def synthesize_entries(
    template: Template, parts: Collection[str], parameters: Iterable[Parameter], *, tp: int, pp: int
) -> tuple[dict[str, Value], dict[str, bytes]]:
    """The entries of a model file that ``parts`` name, and the storages of their tensors.

    ``parameters`` are those of all chunks in order of registration.  Raises :class:`FormatError` when the arguments do not
    tell what is needed.
    """
    args = cast("Mapping[str, Argument]", template.args)
    made: dict[str, Value] = {}
    storages: dict[str, bytes] = {}
    try:
        samples, iteration = args.get("consumed_train_samples"), template.tree.get("iteration")
        state = (
            scheduler(args, samples if type(samples) is int else 0) if {"optimizer", "scheduler"} & set(parts) else {}
        )
        if "optimizer" in parts:
            step = iteration if type(iteration) is int else 0
            made["optimizer"] = {"optimizer": {"param_groups": param_groups(args, state, parameters, step=step)}}
        if "scheduler" in parts:
            made["opt_param_scheduler"] = dict(state.items())
        if "rng" in parts:
            made["rng_state"], storages = rng_state(integer(args, "seed"), tp=tp, pp=pp)
    except UsageError as error:
        raise FormatError(
            f"the arguments do not give what {ref('synthesize')} needs: {error.what}",
            where=template.where,
            hint="make pt_meta from a checkpoint that holds these entries, or from a description",
        ) from error
    return made, storages
