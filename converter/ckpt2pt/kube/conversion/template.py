"""A CheckpointConversion written once for many runs: ``${...}`` fields, ``--set a.b=c``, and names made from both.  Pure.

{name: "${name}", ...}  --fill--> this run's document  --set_fields--> this call's  --name_for--> run-0-500-3f2a1c
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import cast

from ckpt2pt.errors import UsageError
from ckpt2pt.io.flags import nearest
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import MAX_NAME

FIELDS = ("namespace", "name", "uid", "epoch", "step", "iteration")
"""What a template may ask for; a run that does not know one cannot fill a template that asks for it."""

_FIELD = re.compile(r"\$\{([^}]*)\}")
_HASH_DIGITS = 8


def fill(document: Mapping[str, object], fields: Mapping[str, str | int]) -> Json:
    """Put values for the ``${...}`` of every text.  A text that is one field alone takes its type: ``${step}`` is a number."""

    def filled(value: object, path: str) -> object:
        if isinstance(value, dict):
            return {name: filled(item, f"{path}.{name}".lstrip(".")) for name, item in cast("Json", value).items()}
        if isinstance(value, list):
            return [filled(item, f"{path}[{number}]") for number, item in enumerate(cast("list[object]", value))]
        if not isinstance(value, str):
            return value
        whole = _FIELD.fullmatch(value)
        if whole:
            return _known(whole[1], fields, path)
        return _FIELD.sub(lambda found: str(_known(found[1], fields, path)), value)

    return cast("Json", filled(dict(document), ""))


def _known(name: str, fields: Mapping[str, str | int], path: str) -> str | int:
    if name in fields:
        return fields[name]
    known = ", ".join(f"${{{field}}}" for field in fields) or "none"
    if name in FIELDS:
        what, option = f"${{{name}}} is not known here", "run" if name == "name" else name
        hint = f"known here: {known}; write the value itself, or give it with --{option}"
        raise UsageError(what, where=path, hint=hint)
    near = nearest(name, FIELDS)
    hint = f"did you mean ${{{near}}}? " if near else ""
    raise UsageError(f"${{{name}}} is no field of a template", where=path, hint=f"{hint}known here: {known}")


def set_fields(document: Mapping[str, object], changes: Sequence[str]) -> Json:
    """``spec.source.iteration=500``: fields by path, values as in YAML's JSON part, anything else is text."""
    found = deepcopy(dict(document))
    for change in changes:
        path, equals, text = change.partition("=")
        names = path.split(".")
        if not equals or not all(names):
            raise UsageError(
                f"--set is {change!r}", where="the command line", hint="write --set spec.source.path=run7/ms"
            )
        node = found
        for depth, name in enumerate(names[:-1], 1):
            inner = node.setdefault(name, {})
            if not isinstance(inner, dict):
                what = f"{'.'.join(names[:depth])} is no mapping of fields"
                raise UsageError(what, where=f"--set {change}", hint="name a field that has fields")
            node = cast("Json", inner)
        node[names[-1]] = _value(text)
    return found


def _value(text: str) -> object:
    try:
        found: object = json.loads(text)
    except ValueError:
        return text
    return found


def name_for(run: str, *facts: str | int) -> str:
    """The name of the conversion of one checkpoint of one run: the same wherever and however often it is asked for.

    At most 45 characters of a host name; the end is a digest, so that runs whose names begin alike stay apart.
    """
    digest = hashlib.sha256(json.dumps([run, *map(str, facts)]).encode()).hexdigest()[:_HASH_DIGITS]
    tail = "-".join([*(re.sub("[^0-9a-z]", "", str(fact).lower()) for fact in facts), digest])[-(MAX_NAME - 2) :]
    head = re.sub("[^a-z0-9]+", "-", run.lower()).strip("-")[: MAX_NAME - len(tail) - 1].strip("-")
    return f"{head}-{tail}" if head else tail.strip("-")


def named(document: Mapping[str, object], fields: Mapping[str, str | int], name: str | None) -> Json:
    """The filled document under its own name.

    ``name`` counts first; then a name that the template makes from fields; else, where epoch and step are known, one
    made from the template's name and them.
    """
    metadata = document.get("metadata")
    given = cast("Json", metadata).get("name") if isinstance(metadata, Mapping) else None
    found = fill(document, {"name": str(given or ""), **fields} if "${" not in str(given) else fields)
    head = dict(cast("Json", found.get("metadata") or {}))
    if name:
        head["name"] = name
    elif isinstance(given, str) and "${" not in given and {"epoch", "step"} <= set(fields):
        run = str(fields.get("name", given))
        head["name"] = name_for(
            run, *(fields[field] for field in ("uid",) if field in fields), fields["epoch"], fields["step"]
        )
    return {**found, "metadata": head}
