"""``kubectl ckpt2pt``: CheckpointConversions on the cluster, as a plugin of kubectl."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ckpt2pt.cli.commands import main, on_the_cluster
from ckpt2pt.io.flags import Parser, examples
from ckpt2pt.kube.cluster.flags import add_submit_options, add_target_options

_EXAMPLES = {
    "submit": {
        "and follow it to its end": "-n training -f conversion.yaml --wait",
        "from a template, for step 500 of run7": "-f template.yaml --run run7 --step 500",
    },
    "watch": {"to its end": "run7-step-500 -n training", "for an hour at most": "run7-step-500 --wait-timeout 3600"},
    "retry": {"once the cause is gone": "run8-step-500", "of another cluster": "run8-step-500 --context staging"},
    "cancel": {"what is finished stays": "run8-step-500", "in a namespace": "run8-step-500 -n training"},
    "logs": {"of stage 1": "run8-step-500 1", "of stage 0, in a namespace": "run8-step-500 0 -n training"},
}


def build_kubectl_parser() -> argparse.ArgumentParser:
    """The commands of ``kubectl ckpt2pt``."""
    parser = Parser(prog="kubectl ckpt2pt", description="CheckpointConversions on the cluster.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        epilog = examples(f"kubectl ckpt2pt {name}", _EXAMPLES[name])
        sub = commands.add_parser(name, help=summary, description=summary, epilog=epilog, allow_abbrev=False)
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
