"""Carry out a CheckpointConversion document on this machine, with the Job that a cluster would get.

conversion.yaml --document--> --conversion--> Conversion --job--> Job manifest
                                                                    |  claim, export, ... -> local folder
                                                                    v
                                         status  <--status--  indexes as processes  --board--> terminal
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import yaml

from ckpt2pt import __version__
from ckpt2pt.conversion.document import read
from ckpt2pt.conversion.job import Mount, build_job, mounts_of
from ckpt2pt.conversion.spec import API_VERSION, KIND, Conversion, Json, parse
from ckpt2pt.conversion.status import WORST_FIRST, Ending, disagreement, status_of_run
from ckpt2pt.errors import MissingInputError, UsageError
from ckpt2pt.flags import nearest
from ckpt2pt.local.board import board
from ckpt2pt.local.indexes import Index, LocalJob
from ckpt2pt.show.preview import render as render_plan
from ckpt2pt.system.paths import is_folder
from ckpt2pt.text import size, table

log = logging.getLogger("ckpt2pt")

IMAGE = f"ckpt2pt:{__version__}"

Show = Callable[[object, str, argparse.Namespace], None]


def run_document(options: argparse.Namespace, show: Show) -> int:
    """``ckpt2pt run``: 0 when every stage is done, else the code that says most about what to do.

    Of several failed stages the code comes first that stands first in 64, 65, 66, 76, 70, 74, 75; a kill, a signal and a
    deadline count as 75.
    """
    conversion = parse(read(options.filename))
    manifest = build_job(conversion, image=IMAGE)
    if options.print_job:
        show(manifest, yaml.safe_dump(manifest, sort_keys=False).rstrip(), options)
        return 0
    _refuse_what_waits(conversion)
    if conversion.follow and not conversion.dry_run:
        raise UsageError(
            "spec.follow is given, and run carries out one conversion",
            where=f"{KIND} {conversion.name}",
            hint=f"follow the training with ckpt2pt watch -f {options.filename}, which ends with a signal",
        )
    folders = map_volumes(mounts_of(conversion), options.volume)
    if conversion.start_after:
        log.warning("startAfter %s is not waited for: there is no cluster here", conversion.start_after["name"])
    started = _now()
    stages = 1 if conversion.dry_run else conversion.topology.pipeline
    with board(options.progress, options.log_format, stages) as seen:
        job = LocalJob(conversion, manifest, local_args(manifest, folders), board=seen, limit=os.cpu_count() or 1)
        ended = job.run()
    results = [index.result for index in job.indexes if index.result]
    records = [index.record for index in job.indexes]
    ended = ended or disagreement(records)
    status = status_of_run(
        conversion,
        records,
        job=str(cast("Json", manifest["metadata"])["name"]),
        started=started,
        finished=_now(),
        ended=ended,
        iteration=next((cast("int", r["iteration"]) for r in results if type(r.get("iteration")) is int), None),
    )
    document = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": conversion.name},
        "status": status,
    }
    plans = results if conversion.dry_run else []
    target = folders[next(mount.name for mount in mounts_of(conversion) if "target" in mount.roles)]
    show(document | {"plan": plans[0]} if plans else document, _text(status, plans, target), options)
    return exit_code(job.indexes, ended)


def words_of_document(filename: Path, volumes: Sequence[str]) -> list[str]:
    """The command of one worker, for every stage and with local folders; its port and its message are a pod's alone."""
    conversion = parse(read(filename))
    _refuse_what_waits(conversion)
    if conversion.dry_run:
        hint = "set spec.dryRun to false, or plan it with ckpt2pt run"
        raise UsageError("spec.dryRun is true, so nothing is to be done", where=f"{KIND} {conversion.name}", hint=hint)
    manifest = build_job(conversion, image=IMAGE)
    words = local_args(manifest, map_volumes(mounts_of(conversion), volumes))
    return words[: words.index("--termination-log")]


def _refuse_what_waits(conversion: Conversion) -> None:
    for field, given in (("suspend", conversion.suspend), ("cancel", conversion.cancel)):
        if given:
            raise UsageError(
                f"spec.{field} is true, so nothing is to be done",
                where=f"{KIND} {conversion.name}",
                hint=f"set spec.{field} to false to run it",
            )


def exit_code(indexes: Sequence[Index], ended: Ending | None) -> int:
    """The one code for all stages."""
    if ended is not None and ended.reason in {"Interrupted", "DeadlineExceeded", "IterationsDiffer"}:
        return 75
    codes = {75 if (index.code or 0) > 128 else index.code for index in indexes if index.code}
    return next((code for code in WORST_FIRST if code in codes), 70 if codes else 0)


# ------------------------------------------------------------------------------------------------------------- volumes


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


def local_args(manifest: Json, folders: Mapping[str, Path]) -> list[str]:
    """The container's arguments as the kubelet gives them, its mount paths replaced by local folders."""
    template = cast("Json", cast("Json", manifest["spec"])["template"])
    [container] = cast("list[Json]", cast("Json", template["spec"])["containers"])
    roots = {str(m["mountPath"]): folders[str(m["name"])] for m in cast("list[Json]", container["volumeMounts"])}

    def local(word: str) -> str:
        word = word.replace("$$", "$")
        for root, folder in roots.items():
            if word == root or word.startswith(f"{root}/"):
                return str(folder / word[len(root) + 1 :])
        return word

    return [local(word) for word in cast("list[str]", container["args"])]


# -------------------------------------------------------------------------------------------------------------- result


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _text(status: Json, plans: Sequence[Json], target: Path) -> str:
    """The status for a person."""
    lines = [render_plan(plan) for plan in plans]
    iteration = f", iteration {status['iteration']}" if "iteration" in status else ""
    ready = next(c for c in cast("list[Json]", status["conditions"]) if c["type"] == "Ready")
    lines.append(f"{status['phase']}: {status['stageSummary']} stages{iteration}; {ready['message']}")
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
    lines += table(("stage", "state", "read", "speed", "attempts", "reason"), rows, right=frozenset({2, 3, 4}))
    if status["phase"] == "Succeeded":
        lines += [f"output  {target / str(status['outputPath'])}", f"report  {target / str(status['reportPath'])}"]
    return "\n".join(lines)
