"""The command lines of ``ckpt2pt``: every command with its options and its examples.  What a command does is in ``cli``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from ckpt2pt import __version__
from ckpt2pt.cli.combine import add_combine_options
from ckpt2pt.cli.imported import add_import_options
from ckpt2pt.cli.options import (
    add_conversion_options,
    add_document_options,
    add_inspect_options,
    add_output_options,
    add_process_limit,
    add_readiness_options,
    add_run_options,
    add_verify_options,
    add_watch_options,
    add_worker_options,
)
from ckpt2pt.cli.ptmeta import add_pt_meta_options
from ckpt2pt.errors import EXIT_CODES
from ckpt2pt.io.flags import Parser, examples
from ckpt2pt.kube.cluster.flags import add_submit_options

Command = Callable[[argparse.Namespace], int]
"""Carries out a command, and returns the exit code."""

PROGRAMS = ("ckpt2pt", "convert_ckpt2pt.py", "convert_pt2ckpt.py", "combine_ckpt_dp_zero.py")
SHELLS = ("bash", "zsh", "fish")

_CONVERSION = "--ms-path ms_ckpt --param-map-path pt_meta --megatron-path megatron_pt"
_EXAMPLES = {
    "convert": {
        "degrees and layers as pt_meta states them": _CONVERSION,
        "weights alone of iteration 500; then compare every element with the source":
            f"{_CONVERSION} --iteration 500 --convert-param-only --verify full",
        "a Megatron checkpoint for another tensor parallel size, optimizer included":
            "--source megatron_pt --target megatron_tp4 --target-tp-size 4",
        "degrees given, two ranks at a time": f"{_CONVERSION} --num-layers 64 --tp-size 8 --pp-size 4 --process-limit 2",
    },
    "plan": {
        "layers, files, bytes and memory": _CONVERSION,
        "every rank, and every parameter with both its names, of stage 0": f"{_CONVERSION} --stage 0 --details --names",
    },
    "watch": {
        "convert each new checkpoint, keep the last three results": f"{_CONVERSION} --keep 3",
        "convert what is complete now, and end": f"{_CONVERSION} --once",
        "as a document says": "-f conversion.yaml --volume training=/mnt/training",
    },
    "inspect": {
        "a training output, its pt_meta, or a result": "ms_ckpt",
        "every tensor of one file": "megatron_pt/iter_0000500/mp_rank_00/model_optim_rng.pt --details",
    },
    "verify": {
        "a result against its source, every element": _CONVERSION,
        "a copied result, by its own manifests": "megatron_pt",
        "two checkpoints of any formats and parallel sizes": "ms_ckpt megatron_pt --ignore-padding --ignore 'exp_avg*'",
    },
    "import": {
        "into a new folder, with its pt_meta": "--megatron-path megatron_pt --ms-path ms_again",
        "for a training with four data-parallel ranks, as .safetensors":
            "--megatron-path megatron_pt --ms-path ms_again --dp-size 4 --generate-all-dp-cp --format safetensors",
    },
    "combine": {
        "all shards of the newest step": "--checkpoint-dir output --strategy-dir output/opt_shard_info --output-dir merged",
        "weights alone, as .safetensors": "--checkpoint-dir output --output-dir merged --no-save-optim --dst-format safetensors",
    },
    "pt-meta": {
        "from one step of Megatron-LM": "--megatron-path one_step --param-map-path pt_meta",
        "from the script that starts the training": "--description pretrain_gpt.sh --ms-path ms_ckpt --param-map-path pt_meta",
        "once its assumptions have been checked":
            "--description pretrain_gpt.sh --ms-path ms_ckpt --param-map-path pt_meta --accept-assumptions",
        "for the same run on other parallel sizes":
            "--from-pt-meta pt_meta --param-map-path pt_meta_tp4 --target-tp-size 4 --target-pp-size 1",
    },
    "run": {
        "all stages here": "-f conversion.yaml --volume training=/mnt/training",
        "the Job that a cluster would get": "-f conversion.yaml --print-job",
    },
    "submit": {
        "and follow it to its end": "-f conversion.yaml --wait",
        "from a template, for step 500 of run7": "-f template.yaml --run run7 --step 500 --set spec.source.path=run7/ms_ckpt",
    },
    "completion": {
        'bash: write  eval "$(ckpt2pt completion bash)"  into ~/.bashrc': "bash",
        'zsh: write  eval "$(ckpt2pt completion zsh)"  into ~/.zshrc, after compinit': "zsh",
        "fish: write its output to ~/.config/fish/completions/ckpt2pt.fish": "fish",
    },
}  # fmt: skip
"""Real command lines by command; a test parses each."""

Add = Callable[[str, str], argparse.ArgumentParser]
"""Make a command of a name and a summary."""


def parser_of_all(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Every command and option of ``ckpt2pt``."""
    codes = "\n".join(f"  {code:3}  {identity_options}" for code, identity_options in EXIT_CODES.items())
    first = {"what would be done": f"plan {_CONVERSION}", "do it": f"convert {_CONVERSION}"}
    parser = Parser(
        prog="ckpt2pt",
        description="Convert training checkpoints between MindSpeed-Core-MS and Megatron-LM 0.6 to 0.19: exact, streaming, resumable, verified.",
        epilog=f"{examples('ckpt2pt', first)}\n\n`ckpt2pt COMMAND --help` shows the options and examples of a command.\n\nexit codes:\n{codes}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ckpt2pt {__version__}")
    found = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", parser_class=Parser
    )

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        epilog = examples(f"ckpt2pt {name}", _EXAMPLES[name])
        sub = found.add_parser(name, help=summary, description=summary, epilog=epilog, allow_abbrev=False)
        sub.set_defaults(run=commands[name])
        return sub

    _add_convert_commands(add)
    _add_inspect_commands(add)
    _add_import_commands(add)
    document = add("run", "carry out a CheckpointConversion document on this machine")
    add_document_options(document)
    add_output_options(document, progress=True)
    add_submit_options(add("submit", "make a CheckpointConversion on the cluster, exactly once"))
    shell = add("completion", "print the code by which a shell completes commands, options and paths")
    shell.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"the shell that reads it: {', '.join(SHELLS)}")
    shell.set_defaults(log_format="text")
    return parser


def parser_of_one(commands: Mapping[str, Command], command: str, program: str) -> argparse.ArgumentParser:
    """One command as a program of its own, with all its options."""
    found: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        epilog, about = examples(program, _EXAMPLES[name]), f"{summary} (ckpt2pt {name})"
        found[name] = Parser(prog=program, description=about, epilog=epilog, allow_abbrev=False)
        found[name].set_defaults(run=commands[name], command=name)
        return found[name]

    _add_convert_commands(add)
    _add_import_commands(add)
    return found[command]


def _add_convert_commands(add: Add) -> None:
    """From either framework."""
    convert = add("convert", "convert a MindSpore or Megatron checkpoint, to the parallel sizes asked for")
    add_conversion_options(convert)
    add_run_options(convert)
    add_readiness_options(convert)
    add_worker_options(convert)
    add_output_options(convert, progress=True)

    plan = add("plan", "print what convert would do; reads headers and a few bytes, writes nothing")
    add_conversion_options(plan, lists=True)
    shown = plan.add_argument_group("how")
    shown.add_argument(
        "--details", action="store_true", help="a line for every rank and file; default: equal ones in one line"
    )
    add_process_limit(shown, "workers to predict memory for (spec.workers.processes)")
    add_readiness_options(plan)
    add_worker_options(plan)
    add_output_options(plan)

    watch = add("watch", "convert each new checkpoint of a running training as it becomes whole")
    add_watch_options(watch)
    add_conversion_options(watch, chosen=False)
    add_run_options(watch)
    add_worker_options(watch)
    add_output_options(watch, progress=True)


def _add_inspect_commands(add: Add) -> None:
    """What there is, and whether it is right."""
    inspect = add("inspect", "show what a checkpoint holds: .ckpt, .safetensors, .pt or a whole directory")
    add_inspect_options(inspect)
    add_output_options(inspect)

    verify = add(
        "verify",
        "prove a result, against its source or by its own manifests, or compare two checkpoints element by element",
    )
    add_verify_options(verify)
    add_conversion_options(verify, writes=False)
    add_output_options(verify, progress=True)


def _add_import_commands(add: Add) -> None:
    """Megatron -> MindSpore, and what a conversion needs besides the checkpoint."""
    back = add("import", "import a Megatron checkpoint into MindSpore, with its pt_meta")
    add_import_options(back)
    add_output_options(back, progress=True)

    merge = add("combine", "merge data-parallel shards into .ckpt or .safetensors files")
    add_combine_options(merge)
    add_output_options(merge, progress=True)

    meta = add("pt-meta", "make pt_meta from a Megatron checkpoint, or from a description of the run")
    add_pt_meta_options(meta)
    add_output_options(meta, progress=True)
