"""``kubectl ckpt2pt``: CheckpointConversions on the cluster, as a plugin of kubectl."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ckpt2pt.cli import main, on_the_cluster
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
