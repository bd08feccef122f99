"""Flags of ``ckpt2pt submit`` and of ``kubectl ckpt2pt``."""

from __future__ import annotations

import argparse

from ckpt2pt.io.flags import path, seconds


def add_submit_options(parser: argparse.ArgumentParser) -> None:
    """What is submitted, under which name, and whether its end is waited for."""
    group = parser.add_argument_group("what")
    group.add_argument(
        "-f", "--filename", type=path, required=True, help="the CheckpointConversion, or a template of one"
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="set a field, as spec.source.path=run7 (repeat)",
    )
    group.add_argument(
        "--name", help="its name; default that of the document, with --epoch and --step one made from them"
    )
    group.add_argument(
        "--run",
        dest="training",
        metavar="NAME",
        help="name of the training, for ${name} and the name made from it; default the document's",
    )
    group.add_argument("--uid", help="uid of the training, for ${uid}")
    for fact in ("epoch", "step", "iteration"):
        group.add_argument(f"--{fact}", type=int, help=f"{fact} of the checkpoint, for ${{{fact}}}")
    group.add_argument("--print", action="store_true", help="print the finished document and submit nothing")
    group = parser.add_argument_group("when")
    group.add_argument(
        "--ready-in",
        type=path,
        metavar="DIR",
        help="first see that every rank has saved into this training output; gives --epoch and --step when they are not given",
    )
    group.add_argument(
        "--readiness-timeout",
        type=seconds,
        default=300.0,
        metavar="SECONDS",
        help="how long to wait for that (with --ready-in)",
    )
    group.add_argument("--wait", action="store_true", help="follow it, and end with its own exit code")
    group.add_argument("--wait-timeout", type=seconds, metavar="SECONDS", help="follow it no longer than this")
    add_cluster_options(parser)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Which cluster, and which namespace."""
    group = parser.add_argument_group("where")
    group.add_argument("-n", "--namespace", help="namespace; default the document's, the kubeconfig's or this pod's")
    group.add_argument("--kubeconfig", type=path, help="kubeconfig; default as kubectl, in a pod its service account")
    group.add_argument("--context", help="context of the kubeconfig")
    group.add_argument(
        "--request-timeout",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to try to reach the API server",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        choices=("text", "json", "name"),
        default="text",
        help="form of the result on stdout; name: that alone",
    )
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="form of logs and errors on stderr"
    )


def add_target_options(parser: argparse.ArgumentParser, *, stage: bool = False, wait: bool = False) -> None:
    """One CheckpointConversion that is there."""
    parser.add_argument("name", metavar="NAME", help="the CheckpointConversion")
    if stage:
        parser.add_argument("stage", metavar="STAGE", type=int, help="pipeline stage")
    if wait:
        parser.add_argument("--wait-timeout", type=seconds, metavar="SECONDS", help="follow it no longer than this")
    add_cluster_options(parser)
