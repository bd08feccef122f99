"""Flags of ``ckpt2pt import``, spelled as the reference's convert_pt2ckpt spells them, and the request they make."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ckpt2pt.errors import UsageError
from ckpt2pt.flags import add_target_sizes, check_numbers, counts, joined, path, target_sizes

if TYPE_CHECKING:
    from ckpt2pt.back.request import BackRequest


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """The reference's flags, and ours; what is left out is learnt from the checkpoint."""
    group = parser.add_argument_group("where")
    group.add_argument(
        "--megatron-path",
        type=path,
        required=True,
        help="Megatron checkpoint: the folder with iter_*, or one iteration",
    )
    group.add_argument("--ms-path", type=path, required=True, help="folder that gets rank_R and pt_meta")
    group.add_argument(
        "--param-map-path",
        type=path,
        help="folder of param_map_*.json; default: computed, and proved by the checkpoint",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace another import's result, once the new one is complete (room for both is needed); never what ckpt2pt did not write",
    )
    group = parser.add_argument_group("what")
    group.add_argument("--convert-param-only", action="store_true", help="weights of model_optim_rng.pt alone")
    group.add_argument(
        "--dist-opt-content",
        nargs="+",
        choices=("param", "exp_avg", "exp_avg_sq"),
        default=["param", "exp_avg", "exp_avg_sq"],
        help="what to take of distrib_optim.pt",
    )
    group.add_argument("--file-prefix", default="network", help="name of the files without their suffix")
    group.add_argument("--format", choices=("ckpt", "safetensors"), default="ckpt", help="format of the files")
    group.add_argument(
        "--generate-all-dp-cp",
        action="store_true",
        help="a file for every data- and context-parallel rank, not the first alone",
    )
    group = parser.add_argument_group("model and parallel layout")
    group.add_argument("--num-layers", type=int, help="layers, no-op layers included; default: as the checkpoint says")
    group.add_argument("--tp-size", type=int, help="tensor parallel size; default: as the checkpoint says")
    group.add_argument("--pp-size", type=int, help="pipeline parallel size; default: as the checkpoint says")
    group.add_argument("--vpp-size", type=int, help="model chunks of each stage; default: as the checkpoint says")
    add_target_sizes(group, "of the MindSpore training; default: the checkpoint's")
    group.add_argument("--dp-size", type=int, default=1, help="data parallel size of the MindSpore training to come")
    group.add_argument("--cp-size", type=int, default=1, help="context parallel size of the MindSpore training to come")
    group.add_argument(
        "--parallel-init-order",
        default="tp-cp-ep-dp-pp",
        help="order in which ranks are counted; there is only tp-cp-ep-dp-pp",
    )
    group.add_argument(
        "--stage-list", type=counts, nargs="+", metavar="N", help="layers of each stage (of each chunk); default: even"
    )
    group.add_argument(
        "--noop", type=int, nargs="*", metavar="LAYER", help="no-op layers; default: those without parameters"
    )
    group.add_argument("--rules", help="rule file (YAML) for names of your own, or the rules themselves as JSON")
    _add_import_run(parser)


def _add_import_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument("--process-limit", type=int, default=4, metavar="N", help="ranks imported at a time")
    group.add_argument("--multiprocess-off", action="store_true", help="import rank after rank in this process")
    group.add_argument(
        "--process_timeout",
        "--process-timeout",
        type=float,
        metavar="SECONDS",
        help="give up on a rank after this long, with exit code 75",
    )
    group.add_argument(
        "--verify",
        choices=("none", "digest", "full"),
        default="digest",
        help="digest: read every file back from the disk; full: also compare every element with the checkpoint, before a file is published",
    )
    group.add_argument(
        "--debug", action="store_true", help="log ranks, files and evidence, and where in the code an error arose"
    )


def import_request_of(options: argparse.Namespace) -> BackRequest:
    """The frozen request that the flags of ``import`` describe."""
    from ckpt2pt.back.request import BackRequest  # noqa: PLC0415
    from ckpt2pt.ckpt.filenames import is_passed_by, rank_of_name  # noqa: PLC0415
    from ckpt2pt.request import Pace, rules_of  # noqa: PLC0415

    check_numbers(
        {
            "--process-limit": options.process_limit,
            "--process_timeout": options.process_timeout,
            **target_sizes(options),
        }
    )
    if options.parallel_init_order != "tp-cp-ep-dp-pp":
        raise UsageError(
            f"--parallel-init-order is {options.parallel_init_order}",
            where="the command line",
            hint="MindSpeed-Core-MS counts its ranks tp-cp-ep-dp-pp; leave the flag out",
        )
    prefix: str = options.file_prefix
    if not prefix or prefix.startswith(".") or "/" in prefix:
        raise UsageError(f"--file-prefix is {prefix!r}", where="the command line", hint="give a plain file name")
    if is_passed_by(f"{prefix}.{options.format}"):
        raise UsageError(
            f"--file-prefix is {prefix!r}: convert passes by {prefix}.{options.format}, which is no checkpoint by its name",
            where="the command line",
            hint="give another name, such as network; not that of a strategy, a breakpoint or a best checkpoint",
        )
    if rank_of_name(f"{prefix}.{options.format}"):
        raise UsageError(
            f"--file-prefix is {prefix!r}, which names a rank, and every rank's file gets this name",
            where="the command line",
            hint="give another name, such as network",
        )
    return BackRequest(
        source=options.megatron_path,
        target=options.ms_path,
        maps=options.param_map_path,
        num_layers=options.num_layers,
        tensor=options.tp_size,
        pipeline=options.pp_size,
        virtual=options.vpp_size,
        target_tensor=options.target_tp_size,
        target_pipeline=options.target_pp_size,
        target_virtual=options.target_vpp_size,
        data=options.dp_size,
        context=options.cp_size,
        noop=None if options.noop is None else frozenset(options.noop),
        layers_per_stage=joined(options.stage_list) or None,
        full=not options.convert_param_only,
        contents=tuple(dict.fromkeys(options.dist_opt_content)),
        prefix=prefix,
        format=options.format,
        copies=options.generate_all_dp_cp,
        rules=rules_of(options.rules),
        overwrite=options.overwrite,
        verify=options.verify,
        pace=Pace(workers=options.process_limit, in_process=options.multiprocess_off, timeout=options.process_timeout),
    )
