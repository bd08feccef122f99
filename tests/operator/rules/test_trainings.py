"""The table of kinds, what a workload shows, and the conversion that an annotated one asks for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import yaml

from charts import values
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.spec import MAX_NAME
from ckpt2pt_operator.rules.trainings import Kind, Workload, conversion_for, kinds, template_of, workload
from documents import HOSTILE_NAMES, minimal

Raw = dict[str, Any]
ROW: Raw = {
    "apiVersion": "x.example/v1", "kind": "Train", "plural": "trains", "succeeded": {"conditions": ["Done"]},
    "failed": {"phasePath": "status.state.phase", "phases": ["Broken"]},
}  # fmt: skip


def one(**changes: object) -> Kind:
    return kinds([{**ROW, **changes}])[0]


def raw(conditions: Raw | None = None, phase: str = "", **meta: Any) -> Raw:
    """Conditions by type, each with its status."""
    listed = [{"type": kind, "status": status} for kind, status in (conditions or {}).items()]
    status = {"conditions": listed, "state": {"phase": phase}}
    return {"metadata": {"name": "t", "namespace": "n", "uid": "u-1", **meta}, "status": status}


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (raw(), "Running"),
        ({"metadata": {}}, "Running"),
        (raw({"Done": "False"}), "Running"),
        (raw({"Done": "True"}), "Succeeded"),
        (raw({"Other": "True"}), "Running"),
        (raw(phase="Broken"), "Failed"),
        (raw(phase="Done"), "Running"),
        (raw({"Done": "True"}, "Broken"), "Failed"),
        ({"status": {"state": "Broken", "conditions": "none"}}, "Running"),
    ],
)
def test_what_shows_that_it_has_ended(seen: Raw, state: str) -> None:
    assert workload(seen, one()).state == state


def test_why_it_ended_and_when() -> None:
    reported = {
        "type": "Done",
        "status": "True",
        "reason": "R",
        "message": "m",
        "lastTransitionTime": "2026-01-02T03:04:05Z",
    }
    found = workload({"metadata": {}, "status": {"conditions": [reported]}}, one())
    assert found.message == "R: m"
    assert found.ended is not None
    assert found.ended.year == 2026


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plural": ""}, "plural is missing\n  where: trainingKinds, row 0 (Train)"),
        ({"kind": None}, "kind is missing\n  where: trainingKinds, row 0 (without a kind)"),
        ({"failed": {}}, "nothing says when it has succeeded or failed"),
        ({"succeeded": {"phasePath": "status.phase"}}, "nothing says when it has succeeded or failed"),
        ({"succeeded": {"phases": ["x"]}}, "nothing says when it has succeeded or failed"),
    ],
)
def test_a_wrong_row(changes: Raw, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        one(**changes)
    assert said in str(caught.value)


def test_every_kind_of_the_chart_can_be_read() -> None:
    rows = list(values()["trainingKinds"].values())
    found = kinds(rows)
    assert {kind.kind for kind in found} == {"Job", "AscendJob", "TrainJob", "PyTorchJob", "MPIJob"}
    assert {kind.base for kind in found if kind.plural == "jobs"} == {"apis/batch/v1", "apis/batch.volcano.sh/v1alpha1"}
    assert one(apiVersion="v1").base == "api/v1"


# ------------------------------------------------------------------------------------------------------------ annotated


def asking(text: object, **changes: Any) -> Raw:
    base = workload(raw({"Done": "True"}, annotations={"ckpt2pt.dev/convert-on-success": "cm"}), one())
    return conversion_for(replace(base, **changes), {"conversion.yaml": text})


def test_the_template_is_filled_and_named_after_the_run() -> None:
    text = minimal()
    text["metadata"] = {"name": "of-${name}", "labels": {"team": "a"}, "annotations": {"n": "$$ ${namespace}/${uid}"}}
    text["spec"]["source"]["path"] = "runs/${name}"
    found = asking(yaml.safe_dump(text), uid="0123ABCD-4567")
    assert found["metadata"] == {
        "name": "of-t-0123abcd",
        "namespace": "n",
        "labels": {"team": "a", "ckpt2pt.dev/training-uid": "0123ABCD-4567"},
        "annotations": {"n": "$ n/0123ABCD-4567"},
    }
    assert found["spec"]["source"]["path"] == "runs/t"
    assert (found["apiVersion"], found["kind"]) == ("ckpt2pt.dev/v1alpha1", "CheckpointConversion")


@pytest.mark.parametrize("name", ["x" * 80, "Ä.b_c", "---"])
def test_any_name_of_a_training_gives_a_name_of_ours(name: str) -> None:
    text = minimal()
    del text["metadata"]
    made = asking(yaml.safe_dump(text), name=name)["metadata"]["name"]
    assert len(made) <= MAX_NAME
    assert made.endswith("u1")
    assert not made.startswith("-")
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "it has no key conversion.yaml"),
        ("kind: ${step}", "it asks for a ${...} that is not known here"),
        ("a: $", "conversion.yaml cannot be read"),
        ("a:\n  [", "conversion.yaml cannot be read: line 2, column 4"),
        ("[" * 5000, "conversion.yaml cannot be read"),
        ("a: !!set {b}", "conversion.yaml cannot be read"),
        ("a: 2026-01-02", "conversion.yaml cannot be read"),
        ("a: !!python/name:os.system", "conversion.yaml cannot be read"),
        ("a: 1\n---\nb: 2", "conversion.yaml cannot be read"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(
                f"{c}: &{c} [*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p}]\n" for p, c in pairwise("abcdefg")
            ),
            "conversion.yaml cannot be read",
        ),
        ("a: " + "x" * (64 << 10), "conversion.yaml has more than 64 KiB"),
        ("[]", "conversion.yaml is no CheckpointConversion"),
        ("kind: Job", "conversion.yaml is no CheckpointConversion"),
    ],
)
def test_a_wrong_template(text: object, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        asking(text)
    assert said in str(caught.value)
    assert "ConfigMap n/cm" in str(caught.value)


SECRET = "hunter2"
#   what a ConfigMap of the namespace may hold that whoever annotates a training cannot read
HELD = (
    f"password: [{SECRET}, ", f"password: ${{{SECRET}}}", f"{SECRET}: '", f"a: &{SECRET} 1\nb: *{SECRET}x", f"a: !{SECRET} b",
    f"{SECRET}: 1\n{SECRET}: 2", f"- {SECRET}", f"kind: {SECRET}", f"{SECRET}: 2026-01-02", f"$ {SECRET}", f"{SECRET}\n---\n{SECRET}",
    f"? [{SECRET}]\n: 1", f"\t{SECRET}: \n@",
)  # fmt: skip


@pytest.mark.parametrize("text", HELD)
def test_what_is_said_of_a_wrong_template_quotes_nothing_of_it(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        asking(text)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", [*HOSTILE_NAMES[:-1], "a" * 254])
def test_an_annotation_that_is_no_name_is_refused(name: str) -> None:
    found = workload(raw({"Done": "True"}, annotations={"ckpt2pt.dev/convert-on-success": name}), one())
    with pytest.raises(UsageError, match="it is not the name of a ConfigMap") as caught:
        template_of(found)
    assert "annotation ckpt2pt.dev/convert-on-success" in str(caught.value)


def test_one_that_asks_for_nothing() -> None:
    found: Workload = workload(raw(annotations={"ckpt2pt.dev/convert-on-success": 5}), one())
    assert found.template == ""
