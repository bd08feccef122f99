"""Templates: fields filled with the right types, names that are the same whenever they are asked for."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.spec import MAX_NAME
from ckpt2pt.kube.conversion.template import fill, name_for, named, set_fields

DNS = re.compile("[a-z0-9]([-a-z0-9]*[a-z0-9])?")


def test_a_field_alone_keeps_its_type_and_one_in_a_text_does_not() -> None:
    template = {"a": "${step}", "b": ["x-${epoch}-${step}", 5, None, True], "c": {"d": "${name}"}}
    assert fill(template, {"step": 500, "epoch": 0, "name": "run"}) == {
        "a": 500, "b": ["x-0-500", 5, None, True], "c": {"d": "run"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("${uid}", "${uid} is not known here"),
        ("a ${home}", "${home} is no field of a template"),
        ("${}", "${} is no field"),
    ],
)
def test_a_field_that_cannot_be_filled_is_reported_with_its_place(text: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        fill({"spec": {"paths": [{"path": text}]}}, {"step": 1})
    assert caught.value.what.startswith(what)
    assert caught.value.where == "spec.paths[0].path"
    assert "${step}" in caught.value.hint


def test_values_are_not_templates() -> None:
    assert fill({"a": "${name}"}, {"name": "${step}"}) == {"a": "${step}"}


def test_fields_are_set_by_path() -> None:
    before = {"spec": {"source": {"path": "a"}}}
    changes = ["spec.source.path=b=c", "spec.source.iteration=500", "spec.dryRun=true", "metadata.labels.x=y"]
    assert set_fields(before, changes) == {
        "spec": {"source": {"path": "b=c", "iteration": 500}, "dryRun": True}, "metadata": {"labels": {"x": "y"}},
    }  # fmt: skip
    assert before == {"spec": {"source": {"path": "a"}}}


@pytest.mark.parametrize("change", ["spec", "=5", "spec..a=1", "spec.source.path.deeper=1"])
def test_a_change_that_is_none_is_refused(change: str) -> None:
    with pytest.raises(UsageError, match=r"--set|no mapping"):
        set_fields({"spec": {"source": {"path": "a"}}}, [change])


@given(st.text(), st.integers(0, 10**12), st.integers(0, 10**12), st.text())
def test_any_run_has_a_name_that_a_pod_can_be_called(run: str, epoch: int, step: int, uid: str) -> None:
    name = name_for(run, uid, epoch, step)
    assert DNS.fullmatch(name)
    assert len(name) <= MAX_NAME
    assert name == name_for(run, uid, epoch, step)


def test_names_differ_where_their_runs_do() -> None:
    long = "a-very-long-name-of-a-training-run-that-goes-on-and-on"
    names = {
        name_for(run, epoch, step) for run in (long + "1", long + "2", "x", "X") for epoch in (0, 1) for step in (1, 11)
    }
    assert len(names) == 16
    assert name_for("run", 0, 500).startswith("run-0-500-")


def template(name: str | None) -> dict[str, Any]:
    return {"metadata": {"name": name} if name else {}, "spec": {"source": {"path": "ms-${name}"}}}


MOMENT: dict[str, str | int] = {"epoch": 0, "step": 500}


def test_a_name_is_given_or_filled_or_made() -> None:
    def name_of(given: str | None, fields: dict[str, str | int], name: str | None = None) -> str:
        head: Any = named(template(given), {"name": "r", **fields}, name)["metadata"]
        return str(head.get("name"))

    assert name_of("pretrain", MOMENT, "mine") == "mine"
    assert name_of("ckpt-${step}", MOMENT) == "ckpt-500"
    assert name_of("pretrain", MOMENT) == name_for("r", 0, 500)
    assert name_of("pretrain", {**MOMENT, "uid": "u"}) == name_for("r", "u", 0, 500)
    assert name_of("pretrain", {}) == "pretrain"


def test_the_run_is_called_as_the_template_unless_it_says_otherwise() -> None:
    found: Any = named(template("pretrain"), MOMENT, None)
    assert (found["spec"]["source"]["path"], found["metadata"]["name"]) == ("ms-pretrain", name_for("pretrain", 0, 500))
