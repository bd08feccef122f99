"""The CRD: well-formed, described, small, and in step with the code."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from ckpt2pt.cli.commands import build_parser
from ckpt2pt.kube.conversion.document import fields_of, validate
from ckpt2pt.kube.conversion.job import build_job
from ckpt2pt.kube.conversion.spec import API_VERSION, KIND, parse
from documents import CRD_PATH, EXAMPLE_PATH, crd, minimal, root_schema

Schema = dict[str, Any]


def properties(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    for name, inner in schema.get("properties", {}).items():
        yield f"{path}.{name}".lstrip("."), inner
        yield from properties(inner, f"{path}.{name}")
        if isinstance(inner.get("items"), dict):
            yield from properties(inner["items"], f"{path}.{name}[]")


FIELDS = dict(properties(root_schema()))


def rules(schema: Schema, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for rule in schema.get("x-kubernetes-validations", []):
        yield path, rule
    for name, inner in schema.get("properties", {}).items():
        yield from rules(inner, f"{path}.{name}".lstrip("."))


RULES = list(rules(root_schema()))


def test_names_are_those_of_the_code() -> None:
    spec = crd()["spec"]
    [version] = spec["versions"]
    assert f"{spec['group']}/{version['name']}" == API_VERSION
    assert spec["names"]["kind"] == KIND
    assert crd()["metadata"]["name"] == f"{spec['names']['plural']}.{spec['group']}"
    assert (spec["scope"], spec["names"]["shortNames"], spec["names"]["categories"]) == ("Namespaced", ["ckc"], ["ml"])
    assert version["subresources"] == {"status": {}}
    assert version["served"] is version["storage"] is True


def test_it_fits_into_the_annotation_of_kubectl_apply() -> None:
    assert CRD_PATH.stat().st_size < 200_000


def test_it_has_no_yaml_anchors() -> None:
    """Helm and others re-render the file."""
    assert not [event for event in yaml.parse(CRD_PATH.read_text()) if isinstance(event, yaml.AliasEvent)]


def test_every_field_has_a_type_and_says_what_it_is_for() -> None:
    for path, schema in FIELDS.items():
        assert "type" in schema or schema.get("x-kubernetes-int-or-string"), path
        # The API server refuses a description of metadata.
        assert path == "metadata" or re.fullmatch(r"\S.*[.]", schema.get("description", "")), path


def test_no_field_is_nullable() -> None:
    """null then means absent, to the API server and to document.py alike."""
    assert not [path for path, schema in FIELDS.items() if schema.get("nullable")]


def test_lists_and_texts_are_bounded() -> None:
    """An operator holds the objects of many users; what is of any form, kube/conversion/size.py bounds."""
    for path, schema in FIELDS.items():
        if path.startswith(("spec", "status")):
            assert schema.get("type") != "array" or "maxItems" in schema, path
            texts = {"maxLength", "enum", "format"} & set(schema)
            assert schema.get("type") != "string" or texts, path
            if "additionalProperties" in schema:
                assert "maxProperties" in schema, path
                # Of a mapping of anything the API server knows no type, so no rule can look at it.
                free = "x-kubernetes-preserve-unknown-fields" in schema["additionalProperties"]
                assert free or "name.size() <= 317" in str(schema["x-kubernetes-validations"]), path


def test_whole_numbers_are_bounded_as_those_of_a_job_are() -> None:
    """Its ttlSecondsAfterFinished has 32 bits, as ids have; its activeDeadlineSeconds become nanoseconds of 64 bits."""
    free = {"spec.source.iteration", "spec.workers.tolerations[].tolerationSeconds"}
    for path, schema in FIELDS.items():
        for each in (schema, schema.get("items", {})):
            if path.startswith("spec") and each.get("type") == "integer" and path not in free:
                assert each.get("maximum", 1 << 63) < 1 << 31, path


def test_defaults_obey_their_own_schema() -> None:
    validate(minimal(), where="the shortest document")
    for path, schema in FIELDS.items():
        if "enum" in schema and "default" in schema:
            assert schema["default"] in schema["enum"], path


@pytest.mark.parametrize(("path", "rule"), RULES, ids=[f"{path}-{number}" for number, (path, _) in enumerate(RULES)])
def test_a_rule_gives_advice(path: str, rule: dict[str, Any]) -> None:
    message = rule["message"]
    assert len(message.split()) >= 5
    assert message[0].islower()
    assert not re.search(r"[.!?]$", message)
    assert set(rule) <= {"rule", "message", "fieldPath"}
    if "fieldPath" in rule:
        assert f"{path}{rule['fieldPath']}".lstrip(".") in FIELDS


MUTABLE = {"suspend", "cancel", "workers", "ttlSecondsAfterFinished", "timeToLiveSeconds"}


def test_every_field_of_the_spec_is_fixed_but_for_five() -> None:
    fixed = {rule["fieldPath"][1:] for path, rule in RULES if path == "spec" and "oldSelf" in rule["rule"]}
    assert set(root_schema()["properties"]["spec"]["properties"]) - fixed == MUTABLE - {"cancel"}
    [cancel] = [rule["rule"] for path, rule in RULES if path == "spec" and rule.get("fieldPath") == ".cancel"]
    assert cancel == "!oldSelf.cancel || self.cancel"


def test_of_the_workers_only_their_number_changes_and_presence_counts() -> None:
    workers = root_schema()["properties"]["spec"]["properties"]["workers"]["properties"]
    found = {rule["fieldPath"][1:]: rule["rule"] for path, rule in RULES if path == "spec.workers"}
    assert set(workers) - set(found) == {"maxParallelStages"}
    for name, rule in found.items():
        assert (
            rule == f"has(self.{name}) == has(oldSelf.{name}) && (!has(self.{name}) || self.{name} == oldSelf.{name})"
        )


def test_the_three_volumes_and_the_three_paths_are_alike() -> None:
    spec = root_schema()["properties"]["spec"]["properties"]
    for part in ("volume", "path"):
        found = [
            {
                key: value
                for key, value in spec[role]["properties"][part].items()
                if key not in {"description", "default"}
            }
            for role in ("source", "metadata", "target")
        ]
        assert found[0] == found[1] == found[2]


def test_columns_show_fields_that_exist() -> None:
    columns = crd()["spec"]["versions"][0]["additionalPrinterColumns"]
    for column in columns:
        path = re.sub(r"\[\?.*?\]", "[]", column["jsonPath"]).lstrip(".")
        assert path in FIELDS or path == "metadata.creationTimestamp", path
    shown = [column["name"] for column in columns if not column.get("priority")]
    assert shown == ["Phase", "Progress", "Stages", "Iteration", "Reason", "Age"]


# ---------------------------------------------------------------------------------------------------- flags and fields

# All fields in one; how one process is watched and cut up, which is no matter of the conversion.
WITHOUT_FIELD = {
    "-h", "--spec", "--stage", "--multiprocess-off", "--progress", "--output", "--log-format", "--termination-log", "--progress-port",
}  # fmt: skip
# What only a cluster has, or what `ckpt2pt run` does itself.
WITHOUT_FLAG = re.compile(
    r"spec\.(dryRun|startAfter|pendingDeadlineSeconds|activeDeadlineSeconds|ttlSecondsAfterFinished|timeToLiveSeconds|suspend|cancel)"
    r"|spec\.retries\..*|spec\..*volume.*|spec\.model\.rules\..*"
    r"|spec\.workers\.(?!processes|rankTimeoutSeconds).*|spec\.startAfter\..*|spec\.follow.*"
)


def flags_of_convert() -> dict[str, str]:
    [commands] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return {action.option_strings[0]: action.help or "" for action in commands.choices["convert"]._actions}


def test_every_flag_of_convert_names_its_field() -> None:
    named = {flag: re.findall(r"\((spec(?:\.\w+)+)", text) for flag, text in flags_of_convert().items()}
    assert {flag for flag, fields in named.items() if not fields} == WITHOUT_FIELD
    assert {field for fields in named.values() for field in fields} <= fields_of()


def test_every_field_has_a_flag_unless_it_is_a_matter_of_the_cluster() -> None:
    named = {field for text in flags_of_convert().values() for field in re.findall(r"\((spec(?:\.\w+)+)", text)}
    leaves = {field for field in fields_of() if not any(other.startswith(f"{field}.") for other in fields_of())}
    assert {field for field in leaves - named if not WITHOUT_FLAG.fullmatch(field)} == set()


@pytest.mark.parametrize("name", ["conversion.yaml", "import.yaml"])
def test_the_example_is_valid_and_makes_a_job_of_known_fields(name: str) -> None:
    document = validate(yaml.safe_load(EXAMPLE_PATH.with_name(name).read_text()), where="the example")
    job: Any = build_job(parse(document), image="worker:1")
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(job["spec"]) <= {
        "completionMode", "completions", "parallelism", "backoffLimitPerIndex", "maxFailedIndexes",
        "podReplacementPolicy", "podFailurePolicy", "activeDeadlineSeconds", "suspend", "template",
    }  # fmt: skip
    assert job["spec"]["completions"] == 4
