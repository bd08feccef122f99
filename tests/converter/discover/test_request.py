"""Requests: what decides the result, and rule files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.names import Rules
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover.request import Request, digest, load_rules, rules_of
from ckpt2pt.errors import MissingInputError, UsageError

REQUEST = Request(topology=Topology(num_layers=4), source=Path("s"), metadata=Path("m"), target=Path("t"))

DECIDES: dict[str, dict[str, Any]] = {
    "mode": {"full": False}, "layers": {"topology": Topology(num_layers=8)}, "target-data": {"target_data": 4},
    "noop": {"topology": Topology(num_layers=4, noop=frozenset({3}))}, "samples": {"reference_samples": True},
    "stage-list": {"topology": Topology(num_layers=4, layers_per_stage=(4,))},
    "tensor": {"topology": Topology(num_layers=4, tensor=2)}, "context": {"topology": Topology(num_layers=4, context=2)},
    "rules": {"rules": Rules(ignore=("x",))},
}  # fmt: skip
DOES_NOT: dict[str, dict[str, Any]] = {
    "workers": {"workers": 9}, "timeout": {"timeout": 5.0}, "verify": {"verify": "none"}, "in-process": {"in_process": True},
    "overwrite": {"overwrite": True}, "target": {"target": Path("elsewhere")},
}  # fmt: skip


@pytest.mark.parametrize("case", DECIDES)
def test_what_decides_the_result_is_part_of_the_meaning(case: str) -> None:
    assert digest(replace(REQUEST, **DECIDES[case]).identity_options()) != digest(REQUEST.identity_options())


@pytest.mark.parametrize("case", DOES_NOT)
def test_how_it_is_carried_out_is_not(case: str) -> None:
    assert digest(replace(REQUEST, **DOES_NOT[case]).identity_options()) == digest(REQUEST.identity_options())


def test_a_digest_does_not_depend_on_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})


def rules(folder: Path, text: str) -> Rules:
    (folder / "rules.yaml").write_text(text)
    return load_rules(folder / "rules.yaml")


def test_a_rule_file_has_four_sections(tmp_path: Path) -> None:
    text = "layer_modules: {mlp.gate: mlp.g}\nmodules: {a.b: c}\nignore: [ema.*]\npickle_globals: [x.Y]\n"
    assert rules(tmp_path, text) == Rules(
        layer_modules={"mlp.gate": "mlp.g"}, modules={"a.b": "c"}, ignore=("ema.*",), pickle_globals=("x.Y",)
    )


@pytest.mark.parametrize("text", ["", "ignore:\n", "{}"])
def test_an_empty_rule_file_adds_nothing(text: str, tmp_path: Path) -> None:
    assert rules(tmp_path, text) == Rules()


def test_no_rule_file_adds_nothing() -> None:
    assert rules_of(None) == Rules()


@pytest.mark.parametrize(
    ("given", "what"), [("", "neither rules nor the path"), ("[]", "not a mapping"), ('["a"]', "not a map")]
)
def test_rules_that_are_none_are_wrong_usage(given: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        rules_of(given)


@pytest.mark.parametrize(
    "text",
    ["- a", "ignore: x", "ignore: [1]", "ignore: ['']", "modules: [a]", "modules: {a: 1}", "modules: {1: a}", "unknown: 3",
     "a: [", "!!python/object/apply:os.system [exit]", "3: x"],
)  # fmt: skip
def test_a_rule_file_of_another_shape_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        rules(tmp_path, text)
    assert caught.value.where.endswith("rules.yaml")


def test_a_rule_file_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        load_rules(tmp_path / "rules.yaml")
