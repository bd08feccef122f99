"""Flags of ``ckpt2pt import``, spelled as the reference's convert_pt2ckpt spells them: a conversion with its defaults."""

from __future__ import annotations

import argparse

from ckpt2pt.cli.options import (
    add_mindspore_files,
    add_readiness_options,
    add_run_options,
    add_stage_option,
    add_worker_options,
)
from ckpt2pt.io.flags import add_target_sizes, counts, path


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """The reference's flags, and ours; what is left out is learnt from the checkpoint."""
    _add_places(parser)
    group = parser.add_argument_group("what")
    group.add_argument("--convert-param-only", action="store_true", help="weights of model_optim_rng.pt alone")
    group.add_argument(
        "--iteration", type=int, help="which iteration to import; default the one that the tracker names"
    )
    add_stage_option(group, "import only this pipeline stage of the result")
    add_mindspore_files(group)
    _add_cut(parser)
    parser.add_argument(
        "--debug", action="store_true", help="log ranks, files and evidence, and where in the code an error arose"
    )
    add_run_options(parser)
    add_readiness_options(parser)
    add_worker_options(parser)
    parser.set_defaults(
        target_format="mindspore",
        source=None,
        target=None,
        source_format="megatron",
        opt_shard_info_path=None,
        target_dp_size=None,
        zero_consumed_samples=False,
    )


def _add_places(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where")
    group.add_argument(
        "--megatron-path",
        "--source",
        type=path,
        required=True,
        help="Megatron checkpoint: the folder with iter_*, or one iteration",
    )
    group.add_argument("--ms-path", "--target", type=path, required=True, help="folder that gets rank_R and pt_meta")
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


def _add_cut(parser: argparse.ArgumentParser) -> None:
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
        choices=("tp-cp-ep-dp-pp",),
        default="tp-cp-ep-dp-pp",
        help="order in which ranks are counted, that of MindSpeed-Core-MS",
    )
    group.add_argument(
        "--stage-list", type=counts, nargs="+", metavar="N", help="layers of each stage (of each chunk); default: even"
    )
    group.add_argument(
        "--noop", type=int, nargs="*", metavar="LAYER", help="no-op layers; default: those without parameters"
    )
    group.add_argument("--rules", help="rule file (YAML) for names of your own, or the rules themselves as JSON")
