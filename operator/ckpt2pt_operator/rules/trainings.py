"""Workloads that train, of any kind: have they completed, and what is to be converted then.  Pure.

A kind is a row of a table (the chart's values): where it is served, and which conditions or phases mean done and failed.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, cast

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion import spec
from ckpt2pt.kube.conversion.loading import load
from ckpt2pt.kube.conversion.names import HINTS, MAX_NAME, NAME, is_name
from ckpt2pt.kube.conversion.report import child, text
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import API_VERSION, KIND
from ckpt2pt_operator.rules.views import items, time

CONVERT_ANNOTATION = "ckpt2pt.dev/convert-on-success"
"""On a training: the ConfigMap that holds the conversion to make when it has completed."""
TRAINING_LABEL = "ckpt2pt.dev/training-uid"
TEMPLATE_KEY = "conversion.yaml"

State = Literal["Running", "Succeeded", "Failed"]
_MAX_PATH = 8
_MAX_TEMPLATE = 64 << 10
"""Bytes; a CheckpointConversion has two or three KiB, and reading YAML holds up everything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndRule:
    """What means that it is done, or that it failed: one of these conditions is True, or the phase is one of these."""

    conditions: frozenset[str] = frozenset()
    path: tuple[str, ...] = ()
    phases: frozenset[str] = frozenset()

    def shows(self, raw: Json) -> Json | None:
        """The condition that shows it, or what stands beside the phase; None where it does not show."""
        for condition in items(child(raw, "status"), "conditions"):
            if condition.get("status") == "True" and text(condition, "type") in self.conditions:
                return condition
        if not self.path:
            return None
        beside = child(raw, *self.path[:-1])
        phase = text(beside, self.path[-1])
        when = {name: value for name, value in beside.items() if name == "lastTransitionTime"}
        return {"reason": phase, **when} if phase in self.phases else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One row of the table."""

    api_version: str
    kind: str
    plural: str
    succeeded: EndRule
    failed: EndRule

    @property
    def base(self) -> str:
        """Where it is served."""
        return f"api{'s' if '/' in self.api_version else ''}/{self.api_version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One training as it was last seen; ``ended`` is None also where it does not tell."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str
    state: State
    message: str
    template: str
    ended: datetime | None


def kinds(rows: Sequence[Json]) -> tuple[Kind, ...]:
    """Read the table; UsageError says which row is wrong."""
    return tuple(_kind(row, number) for number, row in enumerate(rows))


def _kind(row: Json, number: int) -> Kind:
    found = {name: text(row, name) for name in ("apiVersion", "kind", "plural")}
    where = f"trainingKinds, row {number} ({found['kind'] or 'without a kind'})"
    for name, value in found.items():
        if not value:
            raise UsageError(
                f"{name} is missing",
                where=where,
                hint="give apiVersion, kind and plural, as kubectl api-resources shows them",
            )
    return Kind(
        api_version=found["apiVersion"],
        kind=found["kind"],
        plural=found["plural"],
        succeeded=_sign(child(row, "succeeded"), where),
        failed=_sign(child(row, "failed"), where),
    )


def _sign(row: Json, where: str) -> EndRule:
    def names(key: str) -> frozenset[str]:
        found = row.get(key)
        return frozenset(map(str, cast("list[object]", found))) if isinstance(found, list) else frozenset()

    sign = EndRule(
        conditions=names("conditions"),
        path=tuple(text(row, "phasePath").split("."))[:_MAX_PATH],
        phases=names("phases"),
    )
    if sign.path == ("",):
        sign = EndRule(conditions=sign.conditions)
    if not sign.conditions and not (sign.path and sign.phases):
        hint = "give conditions: [Complete], or phasePath: status.state.phase and phases: [Completed]"
        raise UsageError("nothing says when it has succeeded or failed", where=where, hint=hint)
    return sign


def workload(raw: Json, kind: Kind) -> Workload:
    """A training as an API server gives it.  What shows both signs has failed."""
    meta = child(raw, "metadata")
    failed, succeeded = kind.failed.shows(raw), kind.succeeded.shows(raw)
    end = failed if failed is not None else succeeded
    state: State = "Failed" if failed is not None else "Succeeded" if succeeded is not None else "Running"
    said = [text(end, "reason"), text(end, "message", 512)] if end is not None else []
    return Workload(
        api_version=kind.api_version,
        kind=kind.kind,
        namespace=text(meta, "namespace"),
        name=text(meta, "name"),
        uid=text(meta, "uid"),
        state=state,
        message=": ".join(filter(None, said)),
        template=text(child(meta, "annotations"), CONVERT_ANNOTATION, MAX_NAME + 1),
        ended=(time(end, "lastTransitionTime") or time(child(raw, "status"), "completionTime")) if end else None,
    )


def template_of(training: Workload) -> str:
    """The ConfigMap that an annotated training names; UsageError where that is no name."""
    if not is_name(training.template):
        where = f"{training.kind} {training.namespace}/{training.name}: annotation {CONVERT_ANNOTATION}"
        raise UsageError("it is not the name of a ConfigMap", where=where, hint=HINTS[NAME])
    return training.template


def conversion_for(training: Workload, data: Mapping[str, object]) -> Json:
    """The conversion that the ConfigMap of an annotated training describes; UsageError where it describes none.

    ``${namespace}``, ``${name}`` and ``${uid}`` of the training are filled in.  Its name ends in part of the uid, so
    the same run makes it once however often it is tried.  No error quotes the ConfigMap: who reads events of the
    namespace may not be allowed to read that.
    """
    where = f"ConfigMap {training.namespace}/{training.template}"
    found = data.get(TEMPLATE_KEY)
    if not isinstance(found, str):
        raise UsageError(f"it has no key {TEMPLATE_KEY}", where=where, hint="put the CheckpointConversion there")
    if len(found) > _MAX_TEMPLATE:
        what = f"{TEMPLATE_KEY} has more than {_MAX_TEMPLATE >> 10} KiB"
        raise UsageError(what, where=where, hint="put one CheckpointConversion there, and nothing else")
    fields = {"namespace": training.namespace, "name": training.name, "uid": training.uid}
    try:
        document = load(string.Template(found).substitute(fields), where)
    except KeyError as error:
        hint = "use ${namespace}, ${name} and ${uid}, and $$ for a dollar sign"
        raise UsageError("it asks for a ${...} that is not known here", where=where, hint=hint) from error
    except ValueError as error:  # of string.Template: a line and a column
        raise UsageError(
            f"{TEMPLATE_KEY} cannot be read: {error}", where=where, hint="write $$ for a dollar sign"
        ) from error
    except UsageError as error:
        raise UsageError(f"{TEMPLATE_KEY} cannot be read{_place(error)}", where=where, hint="correct it") from error
    if not isinstance(document, dict) or cast("Json", document).get("kind", KIND) != KIND:
        raise UsageError(f"{TEMPLATE_KEY} is no {KIND}", where=where, hint="see examples/conversion.yaml")
    template = cast("Json", document)
    meta = child(template, "metadata")
    labels = {**child(meta, "labels"), TRAINING_LABEL: training.uid}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": _name(text(meta, "name") or training.name, training.uid),
            "namespace": training.namespace,
            "labels": labels,
            "annotations": child(meta, "annotations"),
        },
        "spec": child(template, "spec"),
    }


def _place(error: UsageError) -> str:
    mark = getattr(error.__cause__, "problem_mark", None)
    return (
        f": line {mark.line + 1}, column {mark.column + 1}"
        if mark is not None
        else ": it is not one document of texts, numbers, lists and mappings"
    )


def _name(base: str, uid: str) -> str:
    tail = re.sub("[^a-z0-9]", "", uid.lower())[:8]
    head = re.sub("[^a-z0-9-]+", "-", base.lower())[: spec.MAX_NAME - len(tail) - 1].strip("-")
    return f"{head}-{tail}" if head else tail
