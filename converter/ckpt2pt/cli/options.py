"""Flags of the commands, spelled as the reference converter spells them."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ckpt2pt.cli.unstated import add_huggingface, add_mindformers, add_mindformers_trainer
from ckpt2pt.io.flags import Group, add_target_sizes, count, counts, path, port, seconds


def add_conversion_options(
    parser: argparse.ArgumentParser, *, writes: bool = True, chosen: bool = True, lists: bool = False
) -> None:
    """What is converted: the reference's own flags, and ours; not ``chosen`` means every checkpoint, and all its stages.

    ``lists``: ``--names`` without a value lists every parameter.
    """
    parser.add_argument(
        "--spec",
        metavar="JSON",
        help="all of it in one, as a Job gives it: a document's spec, with folders of this machine",
    )
    _add_places(parser, writes=writes)
    _add_run_to_come(parser, lists=lists)
    add_huggingface(parser)
    _add_kind(parser, chosen=chosen)
    add_mindspore_files(parser.add_argument_group("files of a MindSpore result (--target-format mindspore)"))
    _add_cut(parser)


def _add_cut(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and parallel layout")
    group.add_argument(
        "--num-layers",
        type=int,
        help="layers, no-op layers included; default: as pt_meta says (spec.model.numLayers)",
    )
    for flag, what, field in (
        ("--tp-size", "tensor parallel size", "tensor"),
        ("--pp-size", "pipeline parallel size", "pipeline"),
        ("--vpp-size", "model chunks of each stage", "virtualPipeline"),
    ):
        group.add_argument(flag, type=int, help=f"{what}; default: as pt_meta says (spec.parallelism.{field})")
    add_target_sizes(group, "of the result, where it is another than that of the source (spec.target.parallelism.{})")
    group.add_argument(
        "--target-ep-size",
        type=int,
        metavar="N",
        help="expert parallel size of the Megatron run to come; default: that of the source (spec.target.parallelism.expert)",
    )
    group.add_argument(
        "--dp-size",
        type=int,
        help="data parallel size of the MindSpore training; default: as pt_meta says, if there are folders of so many ranks, else 1 (spec.parallelism.data)",
    )
    group.add_argument(
        "--cp-size",
        type=int,
        help="context parallel size of the MindSpore training; default: counted with --dp-size, else 1 (spec.parallelism.context)",
    )
    group.add_argument(
        "--noop",
        type=int,
        nargs="*",
        metavar="LAYER",
        help="no-op layers; each keeps its slot; default: those without parameters in pt_meta (spec.model.noopLayers)",
    )
    group.add_argument(
        "--stage-list",
        type=counts,
        nargs="+",
        metavar="N,N,..",
        help="layers of each stage where they are uneven; with --vpp-size of each chunk, all stages of chunk 0 first (spec.model.layersPerStage)",
    )
    group.add_argument(
        "--rules", help="rule file (YAML) for names of your own, or the rules themselves as JSON (spec.model.rules)"
    )


def _add_places(parser: argparse.ArgumentParser, *, writes: bool) -> None:
    group = parser.add_argument_group("where")
    group.add_argument(
        "--source",
        type=path,
        help="checkpoint to convert: a MindSpore training output with rank_R folders, or a Megatron checkpoint (spec.source.path)",
    )
    group.add_argument(
        "--ms-path", type=path, help="the same, of a MindSpore training, as the reference spells it (spec.source.path)"
    )
    group.add_argument(
        "--source-format",
        "--src-model-format",
        choices=("auto", "mindspore", "ckpt", "safetensors", "megatron", "msadapter", "mindformers", "huggingface"),
        default="auto",
        metavar="FORMAT",
        help="auto (what is there), mindspore (either of its two), ckpt, safetensors, megatron (torch or torch_dist), msadapter (MindSpeed-LLM on MindSpore), mindformers or huggingface (weights of transformers) (spec.source.format)",
    )
    add_mindformers(group)
    group.add_argument(
        "--opt-shard-info-path",
        type=path,
        help="opt_shard_info folder of a training with data-parallel shards; default the one in the source (spec.source.optShardInfoPath)",
    )
    group.add_argument(
        "--param-map-path",
        type=path,
        help="the pt_meta folder, for --target-format megatron and torch_dist also the launch script (or a YAML description) of the run to come; default for a Megatron source: what the checkpoint says itself (spec.metadata.path)",
    )
    group.add_argument(
        "--target",
        type=path,
        help="folder that gets iter_* and the tracker, or rank_R and pt_meta of MindSpore (spec.target.path)",
    )
    group.add_argument(
        "--megatron-path",
        type=path,
        help="the same for a Megatron result, as the reference spells it (spec.target.path)",
    )
    group.add_argument(
        "--target-format",
        choices=("megatron06", "megatron", "torch_dist", "mindspore", "torch", "safetensors", "mindformers"),
        default="megatron06",
        metavar="FORMAT",
        help="what to write: megatron06, megatron (the torch format of Megatron-LM 0.7 to 0.19), torch_dist (Megatron-LM 0.15 and newer, at any layout), mindspore, torch (what MSAdapter wrote, as torch would have saved it), safetensors (weights for Hugging Face transformers), mindformers (weights for MindFormers) (spec.target.format)",
    )
    add_mindformers_trainer(group)
    group.add_argument(
        "--target-dp-size",
        type=int,
        metavar="N",
        help="data x context parallel size of the Megatron run to come, for the padding of buckets; default that of pt_meta (spec.target.dataParallel)",
    )
    if writes:
        group.add_argument(
            "--overwrite",
            action="store_true",
            help="replace another conversion's result of the same iteration, which stays until the new one is complete: room for both "
            "is needed; what ckpt2pt did not write is never replaced (spec.target.overwrite)",
        )


MINDFORMERS = {
    "mindformers_config": "config",
    "use_interleaved_weight_layout_mlp": "interleaved",
    "use_contiguous_weight_layout_attention": "contiguous",
}
"""What nothing in a checkpoint of MindFormers tells: options, and what they are of its flags."""


def _add_run_to_come(parser: argparse.ArgumentParser, *, lists: bool) -> None:
    group = parser.add_argument_group("the run that loads it (--target-format megatron)")
    alone: dict[str, Any] = {"nargs": "?", "const": "list"} if lists else {}
    group.add_argument(
        "--names",
        choices=("auto", "mcore", "legacy", *(["list"] if lists else [])),
        default="auto",
        **alone,
        help="parameters of a result of --target-format megatron: mcore, or legacy for runs up to 0.17 with --use-legacy-models; default auto, as the metadata says, else mcore (spec.target.names)"
        + ("; without a value: list every parameter with both its names" if lists else ""),
    )
    group.add_argument(
        "--transformer-impl",
        choices=("auto", "local", "transformer_engine"),
        default="auto",
        help="the same flag of that run, which decides names and order; default auto, as the metadata says, else local (spec.target.transformerImpl)",
    )
    group.add_argument(
        "--megatron-version",
        metavar="0.N",
        help="release that loads it; decides something only where sizes are no multiples of 64; default 0.19 (spec.target.megatronVersion)",
    )


def _add_kind(parser: argparse.ArgumentParser, *, chosen: bool) -> None:
    group = parser.add_argument_group("what")
    group.add_argument(
        "--convert-param-only", action="store_true", help="weights without the optimizer (spec.mode ParamsOnly)"
    )
    group.add_argument(
        "--zero-consumed-samples",
        action="store_true",
        help="write consumed_train_samples 0 as the reference does (spec.target.zeroConsumedSamples)",
    )
    if not chosen:
        parser.set_defaults(iteration=None, stage=None)
        return
    group.add_argument(
        "--iteration",
        type=int,
        help="which checkpoint to convert; default the newest that all ranks have (spec.source.iteration)",
    )
    add_stage_option(group, "convert only this pipeline stage")


def add_stage_option(group: Group, identity_options: str) -> None:
    """Which stages are worked on."""
    group.add_argument(
        "--stage",
        type=int,
        action="append",
        metavar="K",
        help=f"{identity_options} (repeat); default $JOB_COMPLETION_INDEX, else all",
    )


def add_mindspore_files(group: Group) -> None:
    """How the files of a MindSpore result are written, as the reference's convert_pt2ckpt spells it."""
    group.add_argument(
        "--dist-opt-content",
        nargs="+",
        choices=("param", "exp_avg", "exp_avg_sq"),
        default=["param", "exp_avg", "exp_avg_sq"],
        help="what to take of distrib_optim.pt (spec.target.mindspore.contents)",
    )
    group.add_argument(
        "--file-prefix",
        default="network",
        help="name of the files without their suffix (spec.target.mindspore.prefix)",
    )
    group.add_argument(
        "--format",
        choices=("ckpt", "safetensors"),
        default="ckpt",
        help="format of the files (spec.target.mindspore.format)",
    )
    group.add_argument(
        "--generate-all-dp-cp",
        action="store_true",
        help="a file for every data- and context-parallel rank, not the first alone (spec.target.mindspore.allReplicas)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How it is carried out."""
    group = parser.add_argument_group("how")
    add_process_limit(group, "ranks converted at a time (spec.workers.processes)")
    group.add_argument("--multiprocess-off", action="store_true", help="convert rank after rank in this process")
    group.add_argument(
        "--process_timeout",
        "--process-timeout",
        type=float,
        metavar="SECONDS",
        help="give up on a rank after this long, with exit code 75 (spec.workers.rankTimeoutSeconds)",
    )
    group.add_argument(
        "--verify",
        choices=("none", "digest", "full"),
        help="digest: read every file back from the disk; full: also compare every element with the source; given, it reads again what an earlier run finished; default digest (spec.verify)",
    )


def add_process_limit(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,  # pyright: ignore[reportPrivateUsage]
    identity_options: str,
) -> None:
    """How many ranks at a time: the same for those that are converted and for those that are planned."""
    parser.add_argument(
        "--process-limit", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help=identity_options
    )


def add_watch_options(parser: argparse.ArgumentParser) -> None:
    """What is followed, and how."""
    group = parser.add_argument_group("following")
    group.add_argument(
        "-f",
        "--filename",
        type=path,
        metavar="FILE",
        help="take the conversion from this document instead of the flags",
    )
    group.add_argument(
        "--volume", action="append", default=[], metavar="NAME=DIR", help="local folder of a volume of the document"
    )
    group.add_argument(
        "--keep",
        type=count,
        metavar="N",
        help="keep the last N results; older ones of this conversion are removed, but never the tracker's; default all (spec.follow.keep)",
    )
    group.add_argument(
        "--interval",
        type=seconds,
        metavar="SECONDS",
        help="time between two looks at the training output; default 30 (spec.follow.intervalSeconds)",
    )
    group.add_argument(
        "--settle",
        type=seconds,
        metavar="SECONDS",
        help="a file that may be written to counts as whole when it has rested this long; default 10 (spec.readiness.settleSeconds)",
    )
    group.add_argument(
        "--readiness-timeout",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="with --once: first wait this long until every rank has saved the newest checkpoint; default 0",
    )
    group.add_argument("--once", action="store_true", help="look once, convert what is whole, and end")
    group.add_argument(
        "--allow-incomplete",
        "--forgive-broken-save",
        action="store_true",
        help="do not fail where the newest checkpoint is incomplete, as a training that was killed leaves it",
    )
    group.add_argument(
        "--stop-on-error",
        action="store_true",
        help="end with the first error instead of going on with the next checkpoint",
    )


def add_readiness_options(parser: argparse.ArgumentParser) -> None:
    """Whether to wait until a training has finished saving."""
    group = parser.add_argument_group("when")
    group.add_argument(
        "--readiness-timeout",
        type=seconds,
        default=0.0,
        metavar="SECONDS",
        help="first wait this long until every rank has saved the newest checkpoint, or that of --iteration; default 0, begin with what is there (spec.readiness.timeoutSeconds)",
    )
    group.add_argument(
        "--readiness-settle",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="a file that may be written to counts as whole when it has rested this long (spec.readiness.settleSeconds)",
    )


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """What a worker tells whoever started it; a Job sets these."""
    group = parser.add_argument_group("in a pod")
    group.add_argument(
        "--termination-log",
        type=path,
        metavar="FILE",
        help="write how it ended as one JSON object of at most 4096 bytes; default $CKPT2PT_TERMINATION_LOG",
    )
    group.add_argument(
        "--progress-port",
        type=port,
        default=0,
        metavar="PORT",
        help="serve /progress, /metrics and /healthz by HTTP while it runs; default 0, not at all",
    )


def add_output_options(parser: argparse.ArgumentParser, *, progress: bool = False) -> None:
    """What is printed, and how; with ``progress`` for what may take its time."""
    group = parser.add_argument_group("output")
    if progress:
        group.add_argument(
            "--progress",
            choices=("auto", "bar", "json", "none"),
            default="auto",
            help="auto: after a second, bars on a terminal that can draw them, JSON lines elsewhere",
        )
    group.add_argument("--output", choices=("text", "json"), default="text", help="form of the result on stdout")
    group.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="form of logs and errors on stderr"
    )


def add_inspect_options(inspect: argparse.ArgumentParser) -> None:
    """What is looked at."""
    inspect.add_argument(
        "path", type=path, help="a file, a rank folder, a training output, pt_meta or a Megatron folder"
    )
    inspect.add_argument("--details", action="store_true", help="list every tensor and rank; default: alike in a line")


def add_verify_options(verify: argparse.ArgumentParser) -> None:
    """What is proved or compared."""
    verify.add_argument(
        "paths",
        nargs="*",
        type=path,
        metavar="PATH",
        help="one result, to be proved by its own manifests; two checkpoints of any formats and parallel sizes, to be compared bit for bit, but that any NaN equals any other; none: prove a result against its source",
    )
    verify.add_argument(
        "--level",
        choices=("digest", "full"),
        default="full",
        help="digest: sizes and CRC-32 against the manifests; full: every element against the source",
    )
    verify.add_argument(
        "--reader",
        choices=("own", "torch"),
        default="own",
        help="read the result with our own reader or with real torch.load",
    )
    verify.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="LEAF",
        help="when comparing: a leaf such as /args/save to leave out; across formats or parallel sizes a pattern of role and name such as 'exp_avg/decoder.layers.7.*' (repeat)",
    )
    verify.add_argument(
        "--ignore-padding",
        action="store_true",
        help="when comparing: leave out the padding of buckets, which Megatron does not initialise, and across parallel sizes the rows by which one vocabulary is longer",
    )


def add_document_options(document: argparse.ArgumentParser) -> None:
    """Which document, and the folders that stand for its volumes."""
    document.add_argument("-f", "--filename", type=path, required=True, help="the CheckpointConversion (YAML or JSON)")
    document.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="folder that stands for a claim, an NFS export or a CSI volume of the document (repeat)",
    )
    document.add_argument("--print-job", action="store_true", help="print the Job that a cluster would get, and stop")
