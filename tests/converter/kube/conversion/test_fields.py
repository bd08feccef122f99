"""Documents are read into their types, and every mistake in one is reported at once."""

from __future__ import annotations

import pytest

from ckpt2pt.kube.conversion.fields import Finding, decode, to_error
from ckpt2pt.kube.conversion.schema import Follow, Model, Retries, Spec, Workload


def test_null_is_as_good_as_absent() -> None:
    findings: list[Finding] = []
    found = decode({"model": {"numLayers": None}, "verify": None, "retries": None}, Spec, "spec", findings)
    assert (found, findings) == (Spec(), [])


@pytest.mark.parametrize(
    ("value", "field", "hint"),
    [
        pytest.param({"model": {"numLayers": "4"}}, "model.numLayers", "write a whole number", id="text-for-a-number"),
        pytest.param({"model": {"numLayers": True}}, "model.numLayers", "write a whole number", id="a-flag"),
        pytest.param({"model": {"numLayers": 0}}, "model.numLayers", "a whole number of at least 1", id="too-small"),
        pytest.param({"source": {"path": 4}}, "source.path", "write text", id="a-number-for-text"),
        pytest.param({"dryRun": "yes"}, "dryRun", "write true or false", id="text-for-a-flag"),
        pytest.param({"mode": "Three"}, "mode", "write Full or ParamsOnly", id="no-such-choice"),
        pytest.param({"model": {"noopLayers": [1, "2"]}}, "model.noopLayers[1]", "a whole number", id="text-in-a-list"),
        pytest.param({"model": {"noopLayers": 3}}, "model.noopLayers", "write a list", id="a-number-for-a-list"),
        pytest.param(
            {"model": {"rules": {"modules": {"a": 1}}}}, "model.rules.modules", "write text", id="in-a-mapping"
        ),
        pytest.param({"follow": {"until": {"name": "A"}}}, "follow.until.name", "lower-case", id="a-name"),
        pytest.param({"model": 4}, "model", "write a mapping of fields", id="no-mapping"),
    ],
)
def test_a_wrong_value_is_reported_and_the_default_takes_its_place(value: object, field: str, hint: str) -> None:
    findings: list[Finding] = []
    decode(value, Spec, "spec", findings)
    [finding] = findings
    assert finding.field.startswith(f"spec.{field}")
    assert hint in finding.hint


def test_all_that_is_wrong_is_reported_and_the_rest_is_kept() -> None:
    findings: list[Finding] = []
    found = decode(
        {"keep": -1, "intervalSeconds": 7, "until": {"kind": 3, "name": "a"}}, Follow, "spec.follow", findings
    )
    assert found == Follow(interval_seconds=7, until=Workload(name="a"))
    assert {finding.field for finding in findings} == {"spec.follow.keep", "spec.follow.until.kind"}


@pytest.mark.parametrize("value", [3, "x", [], {"perStage": {}, "maxMemory": []}])
def test_whatever_a_document_holds_something_can_be_worked_with(value: object) -> None:
    findings: list[Finding] = []
    assert decode(value, Retries, "spec.retries", findings) == Retries()
    assert findings


def test_fields_that_nobody_knows_are_passed_by() -> None:
    findings: list[Finding] = []
    assert decode({"numLayers": 3, "colour": {"a": [None]}}, Model, "spec.model", findings) == Model(num_layers=3)
    assert findings == []


def test_one_finding_is_an_ordinary_error_and_several_are_a_list() -> None:
    one = Finding(field="spec.a", what="is 1", hint="write 2")
    two = Finding(field="spec.b", what="is 3", hint="write 4")
    alone = to_error([one], "demo.yaml")
    assert (alone.what, alone.where, alone.hint) == ("spec.a is 1", "demo.yaml: spec.a", "write 2")
    both = to_error([one, two], "demo.yaml")
    assert both.exit_code == 64
    assert "2 fields are wrong" in both.what
