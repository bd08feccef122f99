"""Conversions to MindSpore as tests ask for them: by names of their own, for what a document says in its fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from ckpt2pt.kube.resolve import resolve_request
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
    return resolve_request(import_spec(source, target, **more), in_process=not more.get("workers", 0))


def run_all(request: Request) -> Outcome:
    """Carry it out, all stages."""
    return run(request, range(request.topology.pipeline), Quiet())
