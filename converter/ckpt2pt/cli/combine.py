"""Flags of ``combine``, those of the reference's combine_ckpt_dp_zero.py and a few of ours."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt2pt.cli.options import add_stage_option
from ckpt2pt.errors import UsageError
from ckpt2pt.io.flags import path

if TYPE_CHECKING:
    from ckpt2pt.discover.request import Request
    from ckpt2pt.run.combine import Section


def add_combine_options(parser: argparse.ArgumentParser) -> None:
    """Where, what and how; spelled and preset as the reference does."""
    parser.add_argument(
        "--strategy-dir", type=path, default=Path("output/opt_shard_info"), help="the opt_shard_info folder"
    )
    parser.add_argument(
        "--checkpoint-dir", type=path, default=Path("output"), help="training output with rank_R or iter_* folders"
    )
    parser.add_argument("--output-dir", type=path, default=Path("output"), help="folder that gets the merged files")
    parser.add_argument("--src-format", choices=("ckpt", "safetensors"), default="ckpt", help="format of the shards")
    parser.add_argument("--dst-format", choices=("ckpt", "safetensors"), default="ckpt", help="format to write")
    parser.add_argument(
        "--copy-to-all-dp-ranks", action="store_true", help="write the merged file for every rank of its group"
    )
    parser.add_argument(
        "--max-proccess-limit",
        "--max-process-limit",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="files merged at a time",
    )
    parser.add_argument(
        "--rank-section",
        type=int,
        nargs=2,
        metavar=("FIRST", "STOP"),
        help="merge only the groups whose first rank is FIRST or more and less than STOP",
    )
    add_stage_option(parser, "merge only this group, counted from 0 in the order of first ranks")
    parser.add_argument(
        "--no-save-optim",
        action="store_true",
        help="leave out the moments, the learning rate, the weight decay and the counters of steps",
    )
    parser.add_argument(
        "--verify",
        choices=("none", "digest"),
        help="digest: read every file back from the disk; given, it reads again what an earlier run merged; default digest",
    )
    parser.add_argument("--crc", action="store_true", help="add mindspore's checksum (.ckpt only)")
    parser.add_argument("--multiprocess-off", action="store_true", help="merge file after file in this process")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace merged files of this command that differ; never what it did not write",
    )


def request_of(options: argparse.Namespace) -> tuple[Request, Section]:
    """The request that the flags describe, and which groups are to be merged; only names of folders are read."""
    from ckpt2pt.core.topology import Topology  # noqa: PLC0415
    from ckpt2pt.discover.merged import groups_of  # noqa: PLC0415
    from ckpt2pt.discover.request import MindSporeFiles, Request  # noqa: PLC0415

    if options.max_proccess_limit < 1:
        raise UsageError(
            f"--max-proccess-limit is {options.max_proccess_limit}", where="the command line", hint="give 1 or more"
        )
    if options.crc and options.dst_format != "ckpt":
        raise UsageError(
            "--crc with --dst-format safetensors: mindspore cannot save that beside bfloat16, and its training refuses it",
            where="the command line",
            hint="leave --crc out, or write .ckpt",
        )
    section = options.rank_section
    if section and not 0 <= section[0] < section[1]:
        raise UsageError(
            f"--rank-section is {section[0]} {section[1]}",
            where="the command line",
            hint="give the first rank and the one after the last, as 0 8",
        )
    layout = groups_of(options.checkpoint_dir, options.strategy_dir)
    groups = layout.tensor * layout.pipeline
    request = Request(
        topology=Topology(num_layers=groups, pipeline=groups, data=layout.data),  # each group is a stage of its own
        source=options.checkpoint_dir,
        metadata=None,
        target=options.output_dir,
        files=MindSporeFiles(
            format=options.dst_format, copies=options.copy_to_all_dp_ranks, crc=options.crc, merged=True
        ),
        full=not options.no_save_optim,
        source_format=options.src_format,
        shard_info=options.strategy_dir,
        overwrite=options.overwrite,
        verify=options.verify or "digest",
        reread=options.verify == "digest",
        workers=options.max_proccess_limit,
        in_process=options.multiprocess_off,
    )
    return request, (section[0], section[1]) if section else None
