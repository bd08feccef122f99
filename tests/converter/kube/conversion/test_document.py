"""A document from a file is checked by the CRD's own schema, and every violation is reported in words."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ckpt2pt.errors import Ckpt2ptError, MissingInputError, UsageError
from ckpt2pt.kube.conversion import document
from ckpt2pt.kube.conversion.document import crd_path, fields_of, read, validate
from ckpt2pt.kube.conversion.loading import MAX_BYTES
from documents import ABSENT, CRD_PATH, EXAMPLE_PATH, changed, minimal, write


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(minimal()))
    assert read(write(tmp_path / "a.yaml", minimal())) == read(tmp_path / "a.json")


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(yaml.safe_dump(minimal()).encode())))
    assert read(Path("-"))["metadata"] == {"name": "demo"}


def test_defaults_are_put_in_also_where_a_whole_object_is_absent() -> None:
    spec: Any = validate(minimal(), where="demo")["spec"]
    assert spec["mode"] == "Full"
    assert spec["parallelism"] == dict.fromkeys(("tensor", "pipeline", "virtualPipeline", "data", "context"), 1)
    assert spec["retries"] == {}, "an operator may have others"
    assert spec["workers"]["processes"] == 2
    assert spec["model"]["noopLayers"] == []


def test_null_asks_for_the_default() -> None:
    spec: Any = validate(changed(("spec.verify", None), ("spec.source.iteration", None)), where="demo")["spec"]
    assert spec["verify"] == "Digest"
    assert "iteration" not in spec["source"]


def test_the_status_of_a_document_taken_from_a_cluster_is_left_out() -> None:
    assert "status" not in validate(minimal() | {"status": {"phase": "Running", "whatever": 1}}, where="demo")


def test_validating_does_not_change_the_defaults_of_the_schema() -> None:
    first: Any = validate(minimal(), where="demo")
    first["spec"]["parallelism"]["tensor"] = 99
    first["spec"]["model"]["noopLayers"].append(1)
    second: Any = validate(minimal(), where="demo")
    assert second["spec"]["parallelism"]["tensor"] == 1
    assert second["spec"]["model"]["noopLayers"] == []


#     what is changed -> the field, what is said of it, and how to correct it
VIOLATIONS = {
    "misspelled": ("spec.parallelism.tensr", 2, "is an unknown field", "write tensor"),
    "snake-case": ("spec.model.num_layers", 2, "is an unknown field", "write numLayers"),
    "wrong-place": ("spec.numLayers", 2, "is an unknown field", "its place is spec.model.numLayers"),
    "flag-for-a-field": ("spec.workers.process-limit", 2, "is an unknown field", "remove it"),
    "stranger": ("spec.colour", "red", "is an unknown field", "remove it; spec has the fields"),
    "stranger-at-the-top": ("colour", "red", "is an unknown field", "remove it"),
    "missing": ("spec.target.path", ABSENT, "is missing", "give it"),
    "text-for-a-number": ("spec.model.numLayers", "4", "is '4'", "write a whole number"),
    "a-flag-for-a-number": ("spec.model.numLayers", True, "is true", "write a whole number"),
    "a-list-for-a-mapping": ("spec.model", [4], "is a list of 1", "write a mapping of fields"),
    "too-small": ("spec.parallelism", {"pipeline": 0}, "is 0", "write at least 1"),
    "too-large": ("spec.parallelism", {"pipeline": 9999}, "is 9999", "write at most 1024"),
    "no-such-choice": ("spec.verify", "Twice", "is 'Twice'", "write None or Digest or Full"),
    "no-quantity": ("spec.workers.resources", {"limits": {"memory": "lots"}}, "is 'lots'", "as 2, 500m or 1Gi"),
    "no-name": (
        "spec.source.volume.persistentVolumeClaim.claimName",
        "../x",
        "is '../x'",
        "write the name of an object",
    ),
    "empty": ("spec.metadata.path", "", "is ''", "do not leave it empty"),
    "twice": ("spec.model.noopLayers", [1, 1], "is a list of 2", "list each value once"),
    "in-a-list": ("spec.model.noopLayers", [1, -1], "is -1", "write at least 0"),
}


@pytest.mark.parametrize(("field", "value", "what", "hint"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_reported_in_words(field: str, value: object, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as refused:
        validate(changed((field, value)), where="demo.yaml")
    assert refused.value.where.startswith(f"demo.yaml: {field}")
    assert what in refused.value.what
    assert hint in refused.value.hint


def test_all_violations_are_reported_at_once_in_the_order_of_the_fields() -> None:
    with pytest.raises(UsageError) as refused:
        validate(changed(("spec.verify", "x"), ("spec.mode", "y"), ("spec.colour", 1)), where="demo.yaml")
    lines = [line.partition(":")[0].strip(" -") for line in refused.value.what.splitlines()[1:]]
    assert lines == ["spec.colour", "spec.mode", "spec.verify"]


ALIASES = "a: &a [x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
)
#   text -> a word of the refusal
TEXTS = {
    "nothing": ("", "holds no document"),
    "two-documents": ("a: 1\n---\nb: 2\n", "2 documents"),
    "a-list": ("[1, 2]", "not a mapping"),
    "a-word": ("hello", "not a mapping"),
    "broken": ("a: [1", "not a YAML document"),
    "binary": (b"\x80\x00\x01", "not a YAML document"),
    "a-python-object": ("!!python/object/apply:os.system [echo]", "not a YAML document"),
    "a-field-twice": ("apiVersion: ckpt2pt.dev/v1alpha1\nkind: A\nkind: B\n", "kind is given twice"),
    "a-date": ("a: 2024-01-01\n", "read as a date"),
    "a-number-as-a-name": ("1: a\n", "used as a name"),
    "billion-laughs": (ALIASES, "100000 values"),
    "a-loop": ("a: &a [*a]\n", "inside each other"),
    "deep": ("[" * 5000, "YAML"),
    "another-kind": ("apiVersion: v1\nkind: Pod\n", "kind is Pod, apiVersion is v1"),
    "too-large": (b"#" * (MAX_BYTES + 1), "larger than 1 MiB"),
}


@pytest.mark.parametrize(("text", "word"), TEXTS.values(), ids=TEXTS)
def test_what_is_no_document_is_refused(tmp_path: Path, text: str | bytes, word: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UsageError) as refused:
        read(path)
    assert word in refused.value.what
    assert str(path) in refused.value.where


@pytest.mark.parametrize(
    ("name", "error"), [pytest.param("none.yaml", MissingInputError, id="absent"), pytest.param(".", UsageError, id="folder"), pytest.param("loop", MissingInputError, id="link-to-itself"), pytest.param("x" * 300, MissingInputError, id="name-too-long")]
)  # fmt: skip
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, error: type[Ckpt2ptError]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(error):
        read(tmp_path / name)


def test_the_example_has_only_fields_that_exist_also_where_it_is_commented_out() -> None:
    text = EXAMPLE_PATH.read_text()
    read(EXAMPLE_PATH)
    uncommented = yaml.safe_load(
        "\n".join(line.replace("# ", "", 1) if line.lstrip().startswith("# ") and line.startswith("  ") else line for line in text.splitlines())
    )  # fmt: skip
    uncommented["spec"]["model"]["layersPerStage"] = None
    validate(uncommented, where="the example")
    assert uncommented["spec"]["suspend"] is False


def test_a_checkout_uses_its_own_schema() -> None:
    assert crd_path() == CRD_PATH
    assert "spec.model.numLayers" in fields_of()


def named_fields(schema: Any, path: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Place, name and siblings of every field that a document may have."""
    properties = schema.get("properties", {})
    for name, inner in properties.items():
        if (path, name) != ("", "status"):
            yield path, name, list(properties)
            yield from named_fields(inner.get("items", inner), f"{path}.{name}")


def test_every_field_is_found_again_with_a_letter_missing() -> None:
    fields = list(named_fields(document._schema()))
    assert len(fields) > 100
    for path, name, siblings in fields:
        wrong = name[:-2] + name[-1]
        if len(name) > 3 and wrong not in siblings:
            assert document._hint(path, wrong, siblings) == f"write {name}"
