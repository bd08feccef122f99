"""Conversions to MindSpore as tests ask for them: by names of their own, for what a document says in its fields."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ckpt2pt.cli.combine import add_combine_options, request_of
from ckpt2pt.core.names import Rules
from ckpt2pt.discover.request import Request
from ckpt2pt.kube.conversion.schema import (
    CONTENTS,
    LEVELS,
    Degrees,
    MindSporeFiles,
    Model,
    Parallelism,
    Place,
    Processes,
    Source,
    Spec,
    Target,
    rules_of,
)
from ckpt2pt.kube.resolve import resolve
from ckpt2pt.run.combine import Combined, Section, combine
from ckpt2pt.run.conversion import Outcome, run
from conversions import Quiet


def import_spec(source: Path, target: Path, **more: Any) -> Spec:
    """``maps`` is the metadata, ``workers`` 0 is this process."""
    noop, contents = more.get("noop"), more.get("contents", tuple(CONTENTS))
    return Spec(
        mode="Full" if more.get("full", True) else "ParamsOnly",
        model=Model(
            num_layers=more.get("num_layers"),
            noop_layers=None if noop is None else tuple(sorted(noop)),
            layers_per_stage=more.get("layers_per_stage"),
            rules=rules_of(more.get("rules", Rules())),
        ),
        parallelism=Parallelism(
            tensor=more.get("tensor"),
            pipeline=more.get("pipeline"),
            virtual_pipeline=more.get("virtual"),
            data=more.get("data"),
            context=more.get("context"),
        ),
        source=Source(path=str(source), iteration=more.get("iteration"), format=more.get("source_format", "Auto")),
        metadata=Place(path=str(more.get("maps") or "")),
        target=Target(
            path=str(target),
            format="MindSpore",
            overwrite=more.get("overwrite", False),
            parallelism=Degrees(
                tensor=more.get("target_tensor"),
                pipeline=more.get("target_pipeline"),
                virtual_pipeline=more.get("target_virtual"),
            ),
            mindspore=MindSporeFiles(
                format="Safetensors" if more.get("format") == "safetensors" else "Ckpt",
                prefix=more.get("prefix", "network"),
                all_replicas=more.get("copies", False),
                contents=tuple(CONTENTS[kind] for kind in contents),
            ),
        ),
        verify=LEVELS[more.get("verify", "digest")],
        workers=Processes(processes=max(1, more.get("workers", 0))),
    )


def import_request(source: Path, target: Path, **more: Any) -> Request:
    """The request of an import."""
    return resolve(import_spec(source, target, **more), in_process=not more.get("workers", 0))


def merge_request(source: Path, output: Path, **more: Any) -> tuple[Request, Section]:
    """The request of a merge of shards, by the names of the flags."""
    parser = argparse.ArgumentParser()
    add_combine_options(parser)
    given = {
        "strategy_dir": more.pop("strategy", source / "opt_shard_info"),
        "checkpoint_dir": source,
        "output_dir": output,
        "multiprocess_off": "workers" not in more,
        "max_proccess_limit": more.pop("workers", 1),
        "copy_to_all_dp_ranks": more.pop("copies", False),
        "rank_section": more.pop("section", None),
        "no_save_optim": not more.pop("optimizer", True),
        "verify": "digest" if more.pop("check", True) else "none",
    }
    return request_of(argparse.Namespace(**vars(parser.parse_args([])) | given | more))


def merge(source: Path, output: Path, **more: Any) -> Combined:
    """Merge shards in this process."""
    return combine(*merge_request(source, output, **more), Quiet())


def run_all(request: Request) -> Outcome:
    """Carry it out, all stages."""
    return run(request, range(request.topology.pipeline), Quiet())
