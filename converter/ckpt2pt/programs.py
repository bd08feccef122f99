"""Programs beside ``ckpt2pt`` itself: the plugin of kubectl, and the reference's three scripts by their names.

convert_ckpt2pt.py         ckpt2pt convert
convert_pt2ckpt.py         ckpt2pt import
combine_ckpt_dp_zero.py    ckpt2pt combine

Flags and defaults of the scripts are those of MindSpeed-Core-MS feature-0.1 (mindspeed_ms/tools/converter); what they
require and ``pt_meta`` or the checkpoint says may be left out.  A failure has our exit code, where theirs is 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ckpt2pt.cli import build_alone, main, on_the_cluster
from ckpt2pt.cluster.flags import add_submit_options, add_target_options
from ckpt2pt.flags import Parser


def build_kubectl_parser() -> argparse.ArgumentParser:
    """The commands of ``kubectl ckpt2pt``."""
    parser = Parser(prog="kubectl ckpt2pt", description="CheckpointConversions on the cluster.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=on_the_cluster(name))
        return sub

    add_submit_options(add("submit", "make a CheckpointConversion, exactly once"))
    add_target_options(add("watch", "follow one to its end, and end with its exit code"), wait=True)
    add_target_options(add("retry", "try its failed stages again"))
    add_target_options(add("cancel", "stop it; what is finished stays"))
    add_target_options(add("logs", "what the newest worker of a stage has written"), stage=True)
    return parser


def kubectl(argv: Sequence[str] | None = None) -> int:
    """``kubectl ckpt2pt``: kubectl runs the ``kubectl-ckpt2pt`` that it finds on the PATH."""
    return main(argv, build_kubectl_parser)


def convert_ckpt2pt(argv: Sequence[str] | None = None) -> int:
    """``convert_ckpt2pt.py``: of two formats in one folder the reference takes ``.ckpt``, unless it is told otherwise."""

    def build() -> argparse.ArgumentParser:
        parser = build_alone("convert", "convert_ckpt2pt.py")
        parser.set_defaults(src_model_format="ckpt")
        return parser

    return main(argv, build)


def convert_pt2ckpt(argv: Sequence[str] | None = None) -> int:
    """``convert_pt2ckpt.py``."""
    return main(argv, lambda: build_alone("import", "convert_pt2ckpt.py"))


def combine_ckpt_dp_zero(argv: Sequence[str] | None = None) -> int:
    """``combine_ckpt_dp_zero.py``."""
    return main(argv, lambda: build_alone("combine", "combine_ckpt_dp_zero.py"))
