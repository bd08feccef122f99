"""Flags of ``ckpt2pt pt-meta``, and what they make."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from ckpt2pt.errors import UsageError
from ckpt2pt.io.flags import add_target_sizes, check_numbers, counts, path, target_sizes

if TYPE_CHECKING:
    from ckpt2pt.core.names import Rules
    from ckpt2pt.core.progress import Reporter
    from ckpt2pt.formats.ptmeta.make import Made

log = logging.getLogger("ckpt2pt")


def add_pt_meta_options(parser: argparse.ArgumentParser) -> None:
    """One of three sources, and the folder."""
    parser.add_argument(
        "--param-map-path", type=path, required=True, help="the pt_meta folder to be made (spec.metadata.path)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace metadata of this command that differs; never what it did not write",
    )
    parser.add_argument(
        "--target-dp-size",
        type=int,
        metavar="N",
        help="data x context parallel size of the Megatron run to come; default that of the source",
    )
    parser.add_argument(
        "--bucket-size",
        type=int,
        metavar="N",
        help="elements of a bucket in a Megatron that was changed (default 40000000, or what distrib_optim.pt shows)",
    )
    parser.add_argument("--rules", help="rule file (YAML) for names of your own, or the rules themselves as JSON")
    first = parser.add_argument_group("from a checkpoint of the same model by Megatron-LM 0.6 (one step is enough)")
    first.add_argument("--megatron-path", type=path, help="folder with iter_*, or one iteration of it")
    first.add_argument(
        "--compare",
        choices=("full", "sizes"),
        default="full",
        help="full: compare every weight with its slice of distrib_optim.pt; sizes: only the sizes of buckets",
    )
    first.add_argument(
        "--synthesize",
        nargs="+",
        choices=("optimizer", "scheduler", "rng"),
        default=[],
        help="make these from the checkpoint's arguments where it was saved without them (--no-save-optim, --no-save-rng)",
    )
    _add_from_pt_meta(parser)
    _add_from_description(parser)


def _add_from_pt_meta(parser: argparse.ArgumentParser) -> None:
    third = parser.add_argument_group("from the pt_meta of another parallel layout")
    third.add_argument("--from-pt-meta", type=path, help="pt_meta of the same run in another layout")
    add_target_sizes(third, "of the new layout; default as it was")
    third.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="tokens of the vocabulary before padding, where the arguments do not say it",
    )


def _add_from_description(parser: argparse.ArgumentParser) -> None:
    second = parser.add_argument_group("from a description and the MindSpore checkpoint")
    second.add_argument(
        "--description", type=path, help="Megatron's arguments: a YAML mapping, or the script that starts the training"
    )
    second.add_argument("--ms-path", type=path, help="MindSpore training output with rank_R folders")
    second.add_argument(
        "--opt-shard-info-path", type=path, help="opt_shard_info folder of a training with data-parallel shards"
    )
    second.add_argument("--dp-size", type=int, default=1, help="data parallel size of the MindSpore training")
    second.add_argument("--cp-size", type=int, default=1, help="context parallel size of the MindSpore training")
    second.add_argument("--noop", type=int, nargs="*", default=[], metavar="LAYER", help="no-op layers")
    second.add_argument(
        "--stage-list", type=counts, metavar="N,N,..", help="layers of each stage (of each chunk) where they are uneven"
    )
    second.add_argument("--details", action="store_true", help="list every assumed argument instead of counting them")
    second.add_argument(
        "--accept-assumptions", action="store_true", help="write, after the listed assumptions have been checked"
    )


_DEFAULTS: dict[str, object] = {
    "compare": "full",
    "synthesize": [],
    "ms_path": None,
    "opt_shard_info_path": None,
    "dp_size": 1,
    "cp_size": 1,
    "noop": [],
    "stage_list": None,
    "details": False,
    "accept_assumptions": False,
    "vocab_size": None,
    **dict.fromkeys(("target_tp_size", "target_pp_size", "target_vpp_size")),
}
"""Flags that not every source heeds, with their defaults."""

_LAYERS = {"noop", "stage_list"}
_HEEDED = {
    "megatron_path": {"compare", "synthesize"},
    "description": {"ms_path", "opt_shard_info_path", "dp_size", "cp_size", "details", "accept_assumptions", *_LAYERS},
    "from_pt_meta": {"vocab_size", "target_tp_size", "target_pp_size", "target_vpp_size", *_LAYERS},
}


def _tell_unused(options: argparse.Namespace) -> None:
    source = next(name for name in _HEEDED if getattr(options, name))
    given = [name for name in _DEFAULTS.keys() - _HEEDED[source] if getattr(options, name) != _DEFAULTS[name]]
    flags = [f"--{name.replace('_', '-')}" for name in _DEFAULTS if name in given]
    if flags:
        log.warning("with --%s nothing is made of %s", source.replace("_", "-"), ", ".join(flags))


def make_pt_meta(options: argparse.Namespace, reporter: Reporter) -> Made:
    """Carry out ``pt-meta``."""
    from ckpt2pt.discover.request import rules_of  # noqa: PLC0415
    from ckpt2pt.formats.ptmeta.make import from_checkpoint, from_description  # noqa: PLC0415
    from ckpt2pt.formats.ptmeta.synthesize import Wanted  # noqa: PLC0415

    check_numbers(
        {
            "--target-dp-size": options.target_dp_size,
            "--bucket-size": options.bucket_size,
            "--dp-size": options.dp_size,
            "--cp-size": options.cp_size,
            **target_sizes(options),
            "--vocab-size": options.vocab_size,
        }
    )
    if [options.megatron_path, options.description, options.from_pt_meta].count(None) != 2:
        raise UsageError(
            "one source is needed",
            where="ckpt2pt pt-meta",
            hint="give --megatron-path, a checkpoint that Megatron wrote, or --description with --ms-path, or --from-pt-meta",
        )
    _tell_unused(options)
    rules = rules_of(options.rules)
    if options.from_pt_meta:
        return _from_pt_meta(options, rules)
    if options.megatron_path:
        return from_checkpoint(
            options.megatron_path,
            options.param_map_path,
            target_data=options.target_dp_size,
            bucket_size=options.bucket_size,
            compare=options.compare == "full",
            overwrite=options.overwrite,
            synthesize=tuple(options.synthesize),
            allow=rules.pickle_globals,
            reporter=reporter,
        )
    if options.ms_path is None:
        raise UsageError("--ms-path is missing", where="the command line", hint="give --ms-path")
    wanted = Wanted(
        source=options.ms_path,
        data=options.dp_size,
        context=options.cp_size,
        target_data=options.target_dp_size,
        noop=frozenset(options.noop),
        layers_per_stage=options.stage_list,
        bucket_size=options.bucket_size,
        shard_info=options.opt_shard_info_path,
        rules=rules,
    )
    return from_description(
        options.description,
        options.param_map_path,
        wanted,
        accepted=options.accept_assumptions,
        overwrite=options.overwrite,
    )


def _from_pt_meta(options: argparse.Namespace, rules: Rules) -> Made:
    from ckpt2pt.formats.ptmeta.make import from_pt_meta  # noqa: PLC0415
    from ckpt2pt.formats.ptmeta.relayout import NewLayout  # noqa: PLC0415

    new = NewLayout(
        tensor=options.target_tp_size,
        pipeline=options.target_pp_size,
        virtual=options.target_vpp_size,
        data=options.target_dp_size,
        noop=frozenset(options.noop),
        layers_per_stage=options.stage_list,
        tokens=options.vocab_size,
        bucket_size=options.bucket_size,
    )
    return from_pt_meta(
        options.from_pt_meta, options.param_map_path, new, overwrite=options.overwrite, allow=rules.pickle_globals
    )
