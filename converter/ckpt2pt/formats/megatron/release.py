"""Which release of Megatron-LM wrote a rank, as far as its files tell.  Pure."""

from __future__ import annotations

from itertools import pairwise

from ckpt2pt.formats.megatron.headers import MegatronRank

_SINCE = (
    ("0.7", "ddp_bucket_size"),
    ("0.9", "ckpt_format"),
    ("0.10", "num_distributed_optimizer_instances"),
    ("0.11", "rerun_mode"),
    ("0.12", "ddp_num_buckets"),
    ("0.13", "pipeline_model_parallel_layout"),
    ("0.15", "dist_ckpt_optim_fully_reshardable"),
    ("0.19", "mtp_detach_heads"),
)
"""The release that has an argument first (Megatron-LM, megatron/training/arguments.py of core_v0.6.0 to core_v0.19.0)."""


def written_by(rank: MegatronRank) -> str:
    """``0.13 or 0.14, by its arguments``; a converter may have left arguments out, and then the form of the files tells less."""
    args = rank.template.args
    known = [release for release, name in _SINCE if name in args]
    if known:
        following = dict(pairwise(release for release, _ in _SINCE)).get(known[-1])
        return f"{_between(known[-1], following)}, by its arguments"
    if rank.coalesced or rank.core_names:
        what = "its optimizer" if rank.coalesced else "the names of its parameters"
        return f"0.7 or newer, by {what}"
    return "0.6" if rank.buffers else "0.6 to 0.17, by the names of its parameters"


def _between(first: str, following: str | None) -> str:
    """The releases from ``first`` on that come before ``following``."""
    if following is None:
        return f"{first} or newer"
    last = f"0.{int(following.partition('.')[2]) - 1}"
    return first if last == first else f"{first} to {last}"


def optimizer_form(rank: MegatronRank) -> str:
    """What of the optimizer a rank has, in the user's words."""
    if rank.buffers is not None:
        return "coalesced buffers, as since 0.7" if rank.coalesced else "lists of buckets, as in 0.6"
    return "tensors in the model file" if rank.has_plain_optimizer else "none"
