"""Where what is no tensor of a result for Megatron-LM 0.6 or MindSpore is from, and which releases load it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ckpt2pt.core.topology import Rank
from ckpt2pt.discover.checkpoint import Discovered, kind_of
from ckpt2pt.discover.metadata import assumptions
from ckpt2pt.discover.request import Request
from ckpt2pt.formats.megatron.loads import Releases, torch_loads
from ckpt2pt.formats.megatron.order import Style
from ckpt2pt.formats.mindspore import facts_of as numbers_of
from ckpt2pt.formats.mindspore import index_file

MINDSPORE: Releases = {
    "MindSpeed-Core-MS feature-0.1": "yes, at the same parallel sizes",
    "Megatron-LM 0.6 to 0.19": "no: they read no MindSpore files",
}
"""By the names and folders that mindspeed_ms/training/training.py reads; results equal those of its own converter."""
_WEIGHTS_IN_0_6 = {"0.6": "yes, with --no-load-optim --no-load-rng"}


def releases_of(request: Request) -> Releases:
    """Who loads the result, and why others do not."""
    if request.files:
        return MINDSPORE
    legacy = Style(names="legacy")
    own = {} if request.full else _WEIGHTS_IN_0_6
    return {**own, **torch_loads(legacy, full=request.full, coalesced=False, aligned=False)}


def facts_of(request: Request, chosen: Discovered, rank: Rank, kept: Collection[str]) -> Mapping[str, str]:
    """What is no tensor -> where it is from: the checkpoint, metadata beside it, an option, or nobody.

    ``rank`` is one of those that are planned, ``kept`` are entries of metadata of another iteration.
    """
    own, step = "the checkpoint", chosen.training_step
    where = own if request.metadata is None else f"{request.metadata.name}, the metadata"
    stated = kind_of(request).stated(request, chosen, rank)
    samples = own
    if request.reference_samples or step.samples is None:
        samples = "0, as asked for" if request.reference_samples else "0, as nothing states them"
    elif not request.from_megatron and not _counts_samples(chosen):
        samples = f"iteration x global_batch_size of {where}"
    found = {"iteration": step.iteration_source, "consumed samples": samples, "arguments": where}
    if request.full:
        over = f", with what {own} states" if request.metadata and (stated.groups or stated.scheduler) else ""
        found |= {"parameter groups": f"{where}{over}", "scheduler": f"{where}{over}"}
    if not request.files:
        found["random generators"] = where + (", of another iteration" if "rng_state" in kept else "")
    rests = assumptions(request) if request.metadata or request.from_megatron else {}
    return found | {what: why if isinstance(why, str) else "made, not stated" for what, why in rests.items()}


def _counts_samples(chosen: Discovered) -> bool:
    """Whether a MindSpore file holds the number of samples itself."""
    first = next(iter(chosen.files.values()))
    return numbers_of(index_file(first.path)).get("num_steps", 0) > 0
