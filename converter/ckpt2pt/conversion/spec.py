"""A CheckpointConversion document -> one frozen, proved value, and the command line it stands for.

Pure: no files, no cluster.  The operator reads its objects with this, and ``ckpt2pt run`` its document, so a wrong
topology is refused by the same code in both places, before anything starts.  Defaults and rules are those of
crds/checkpointconversions.yaml (the tests hold them together): an API server has applied them, a file has not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from ckpt2pt.conversion.fields import Fields, Finding, refusal
from ckpt2pt.conversion.names import DRIVER, GROUP_VERSION, HOST, KIND_WORD, NAME
from ckpt2pt.conversion.size import too_large
from ckpt2pt.errors import UsageError
from ckpt2pt.mapping.topology import Topology

Json = dict[str, object]

API_VERSION = "ckpt2pt.dev/v1alpha1"
KIND = "CheckpointConversion"
ROLES = ("source", "metadata", "target")
MAX_NAME = 45
"""``<name>-<attempt>-<index>`` is a host name and ends at 63 characters."""

#   kind of volume           fields without which it means nothing
_NEEDED = {
    "persistentVolumeClaim": ("claimName",),
    "hostPath":              ("path",),
    "nfs":                   ("server", "path"),
    "csi":                   ("driver",),
    "emptyDir":              (),
}  # fmt: skip

_DEGREES = ("tensor", "pipeline", "virtualPipeline")
"""Parallel sizes that the result may have others of than the source."""

_NAMES = {"claimName": NAME, "driver": DRIVER, "server": HOST}
"""What a field of a volume has to look like."""

_POD_DEFAULTS: Json = {"resources": {}, "queueKind": "Kueue", "security": {}}

#   spec.model.rules    the same in a rule file
_RULES = {
    "layerModules":     "layer_modules",
    "modules":          "modules",
    "ignore":           "ignore",
    "pickleGlobals":    "pickle_globals",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder on a volume: ``volume`` as in a pod, ``path`` relative to its root."""

    volume: Json
    path: str

    def below(self, root: str) -> str:
        """The folder, where the volume is mounted at ``root``."""
        return root if self.path == "." else f"{root}/{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """How the work is done; ``pod`` holds the fields that only matter to the pods of a cluster."""

    max_parallel_stages: int | None
    processes: int
    rank_timeout_seconds: int | None
    co_schedule: bool
    pod: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """What happens to a stage that fails for a reason that may pass."""

    per_stage: int
    memory_growth_percent: int
    max_memory: str | None
    max_failed_stages: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """How long a worker waits for a checkpoint to become whole (0: not at all), and when it takes a file for finished."""

    timeout_seconds: int
    settle_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """Each new checkpoint of a running training is converted; ``until`` names the training, ``keep`` 0 keeps every result."""

    until: Json | None
    keep: int
    interval_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One CheckpointConversion with every default applied."""

    name: str
    namespace: str | None
    uid: str | None
    mode: str
    dry_run: bool
    topology: Topology
    """The layout of the result: its pipeline stages are the stages of the conversion."""
    saved: Topology | None
    """The layout of the source where it is another one; its layers are not looked at."""
    rules: Json
    source: Place
    source_format: str
    shard_info: str | None
    iteration: int | None
    metadata: Place
    target: Place
    target_format: str
    overwrite: bool
    target_data: int | None
    zero_consumed_samples: bool
    verify: str
    start_after: Json | None
    follow: Follow | None
    readiness: Readiness
    workers: Workers
    retries: Retries
    pending_deadline_seconds: int
    active_deadline_seconds: int | None
    ttl_seconds_after_finished: int | None
    suspend: bool
    cancel: bool

    @property
    def one_worker(self) -> bool:
        """One worker does all stages: to plan them, or to follow a training."""
        return self.dry_run or self.follow is not None

    def place(self, role: str) -> Place:
        """The folder of ``source``, ``metadata`` or ``target``."""
        return {"source": self.source, "metadata": self.metadata, "target": self.target}[role]


def parse(document: Mapping[str, object]) -> Conversion:
    """Apply the defaults and prove the rules; all that is wrong is told at once."""
    large = too_large(document.get("spec"))
    findings: list[Finding] = [large] if large else []
    root = Fields(document, "", findings)
    meta, spec = root.child("metadata"), root.child("spec")
    name = meta.text("name", "")
    _check_head(root, meta, name)
    source, metadata, target = (spec.child(role) for role in ROLES)
    source_volume = _volume(source, None)
    degrees = _degrees(spec.child("parallelism"), dict.fromkeys((*_DEGREES, "data", "context"), 1))
    result = _degrees(target.child("parallelism"), {name: degrees[name] for name in _DEGREES})
    conversion = Conversion(
        name=name,
        namespace=meta.text("namespace", "") or None,
        uid=meta.text("uid", "") or None,
        mode=spec.choice("mode", "Full", "ParamsOnly"),
        dry_run=spec.flag("dryRun"),
        topology=_topology(spec.child("model"), degrees | result),
        saved=_saved(degrees, result, spec.child("parallelism")),
        rules=_rules(spec.child("model").child("rules")),
        source=Place(volume=source_volume, path=_path(source, ".")),
        source_format=source.choice("format", "Auto", "Ckpt", "Safetensors"),
        shard_info=_path(source, field="optShardInfoPath") if source.get("optShardInfoPath") is not None else None,
        iteration=source.optional("iteration"),
        metadata=Place(volume=_volume(metadata, source_volume), path=_path(metadata)),
        target=Place(volume=_volume(target, source_volume), path=_path(target)),
        target_format=target.choice("format", "Megatron06"),
        overwrite=target.flag("overwrite"),
        target_data=target.optional("dataParallel"),
        zero_consumed_samples=target.flag("zeroConsumedSamples"),
        verify=spec.choice("verify", "Digest", "None", "Full"),
        start_after=_workload(spec, "startAfter"),
        follow=_follow(spec),
        readiness=_readiness(spec.child("readiness")),
        workers=_workers(spec.child("workers")),
        retries=_retries(spec.child("retries")),
        pending_deadline_seconds=spec.number("pendingDeadlineSeconds", 900),
        active_deadline_seconds=spec.optional("activeDeadlineSeconds"),
        ttl_seconds_after_finished=spec.optional("ttlSecondsAfterFinished", low=0),
        suspend=spec.flag("suspend"),
        cancel=spec.flag("cancel"),
    )
    if not findings:
        _check_places(conversion, findings)
    if findings:
        raise refusal(findings, f"{KIND} {name or 'without a name'}")
    return conversion


def _check_head(root: Fields, meta: Fields, name: str) -> None:
    for field, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        if root.get(field) != wanted:
            root.note(field, f"is {root.get(field)!r}", f"write {wanted}")
    if len(name) > MAX_NAME:
        meta.note(
            "name",
            f"has {len(name)} characters",
            f"choose a name of at most {MAX_NAME}; those of its Job and pods are made from it",
        )
    elif not re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
        meta.note("name", f"is {name!r}", "choose a name of lower-case letters, digits and dashes")
    if root.get("spec") is None:
        root.note("spec", "is missing", "say there what to convert")


def _degrees(fields: Fields, default: Mapping[str, int]) -> dict[str, int]:
    return {name: fields.number(name, size) for name, size in default.items()}


def _saved(degrees: Mapping[str, int], result: Mapping[str, int], findings: Fields) -> Topology | None:
    """The layout of the source, None where it is that of the result."""
    if all(degrees[name] == size for name, size in result.items()):
        return None
    try:
        return Topology(
            num_layers=degrees["pipeline"] * degrees["virtualPipeline"],
            tensor=degrees["tensor"],
            pipeline=degrees["pipeline"],
            virtual=degrees["virtualPipeline"],
            data=degrees["data"],
            context=degrees["context"],
        )
    except UsageError as error:
        findings.note("", error.what, error.mend)
        return None


def _topology(model: Fields, degrees: Mapping[str, int]) -> Topology:
    layers = model.number("numLayers", 0)
    if not layers:
        if model.get("numLayers") is None:
            model.note("numLayers", "is missing", "give the number of layers, no-op layers included")
        return Topology(num_layers=1)
    try:
        return Topology(
            num_layers=layers,
            tensor=degrees["tensor"],
            pipeline=degrees["pipeline"],
            virtual=degrees["virtualPipeline"],
            data=degrees["data"],
            context=degrees["context"],
            noop=frozenset(model.numbers("noopLayers") or ()),
            layers_per_stage=model.numbers("layersPerStage"),
        )
    except UsageError as error:
        model.note("", error.what, error.mend)
        return Topology(num_layers=1)


def _path(fields: Fields, default: str | None = None, *, field: str = "path") -> str:
    path = fields.text(field, default or "")
    if not path:
        fields.note(field, "is missing", "give the folder, relative to the root of its volume")
    elif path != "." and any(part in {"", ".", ".."} for part in path.split("/")):
        fields.note(
            field,
            f"is {path!r}",
            "write it relative to the root of its volume, as run7/ms_ckpt, without '..' and without a slash at either end; "
            "'.' is the root itself",
        )
    return path


def _volume(fields: Fields, default: Json | None) -> Json:
    if fields.get("volume") is None and default is not None:
        return default
    volume = fields.child("volume")
    kinds = [kind for kind in _NEEDED if volume.get(kind) is not None]
    if len(kinds) != 1:
        volume.note(
            "",
            f"names {' and '.join(kinds) or 'no volume'}",
            f"name exactly one of {', '.join(_NEEDED)}",
        )
        return {}
    [kind] = kinds
    inner = volume.child(kind)
    for needed in _NEEDED[kind]:
        given = inner.name(needed, _NAMES[needed]) if needed in _NAMES else inner.text(needed, "")
        if not given:
            inner.note(needed, "is missing", "give it")
    inner.child("nodePublishSecretRef").name("name")
    path = inner.text("path", "")
    if path and (not path.startswith("/") or ".." in path.split("/")):
        inner.note("path", f"is {path!r}", "give an absolute path, as /data/training, without '..'")
    found = dict(inner.items())
    return {kind: {"type": "Directory"} | found if kind == "hostPath" else found}


def _check_places(conversion: Conversion, findings: list[Finding]) -> None:
    for other, what in ((conversion.source, "its source"), (conversion.metadata, "pt_meta")):
        if conversion.target == other:
            findings.append(
                Finding(
                    field="spec.target.path",
                    what=f"is {other.path!r} on the same volume as {what}",
                    mend=f"choose another target.path; the result cannot take the place of {what}",
                )
            )


def _rules(fields: Fields) -> Json:
    """The rules in the spelling of a rule file, without empty sections."""
    found = {snake: fields.get(camel) for camel, snake in _RULES.items()}
    for camel, snake in _RULES.items():
        wanted: type = dict if camel.lower().endswith("modules") else list
        if found[snake] is not None and not isinstance(found[snake], wanted):
            fields.note(camel, f"is {found[snake]!r}", f"write a {'mapping' if wanted is dict else 'list'} of names")
    return {section: value for section, value in found.items() if value}


def _follow(spec: Fields) -> Follow | None:
    if spec.get("follow") is None:
        return None
    fields = spec.child("follow")
    if spec.get("startAfter") is not None:
        fields.note("", "is given beside spec.startAfter", "give one of them; follow.until names the training")
    if spec.child("source").get("iteration") is not None:
        fields.note("", "is given beside spec.source.iteration", "leave the iteration out; every new one is converted")
    return Follow(
        until=_workload(fields, "until"),
        keep=fields.number("keep", 0, low=0),
        interval_seconds=fields.number("intervalSeconds", 30),
    )


def _workload(parent: Fields, field: str) -> Json | None:
    if parent.get(field) is None:
        return None
    fields = parent.child(field)
    found: Json = {
        "apiVersion": fields.name("apiVersion", GROUP_VERSION),
        "kind": fields.name("kind", KIND_WORD),
        "name": fields.name("name"),
    }
    for name in (name for name, value in found.items() if not value):
        fields.note(name, "is missing", "name the workload fully, as {apiVersion: batch/v1, kind: Job, name: pretrain}")
    return found


def _readiness(fields: Fields) -> Readiness:
    return Readiness(
        timeout_seconds=fields.number("timeoutSeconds", 300, low=0),
        settle_seconds=fields.number("settleSeconds", 10, low=0),
    )


def _workers(fields: Fields) -> Workers:
    ours = {"maxParallelStages", "processes", "rankTimeoutSeconds", "coSchedule"}
    for field in ("schedulerName", "priorityClassName", "runtimeClassName", "queueName"):
        fields.name(field)
    for secret in fields.children("imagePullSecrets"):
        secret.name("name")
    return Workers(
        max_parallel_stages=fields.optional("maxParallelStages"),
        processes=fields.number("processes", 2),
        rank_timeout_seconds=fields.optional("rankTimeoutSeconds"),
        co_schedule=fields.flag("coSchedule"),
        pod=_POD_DEFAULTS | {name: value for name, value in fields.items() if name not in ours},
    )


def _retries(fields: Fields) -> Retries:
    return Retries(
        per_stage=fields.number("perStage", 3, low=0),
        memory_growth_percent=fields.number("memoryGrowthPercent", 50, low=0),
        max_memory=None if fields.get("maxMemory") is None else str(fields.get("maxMemory")),
        max_failed_stages=fields.optional("maxFailedStages", low=0),
    )


def convert_args(conversion: Conversion, mounts: Mapping[str, str], *, ended: str = "") -> list[str]:
    """The command of one worker, ``plan`` for a dry run; ``mounts`` says where the volume of each role is mounted.

    ``ended`` is how a training that was followed has ended: Succeeded, Failed or Deleted.
    """
    cut, saved = conversion.topology, conversion.saved or conversion.topology
    paths = {role: conversion.place(role).below(mounts[role]) for role in ROLES}
    words: list[object] = [
        "plan" if conversion.dry_run else "watch" if conversion.follow else "convert",
        "--num-layers", cut.num_layers,
        "--tp-size", saved.tensor,
        "--pp-size", saved.pipeline,
        "--vpp-size", saved.virtual,
        "--dp-size", saved.data,
        "--cp-size", saved.context,
        "--ms-path", paths["source"],
        "--src-model-format", conversion.source_format.lower(),
        "--param-map-path", paths["metadata"],
        "--megatron-path", paths["target"],
        "--target-format", conversion.target_format.lower(),
        "--process-limit", conversion.workers.processes,
    ]  # fmt: skip
    given: dict[str, object] = {
        "--noop": sorted(cut.noop | cut.ignored_noop),
        "--stage-list": ",".join(map(str, cut.layers_per_stage or ())),
        "--rules": json.dumps(conversion.rules) if conversion.rules else None,
        "--opt-shard-info-path": Place(volume={}, path=conversion.shard_info).below(mounts["source"])
        if conversion.shard_info
        else None,
        "--iteration": conversion.iteration,
        "--target-dp-size": conversion.target_data,
    }
    if conversion.saved:
        given |= {"--target-tp-size": cut.tensor, "--target-pp-size": cut.pipeline, "--target-vpp-size": cut.virtual}
    flags = {
        "--convert-param-only": conversion.mode == "ParamsOnly",
        "--overwrite": conversion.overwrite,
        "--zero-consumed-samples": conversion.zero_consumed_samples,
    }
    if not conversion.dry_run:
        words += ["--verify", conversion.verify.lower(), "--progress", "json"]
        given["--process-timeout"] = conversion.workers.rank_timeout_seconds
    if conversion.follow and not conversion.dry_run:
        words += _watch_args(conversion.follow, conversion.readiness, ended)
    elif conversion.readiness.timeout_seconds:
        words += ["--readiness-timeout", conversion.readiness.timeout_seconds]
        words += ["--readiness-settle", conversion.readiness.settle_seconds]
    for flag, value in given.items():
        if value:
            words += [flag, *(cast("list[object]", value) if isinstance(value, list) else [value])]
    words += [flag for flag, wanted in flags.items() if wanted]
    if conversion.dry_run:
        # The one worker has index 0, and would plan stage 0 alone.
        words += [word for stage in range(cut.pipeline) for word in ("--stage", stage)]
    return [str(word) for word in (*words, "--output", "json", "--log-format", "json")]


def _watch_args(follow: Follow, readiness: Readiness, ended: str) -> list[object]:
    """How a training is followed; when it has ended, one last look.  A failed training has left its last save as it was."""
    words: list[object] = ["--keep", follow.keep, "--interval", follow.interval_seconds]
    words += ["--settle", readiness.settle_seconds, *(["--once"] if ended else [])]
    if ended == "Succeeded":
        return [*words, "--readiness-timeout", readiness.timeout_seconds]
    return [*words, *(["--forgive-broken-save"] if ended else [])]
