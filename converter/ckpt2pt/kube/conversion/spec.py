"""A CheckpointConversion document -> one frozen, proved value, and the command of a worker that carries it out.

Pure: no files, no cluster.  The operator reads its objects with this, and ``ckpt2pt run`` its document, so a wrong
topology is refused by the same code in both places, before anything starts.  An API server has applied the defaults of the
schema, a file has not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from msgspec.structs import replace

from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.fields import Finding, decode, to_error
from ckpt2pt.kube.conversion.names import DRIVER, HINTS, HOST, NAME, fits
from ckpt2pt.kube.conversion.schema import (
    MEGATRON,
    Degrees,
    Json,
    Parallelism,
    Place,
    Pod,
    Processes,
    Secret,
    Source,
    Spec,
    Target,
    Workload,
    below,
    to_json,
)
from ckpt2pt.kube.conversion.size import too_large
from ckpt2pt.kube.conversion.usable import FOLLOWED, FROM_HUGGINGFACE, FROM_MINDFORMERS, framework_of, unused

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

_NAMES = {"claimName": NAME, "driver": DRIVER, "server": HOST}
"""What a field of a volume has to look like."""
_NEVER = re.compile("[\\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One CheckpointConversion with every default applied; ``pod`` are the fields of workers that only matter to a cluster."""

    name: str
    namespace: str | None
    uid: str | None
    spec: Spec
    pod: Json
    topology: Topology
    """The layout of the result: its pipeline stages are the stages of the conversion."""
    saved: Topology | None
    """The layout of the source where it is another one; its layers are not looked at."""

    @property
    def one_worker(self) -> bool:
        """One worker does all stages: to plan them, or to follow a training."""
        return self.spec.dry_run or self.spec.follow is not None

    def of_iteration(self, iteration: int | None) -> Conversion:
        """The same of one iteration; itself for None."""
        if iteration is None:
            return self
        source = replace(self.spec.source, iteration=iteration)
        return dataclasses.replace(self, spec=replace(self.spec, source=source))

    def place(self, role: str) -> Place:
        """The folder of ``source``, ``metadata`` or ``target``."""
        return {"source": self.spec.source, "metadata": self.spec.metadata, "target": self.spec.target}[role]


# --------------------------------------------------------------------------------------------------------------- parse

_OURS = frozenset(Processes.__struct_encode_fields__)
_POD_DEFAULTS: Json = {"resources": {}, "queueKind": "Kueue", "security": {}}


def parse(document: Mapping[str, object]) -> Conversion:
    """Apply the defaults and prove the rules; all that is wrong is reported at once."""
    given = _mapping(document.get("spec"))
    large = too_large(document.get("spec"))
    findings: list[Finding] = [large] if large else []
    meta = _mapping(document.get("metadata"))
    name = meta.get("name")
    _check_head(document, name, findings)
    spec = decode(given, Spec, "spec", findings)
    decode(given.get("workers"), Pod, "spec.workers", findings)
    source = replace(spec.source, volume=_volume(spec.source, "source", findings, None))
    metadata, target = spec.metadata, spec.target
    megatron = source.format in MEGATRON or target.format != "Megatron06"  # nothing but 0.6 needs a pt_meta
    if given.get("metadata") is not None or not megatron:
        metadata = replace(metadata, volume=_volume(metadata, "metadata", findings, source.volume))
    target = replace(target, volume=_volume(target, "target", findings, source.volume))
    model = replace(spec.model, noop_layers=spec.model.noop_layers or ())
    sizes = _with_ones(spec.parallelism)
    spec = replace(spec, model=model, parallelism=sizes, source=source, metadata=metadata, target=target)
    _check_formats(spec, _mapping(given.get("target")), findings)
    _check_workloads(spec, findings)
    topology, saved = _layouts(spec, findings)
    if not findings:
        _check_places(spec, findings)
    if findings:
        findings = list(dict.fromkeys(findings))
        raise to_error(findings, f"{KIND} {name if isinstance(name, str) and name else 'without a name'}")
    workers = _mapping(given.get("workers"))
    pod = {field: value for field, value in workers.items() if field not in _OURS and value is not None}
    return Conversion(
        name=str(name),
        namespace=_text(meta, "namespace"),
        uid=_text(meta, "uid"),
        spec=spec,
        pod=_POD_DEFAULTS | pod,
        topology=topology,
        saved=saved,
    )


def _mapping(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _text(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) and value else None


def _check_head(document: Mapping[str, object], name: object, findings: list[Finding]) -> None:
    for field, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        if document.get(field) != wanted:
            findings.append(Finding(field=field, what=f"is {document.get(field)!r}", hint=f"write {wanted}"))
    if isinstance(name, str) and len(name) > MAX_NAME:
        hint = f"choose a name of at most {MAX_NAME}; those of its Job and pods are made from it"
        findings.append(Finding(field="metadata.name", what=f"has {len(name)} characters", hint=hint))
    elif not isinstance(name, str) or not re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
        hint = "choose a name of lower-case letters, digits and dashes"
        findings.append(Finding(field="metadata.name", what=f"is {name!r}", hint=hint))
    spec = document.get("spec")
    if spec is None:
        findings.append(Finding(field="spec", what="is missing", hint="say there what to convert"))
    elif not isinstance(spec, Mapping):
        findings.append(Finding(field="spec", what="is not a mapping of fields", hint="write its fields below it"))


def _with_ones(sizes: Parallelism) -> Parallelism:
    """A document that does not state a size means 1."""
    return Parallelism(**{field: getattr(sizes, field) or 1 for field in Parallelism.__struct_fields__})


def _layouts(spec: Spec, findings: list[Finding]) -> tuple[Topology, Topology | None]:
    """That of the result, and that of the source where it is another one."""
    model, sizes, result = spec.model, spec.parallelism, spec.target.parallelism
    own = {field: getattr(sizes, field) for field in ("tensor", "pipeline", "virtual_pipeline")}
    wanted = {field: getattr(result, field) or size for field, size in own.items()}
    if not model.num_layers:
        hint = "give the number of layers, no-op layers included"
        if not any(finding.field == "spec.model.numLayers" for finding in findings):
            findings.append(Finding(field="spec.model.numLayers", what="is missing", hint=hint))
        return Topology(num_layers=1), None
    noop, listed = frozenset(model.noop_layers or ()), model.layers_per_stage
    topology = _topology(model.num_layers, wanted, sizes, noop, listed, "spec.model", findings)
    if wanted == own:
        return topology, None
    layers = own["pipeline"] * own["virtual_pipeline"]
    return topology, _topology(layers, own, sizes, frozenset(), None, "spec.parallelism", findings)


def _topology(
    layers: int,
    degrees: Mapping[str, int],
    sizes: Parallelism,
    noop: frozenset[int],
    listed: tuple[int, ...] | None,
    field: str,
    findings: list[Finding],
) -> Topology:
    try:
        return Topology(
            num_layers=layers,
            tensor=degrees["tensor"],
            pipeline=degrees["pipeline"],
            virtual=degrees["virtual_pipeline"],
            data=sizes.data or 1,
            context=sizes.context or 1,
            noop=noop,
            layers_per_stage=listed,
        )
    except UsageError as error:
        findings.append(Finding(field=field, what=error.what, hint=error.hint))
        return Topology(num_layers=1)


def _volume(place: Place, role: str, findings: list[Finding], default: Json | None) -> Json:
    """The volume of a role, and whether its paths can be on one."""
    for name, one in _paths(place).items():
        if one is not None:
            _check_path(one, f"spec.{role}.{name}", findings)
    if not place.volume and default is not None:
        return default
    field = f"spec.{role}.volume"
    kinds = [kind for kind in _NEEDED if place.volume.get(kind) is not None]
    if len(kinds) != 1:
        what, hint = f"names {' and '.join(kinds) or 'no volume'}", f"name exactly one of {', '.join(_NEEDED)}"
        findings.append(Finding(field=field, what=what, hint=hint))
        return {}
    [kind] = kinds
    inner = _mapping(place.volume[kind])
    field = f"{field}.{kind}"
    for needed in _NEEDED[kind]:
        value = inner.get(needed)
        if not isinstance(value, str) or not value:
            findings.append(Finding(field=f"{field}.{needed}", what="is missing", hint="give it"))
        elif needed in _NAMES and not fits(_NAMES[needed], value):
            findings.append(Finding(field=f"{field}.{needed}", what=f"is {value[:80]!r}", hint=HINTS[_NAMES[needed]]))
    secret = inner.get("nodePublishSecretRef")
    if secret is not None:
        decode(secret, Secret, f"{field}.nodePublishSecretRef", findings)
    path = inner.get("path")
    if isinstance(path, str) and path and (not path.startswith("/") or ".." in path.split("/")):
        hint = "give an absolute path, as /data/training, without '..'"
        findings.append(Finding(field=f"{field}.path", what=f"is {path!r}", hint=hint))
    found = {name: value for name, value in inner.items() if value is not None}
    return {kind: {"type": "Directory"} | found if kind == "hostPath" else found}


def _paths(place: Place) -> dict[str, str | None]:
    """Every path of a role, by its field: all are on its volume."""
    found: dict[str, str | None] = {"path": place.path}
    if isinstance(place, Source):
        found |= {"optShardInfoPath": place.opt_shard_info_path, "mindformers.config": place.mindformers.config}
    if isinstance(place, Target):
        found |= {"huggingface.tokenizerPath": place.huggingface.tokenizer_path}
    return found


def _check_path(path: str, field: str, findings: list[Finding]) -> None:
    if not path:
        hint = "give the folder, relative to the root of its volume"
        findings.append(Finding(field=field, what="is missing", hint=hint))
    elif _NEVER.search(path):
        hint = "leave out the character that no path and no name can have"
        findings.append(Finding(field=field, what=f"is {path!r}", hint=hint))
    elif path != "." and any(part in {"", ".", ".."} for part in path.split("/")):
        hint = (
            "write it relative to the root of its volume, as run7/ms_ckpt, without '..' and without a slash at either end; "
            "'.' is the root itself"
        )
        findings.append(Finding(field=field, what=f"is {path!r}", hint=hint))


def _check_places(spec: Spec, findings: list[Finding]) -> None:
    for other, what in ((spec.source, "its source"), (spec.metadata, "pt_meta")):
        if (spec.target.volume, spec.target.path) == (other.volume, other.path):
            found = f"is {other.path!r} on the same volume as {what}"
            hint = f"choose another target.path; the result cannot take the place of {what}"
            findings.append(Finding(field="spec.target.path", what=found, hint=hint))


def _check_formats(spec: Spec, target: Mapping[str, object], findings: list[Finding]) -> None:
    """Which sources become what; the CRD has the same rules."""
    made = {"MindFormers": FROM_MINDFORMERS, "HuggingFace": FROM_HUGGINGFACE}.get(spec.source.format)
    if made and spec.target.format not in made:
        hint = f"set it to {' or '.join(sorted(made))}"
        what = f"is {spec.target.format}, which is not made of a {spec.source.format} checkpoint"
        findings.append(Finding(field="spec.target.format", what=what, hint=hint))
    of_mindformers = spec.source.format == "MindFormers"
    if spec.follow and (spec.target.format not in FOLLOWED if of_mindformers else spec.target.format != "Megatron06"):
        hint = "leave it out; a training is followed to Megatron06, one of MindFormers to Megatron or TorchDist"
        what = f"is given, and spec.target.format is {spec.target.format}"
        findings.append(Finding(field="spec.follow", what=what, hint=hint))
    if spec.target.format == "Torch" and spec.source.format not in {"Auto", "MSAdapter"}:
        hint = "set it to MSAdapter, or choose another spec.target.format; only what MSAdapter wrote becomes files of torch"
        findings.append(Finding(field="spec.source.format", what=f"is {spec.source.format}", hint=hint))
    if spec.target.format == "Torch" and spec.metadata.path:
        what = "is given, and decides nothing of files that keep what they hold"
        findings.append(Finding(field="spec.metadata", what=what, hint="leave it out"))
    for field, why in unused(spec, framework_of(spec.source.format)):
        findings.append(Finding(field=f"spec.{field}", what=why, hint="leave it out"))
    for part, of in (("huggingface", "Safetensors"), ("mindspore", "MindSpore")):
        if spec.target.format != of and target.get(part) is not None:
            hint = f"set spec.target.format to {of}, or leave it out"
            findings.append(Finding(field=f"spec.target.{part}", what="is given for another format", hint=hint))
    if spec.target.format != "MindSpore":
        return
    layout = target.get("parallelism") is not None
    if layout and spec.source.format not in {"Auto", *MEGATRON} and not spec.metadata.path:
        hint = "name the pt_meta folder, which says where another layout of a MindSpore training may be cut; or leave target.parallelism out"
        findings.append(Finding(field="spec.metadata", what="is missing", hint=hint))


def _check_workloads(spec: Spec, findings: list[Finding]) -> None:
    follow = spec.follow
    if follow and spec.start_after:
        hint = "give one of them; follow.until names the training"
        findings.append(Finding(field="spec.follow", what="is given beside spec.startAfter", hint=hint))
    if follow and spec.source.format in MEGATRON:
        hint = "leave it out; trainings of MindSpore alone are followed"
        what = f"is given, and source.format is {spec.source.format}"
        findings.append(Finding(field="spec.follow", what=what, hint=hint))
    if follow and spec.source.iteration is not None:
        hint = "leave the iteration out; every new one is converted"
        findings.append(Finding(field="spec.follow", what="is given beside spec.source.iteration", hint=hint))
    named = (("spec.startAfter", spec.start_after), ("spec.follow.until", follow.until if follow else None))
    for field, workload in named:
        for name, encoded in zip(Workload.__struct_fields__, Workload.__struct_encode_fields__, strict=True):
            known = any(finding.field == f"{field}.{encoded}" for finding in findings)
            if workload is not None and not known and not getattr(workload, name):
                hint = "name the workload fully, as {apiVersion: batch/v1, kind: Job, name: pretrain}"
                findings.append(Finding(field=f"{field}.{encoded}", what="is missing", hint=hint))


# -------------------------------------------------------------------------------------------------------------- worker


def worker_spec(conversion: Conversion, roots: Mapping[str, str]) -> Spec:
    """What a worker needs of it; ``roots`` says where the volume of each role is mounted."""
    spec = conversion.spec
    paths = {role: place.below(roots[role]) for role in ROLES if (place := conversion.place(role)).path}
    info, config = spec.source.opt_shard_info_path, spec.source.mindformers.config
    files, tokenizer = spec.target.huggingface, spec.target.huggingface.tokenizer_path
    return Spec(
        mode=spec.mode,
        model=replace(spec.model, noop_layers=spec.model.noop_layers or None),  # none: as the metadata has them
        parallelism=spec.parallelism,
        source=replace(
            spec.source,
            volume={},
            path=paths["source"],
            opt_shard_info_path=None if info is None else below(roots["source"], info),
            mindformers=replace(
                spec.source.mindformers, config=None if config is None else below(roots["source"], config)
            ),
        ),
        metadata=Place(path=paths.get("metadata", "")),
        target=replace(
            spec.target,
            volume={},
            path=paths["target"],
            huggingface=files
            if tokenizer is None
            else replace(files, tokenizer_path=below(roots["source"], tokenizer)),
            parallelism=spec.target.parallelism if conversion.saved else Degrees(expert=spec.target.parallelism.expert),
        ),
        verify=spec.verify,
        follow=replace(spec.follow, until=None) if spec.follow else None,
        workers=replace(spec.workers, max_parallel_stages=None, co_schedule=False),
        readiness=spec.readiness,
    )


def worker_words(conversion: Conversion, roots: Mapping[str, str], *, ended: str = "") -> list[str]:
    """The command of one worker, ``plan`` for a dry run; ``roots`` says where the volume of each role is mounted.

    ``ended`` is how a training that was followed has ended: Succeeded, Failed or Deleted.  When it has ended, one last
    look is taken; a failed training has left its last save as it was.
    """
    spec = worker_spec(conversion, roots)
    dry = conversion.spec.dry_run
    words = ["plan" if dry else "watch" if spec.follow else "convert", "--spec", to_json(spec)]
    if dry:
        # The one worker has index 0, and would plan stage 0 alone.
        words += [word for stage in range(conversion.topology.pipeline) for word in ("--stage", str(stage))]
    else:
        words += ["--progress", "json"]
    if spec.follow and ended and not dry:
        words += ["--once"]
        words += [] if ended == "Succeeded" else ["--allow-incomplete"]
    return [*words, "--output", "json", "--log-format", "json"]
