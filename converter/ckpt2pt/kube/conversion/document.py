"""Read a CheckpointConversion from a file and check it with the CRD's own schema, as an API server would.

    conversion.yaml --safe YAML--> JSON values --nulls out--> schema (unknown fields are errors) --defaults in--> document

Every violation is reported at once, in words: which field, what it is, what to write.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import jsonschema
import yaml

from ckpt2pt.errors import FileAccessError, UsageError
from ckpt2pt.io.access import access_error
from ckpt2pt.io.files import read_all
from ckpt2pt.kube.conversion.fields import Finding, to_error
from ckpt2pt.kube.conversion.loading import MAX_BYTES, load
from ckpt2pt.kube.conversion.names import HINTS
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt.kube.conversion.spec import API_VERSION, KIND

_CRD = "checkpointconversions.yaml"
_HINT = "see examples/conversion.yaml for the form of the document"


def read(path: Path) -> Json:
    """The document in a file (``-`` is standard input), proved and with every default of the schema."""
    where = "standard input" if str(path) == "-" else str(path)
    return validate(load(_text(path), where), where=where)


def load_mapping(path: Path) -> Json:
    """A document as it stands in a file, unchecked: a template is no CheckpointConversion yet."""
    where = "standard input" if str(path) == "-" else str(path)
    found = load(_text(path), where)
    if not isinstance(found, dict):
        raise UsageError("the document is not a mapping of fields", where=where, hint=_HINT)
    return cast("Json", found)


def validate(document: object, *, where: str) -> Json:
    """Check a document with the schema; returns it without nulls and with the defaults."""
    if not isinstance(document, dict):
        raise UsageError("the document is not a mapping of fields", where=where, hint=_HINT)
    document = cast("Json", document)
    if (document.get("apiVersion"), document.get("kind")) != (API_VERSION, KIND):
        raise UsageError(
            f"kind is {document.get('kind')}, apiVersion is {document.get('apiVersion')}",
            where=where,
            hint=f"begin it with apiVersion: {API_VERSION} and kind: {KIND}",
        )
    schema = _schema()
    pruned = cast("Json", _without_nulls(document, schema))
    # What status says was written by an operator, and asks for nothing.
    asked = {name: value for name, value in pruned.items() if name != "status"}
    checker: Any = jsonschema.Draft202012Validator(cast("Any", _strict(schema)))
    findings = [finding for error in checker.iter_errors(asked) for finding in _findings(error)]
    if findings:
        raise to_error(sorted(findings, key=lambda finding: finding.field), where)
    whole = cast("Json", _with_defaults(asked, schema))
    return {name: value for name, value in whole.items() if name != "status"}


# ------------------------------------------------------------------------------------------------------------- reading


def _text(path: Path) -> bytes:
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if str(path) == "-" else read_all(path, MAX_BYTES + 1)
    except OSError as error:
        raise access_error(error, path, "reading", option="-f") from error
    if len(data) > MAX_BYTES:
        raise UsageError(f"larger than {MAX_BYTES >> 20} MiB", where=path, hint="give a CheckpointConversion with -f")
    return data


# -------------------------------------------------------------------------------------------------------------- schema


def crd_path() -> Path:
    """The CRD: beside this module in an installed distribution, in ``crds/`` in a checkout."""
    here = Path(__file__)
    beside = here.with_name(_CRD)
    return beside if beside.is_file() else here.parents[4] / "crds" / _CRD


@cache
def _schema() -> Json:
    try:
        crd = cast("dict[str, Any]", yaml.safe_load(crd_path().read_bytes()))
    except OSError as error:
        hint = "install ckpt2pt again"
        raise FileAccessError(f"the CRD cannot be read: {error.strerror}", where=crd_path(), hint=hint) from error
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}  # every object has its fields
    return cast("Json", schema)


def _properties(schema: Json) -> dict[str, Json]:
    return cast("dict[str, Json]", schema.get("properties", {}))


def _strict(schema: Json) -> Json:
    """A structural schema as JSON schema: fields that it does not name are refused instead of dropped."""
    kept = (
        "type",
        "enum",
        "required",
        "pattern",
        "minimum",
        "maximum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
    )
    found: Json = {key: schema[key] for key in (*kept, "maxProperties") if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if schema.get("x-kubernetes-list-type") == "set":
        found["uniqueItems"] = True
    if "properties" in schema:
        found["properties"] = {name: _strict(inner) for name, inner in _properties(schema).items()}
        found["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    for inner in ("items", "additionalProperties"):
        if isinstance(schema.get(inner), dict):
            found[inner] = _strict(cast("Json", schema[inner]))
    return found


def _without_nulls(value: object, schema: Json) -> object:
    """An API server takes null for absent in every field that is not nullable, and none of ours is."""
    if isinstance(value, dict):
        fields = _properties(schema)
        return {
            name: _without_nulls(item, fields.get(name, {}))
            for name, item in cast("Json", value).items()
            if item is not None or name not in fields
        }
    if isinstance(value, list):
        return [_without_nulls(item, cast("Json", schema.get("items", {}))) for item in cast("list[object]", value)]
    return value


def _with_defaults(value: object, schema: Json) -> object:
    if isinstance(value, dict):
        found = dict(cast("Json", value))
        for name, inner in _properties(schema).items():
            if name not in found and "default" in inner:
                found[name] = inner["default"]
            if name in found:
                found[name] = _with_defaults(found[name], inner)
        return found
    if isinstance(value, list):
        return [_with_defaults(item, cast("Json", schema.get("items", {}))) for item in cast("list[object]", value)]
    return value


# ------------------------------------------------------------------------------------------------------------ in words


_KINDS = {
    "object": "a mapping of fields",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
}


def _findings(error: jsonschema.ValidationError) -> Iterator[Finding]:
    path = _path(error.absolute_path)
    instance: object = error.instance
    if error.validator == "additionalProperties":
        known = cast("Json", error.schema)["properties"]
        for name in sorted(set(cast("Json", instance)) - set(cast("Json", known))):
            yield Finding(
                field=_join(path, name), what="is an unknown field", hint=_hint(path, name, list(cast("Json", known)))
            )
    elif error.validator == "required":
        for name in cast("list[str]", error.validator_value):
            if name not in cast("Json", instance):
                yield Finding(field=_join(path, name), what="is missing", hint="give it")
    else:
        yield Finding(field=path, what=f"is {_shown(instance)}", hint=_wanted(error))


def _path(parts: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping of fields"
    if isinstance(value, list):
        return f"a list of {len(cast('list[object]', value))}"
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)[:80]


def _wanted(error: jsonschema.ValidationError) -> str:
    """What to write instead."""
    value: object = error.validator_value
    if error.validator == "type":
        kinds = cast("list[str]", value) if isinstance(value, list) else [str(value)]
        return "write " + " or ".join(_KINDS.get(kind, kind) for kind in kinds)
    if error.validator == "enum":
        return f"write {' or '.join(map(str, cast('list[object]', value)))}"
    words = {
        "pattern": HINTS.get(str(value), "write a quantity, as 2, 500m or 1Gi"),
        "minimum": f"write at least {value}",
        "maximum": f"write at most {value}",
        "minLength": "do not leave it empty",
        "maxLength": f"write at most {value} characters",
        "minItems": f"list at least {value}",
        "maxItems": f"list at most {value}",
        "maxProperties": f"give at most {value} fields",
        "uniqueItems": "list each value once",
    }
    return words.get(str(error.validator), error.message)


def _hint(path: str, name: str, siblings: list[str]) -> str:
    """Where the field belongs, or what it was meant to be called."""
    beside = {_bare(sibling): sibling for sibling in siblings}
    near = difflib.get_close_matches(_bare(name), beside, n=1, cutoff=0.7)
    if near:
        return f"write {beside[near[0]]}"
    elsewhere: dict[str, list[str]] = {}
    for full in sorted(fields_of()):
        elsewhere.setdefault(_bare(full.rpartition(".")[2]), []).append(full)
    far = difflib.get_close_matches(_bare(name), elsewhere, n=1, cutoff=0.8)
    if far:
        return f"its place is {' or '.join(elsewhere[far[0]])}"
    return f"remove it; {path or 'the document'} has the fields {', '.join(sorted(siblings))}"


def _bare(name: str) -> str:
    return re.sub("[-_]", "", name).lower()


@cache
def fields_of() -> frozenset[str]:
    """Full names of the fields of ``spec``, as ``spec.model.numLayers``."""

    def walk(schema: Json, path: str) -> Iterator[str]:
        for name, inner in _properties(schema).items():
            yield _join(path, name)
            yield from walk(inner, _join(path, name))

    return frozenset(walk(_properties(_schema())["spec"], "spec"))
