"""Carry out a CheckpointConversion document on this machine.

conversion.yaml --document--> --spec--> Conversion   claim, export, ... -> local folder
                                            |
                status  <--status--  stages, run after run
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import yaml

from ckpt2pt import __version__
from ckpt2pt.errors import MissingInputError, UsageError, size
from ckpt2pt.io.flags import nearest
from ckpt2pt.io.paths import is_folder
from ckpt2pt.io.text import table
from ckpt2pt.kube.conversion.document import read
from ckpt2pt.kube.conversion.job import Mount, build_job, job_name, mounts_of, parallelism
from ckpt2pt.kube.conversion.schema import Json, Spec
from ckpt2pt.kube.conversion.spec import API_VERSION, KIND, Conversion, parse, worker_spec
from ckpt2pt.kube.conversion.status import WORST_FIRST, Ending, StageRecord, disagreement, status_of_run
from ckpt2pt.kube.local.stages import OnFailure, Stages, request_here
from ckpt2pt.kube.worker.waiting import request_when_complete
from ckpt2pt.run.targets.request import AnyRequest
from ckpt2pt.show.preview import planned
from ckpt2pt.show.preview import render as render_plan
from ckpt2pt.show.progress import reporter

log = logging.getLogger("ckpt2pt")

IMAGE = f"ckpt2pt:{__version__}"

Show = Callable[[object, str, argparse.Namespace], None]


def run_document(options: argparse.Namespace, show: Show, on_failure: OnFailure) -> int:
    """``ckpt2pt run``: 0 when every stage is done, else the code that says most about what to do.

    Of several failed stages the code comes first that stands first in 64, 65, 66, 76, 70, 74, 75; a signal and a deadline
    count as 75.
    """
    conversion = parse(read(options.filename))
    if options.print_job:
        manifest = build_job(conversion, image=IMAGE)
        show(manifest, yaml.safe_dump(manifest, sort_keys=False).rstrip(), options)
        return 0
    _refuse_what_waits(conversion)
    if conversion.spec.follow and not conversion.spec.dry_run:
        raise UsageError(
            "spec.follow is given, and run carries out one conversion",
            where=f"{KIND} {conversion.name}",
            hint=f"follow the training with ckpt2pt watch -f {options.filename}, which ends with a signal",
        )
    roots = roots_of(conversion, options.volume)
    if conversion.spec.start_after:
        log.warning("startAfter %s is not waited for: there is no cluster here", conversion.spec.start_after.name)
    started = _now()
    spec = worker_spec(conversion, roots)
    workers = parallelism(conversion, conversion.topology.pipeline)

    def request() -> AnyRequest:
        return request_here(request_when_complete(spec, options.account), workers)

    if conversion.spec.dry_run:
        return _plan(conversion, request(), options, show)
    runs = Stages(conversion, request, on_failure)
    with closing(reporter(options.progress)) as progress:
        ended = runs.carry_out(progress)
    records = runs.records
    ended = ended or disagreement(records)
    status = status_of_run(
        conversion,
        records,
        job=job_name(conversion, 1),
        started=started,
        finished=_now(),
        ended=ended,
        iteration=next((stage.iteration for stage in runs.stages if stage.state == "Succeeded"), None),
    )
    show(_document(conversion, status), _text(status, roots["target"]), options)
    return exit_code([stage.code for stage in runs.stages], ended)


def _plan(conversion: Conversion, request: AnyRequest, options: argparse.Namespace, show: Show) -> int:
    """A dry run: what would be written, and whether it could be."""
    started = _now()
    plan = planned(request, range(conversion.topology.pipeline))
    done = int(str(plan.document["bytesToRead"]))
    record = StageRecord(stage=0, state="Succeeded", attempts=1, done=done, total=done)
    status = status_of_run(
        conversion,
        [record],
        job=job_name(conversion, 1),
        started=started,
        finished=_now(),
        iteration=int(str(plan.document["iteration"])),
    )
    lines = f"{render_plan(plan.document)}\n{_summary(status)}"
    show(_document(conversion, status) | {"plan": plan.document}, lines, options)
    plan.check()
    return 0


def _document(conversion: Conversion, status: Json) -> Json:
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": conversion.name}, "status": status}


def spec_of_document(filename: Path, volumes: Sequence[str]) -> Spec:
    """What a document asks one worker for, for every stage and with local folders."""
    conversion = parse(read(filename))
    _refuse_what_waits(conversion)
    if conversion.spec.dry_run:
        hint = "set spec.dryRun to false, or plan it with ckpt2pt run"
        raise UsageError("spec.dryRun is true, so nothing is to be done", where=f"{KIND} {conversion.name}", hint=hint)
    return worker_spec(conversion, roots_of(conversion, volumes))


def _refuse_what_waits(conversion: Conversion) -> None:
    for field, given in (("suspend", conversion.spec.suspend), ("cancel", conversion.spec.cancel)):
        if given:
            raise UsageError(
                f"spec.{field} is true, so nothing is to be done",
                where=f"{KIND} {conversion.name}",
                hint=f"set spec.{field} to false to run it",
            )


def exit_code(codes: Sequence[int], ended: Ending | None) -> int:
    """The one code for all stages."""
    if ended is not None and ended.reason in {"Interrupted", "DeadlineExceeded", "IterationsDiffer"}:
        return 75
    return next((code for code in WORST_FIRST if code in codes), 70 if any(codes) else 0)


# ------------------------------------------------------------------------------------------------------------- volumes


def roots_of(conversion: Conversion, volumes: Sequence[str]) -> dict[str, str]:
    """Where the volume of each role is on this machine."""
    mounts = mounts_of(conversion)
    folders = map_volumes(mounts, volumes)
    return {role: str(folders[mount.name]) for mount in mounts for role in mount.roles}


def map_volumes(mounts: Sequence[Mount], given: Sequence[str]) -> dict[str, Path]:
    """The local folder of each volume of the Job, from ``--volume NAME=DIR``."""
    wanted: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UsageError(f"--volume is {text!r}", where="the command line", hint="write --volume NAME=DIR")
        if wanted.setdefault(name, folder) != folder:
            raise UsageError(f"--volume {name} is given twice", where="the command line", hint="give it once")
    known = [name for mount in mounts for name in names_of(mount)]
    unknown = next((name for name in sorted(wanted) if name not in known), None)
    if unknown is not None:  # before what is missing, which may be the same volume
        near = nearest(unknown, known)
        listed = ", ".join(names_of(mount)[0] for mount in mounts)
        hint = f"the volumes of the document are {listed}; source, metadata and target name them too"
        hint = f"did you mean {near}? {hint}" if near else hint
        raise UsageError(f"--volume {unknown} is no volume of the document", where="the command line", hint=hint)
    folders: dict[str, Path] = {}
    for mount in mounts:
        names = names_of(mount)
        found = {wanted[name] for name in names if name in wanted}
        if len(found) > 1:
            hint = f"{' and '.join(mount.roles)} are on one volume: give it one folder"
            raise UsageError(f"--volume gives two folders for {names[0]}", where="the command line", hint=hint)
        if not found and "hostPath" in mount.volume:
            found = {names[0]}
        if not found:
            hint = f"give --volume {names[0]}=DIR, the folder that it stands for"
            raise UsageError(
                f"no folder is given for the volume {names[0]}", where=f"spec.{mount.name}.volume", hint=hint
            )
        folders[mount.name] = _folder(Path(found.pop()), names[0])
    return folders


def names_of(mount: Mount) -> tuple[str, ...]:
    """What a user may call a volume: what the document calls it, or what it is used for."""
    [(kind, inner)] = mount.volume.items()
    details = cast("Mapping[str, str]", inner)
    own: tuple[str, ...] = ()
    if kind == "persistentVolumeClaim":
        own = (details["claimName"],)
    elif kind == "hostPath":
        own = (details["path"],)
    elif kind == "nfs":
        own = (f"{details['server']}:{details['path']}",)
    return (*own, *mount.roles)


def _folder(path: Path, name: str) -> Path:
    if not is_folder(path, "--volume"):
        hint = f"give an existing folder: --volume {name}=DIR"
        raise MissingInputError(f"the folder of the volume {name} is not there", where=path, hint=hint)
    return path.absolute()


# -------------------------------------------------------------------------------------------------------------- result


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _summary(status: Json) -> str:
    iteration = f", iteration {status['iteration']}" if "iteration" in status else ""
    ready = next(c for c in cast("list[Json]", status["conditions"]) if c["type"] == "Ready")
    return f"{status['phase']}: {status['stageSummary']} stages{iteration}; {ready['message']}"


def _text(status: Json, target: str) -> str:
    """The status for a person."""
    rows = [
        (
            stage["stage"],
            stage["state"],
            size(cast("int", stage.get("bytes", 0))),
            f"{size(cast('int', stage['throughput']))}/s" if stage.get("throughput") else "",
            stage.get("attempts", 0),
            stage.get("reason", ""),
        )
        for stage in cast("list[Json]", status["stageStatuses"])
    ]
    lines = [
        _summary(status),
        *table(("stage", "state", "read", "speed", "attempts", "reason"), rows, right=frozenset({2, 3, 4})),
    ]
    if status["phase"] == "Succeeded":
        root = Path(target)
        lines += [f"output  {root / str(status['outputPath'])}", f"report  {root / str(status['reportPath'])}"]
    return "\n".join(lines)
