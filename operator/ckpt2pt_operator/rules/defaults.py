"""What the chart's ``worker.defaults`` give to a conversion that does not say it itself.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import cast

from ckpt2pt.kube.conversion.report import child, number
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt_operator.rules.views import time

TIME_TO_LIVE = "timeToLiveSeconds"
OF_SPEC = ("retries", "pendingDeadlineSeconds", "activeDeadlineSeconds", "ttlSecondsAfterFinished", TIME_TO_LIVE)
"""Fields of spec; all others are those of spec.workers."""
_NOT_OF_PODS = frozenset({*OF_SPEC, "maxParallelStages", "rankTimeoutSeconds"})


def of_pods(defaults: Json) -> Json:
    """The defaults that only matter to pods."""
    return {name: value for name, value in defaults.items() if name not in _NOT_OF_PODS}


def filled(document: Json, defaults: Json) -> Json:
    """A document with the other defaults where it has nothing."""
    given = {name: defaults[name] for name in OF_SPEC if name in defaults}
    workers = {name: defaults[name] for name in _NOT_OF_PODS - {*OF_SPEC} if name in defaults}
    spec = document.get("spec")
    if not isinstance(spec, Mapping) or not (given or workers):
        return document
    return {**document, "spec": _over(given | ({"workers": workers} if workers else {}), cast("Json", spec))}


def _over(base: Json, given: Json) -> Json:
    found = {**base, **{name: value for name, value in given.items() if value is not None}}
    for name in base.keys() & given.keys():
        below, above = base[name], given[name]
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            found[name] = _over(cast("Json", below), cast("Json", above))
    return found


def life_left(document: Json, status: Json, defaults: Json, now: datetime) -> float | None:
    """Seconds for which a finished conversion stays; None where that is for ever, or where it has not finished."""
    spec, ended = child(document, "spec"), time(status, "completionTime")
    given = spec if spec.get(TIME_TO_LIVE) is not None else defaults
    if ended is None or given.get(TIME_TO_LIVE) is None:
        return None
    return number(given, TIME_TO_LIVE) - (now - ended).total_seconds()
