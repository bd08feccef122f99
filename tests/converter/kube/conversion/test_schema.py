"""The types of a spec, and the JSON in which a worker gets one."""

from __future__ import annotations

import pytest

from ckpt2pt.core import names
from ckpt2pt.errors import UsageError
from ckpt2pt.kube.conversion.schema import (
    Follow,
    Model,
    Place,
    Rules,
    Source,
    Spec,
    below,
    from_json,
    rules_of,
    to_json,
)
from documents import root_schema


def test_json_says_what_was_said_and_no_more() -> None:
    spec = Spec(
        mode="ParamsOnly",
        model=Model(num_layers=8, noop_layers=(), rules=Rules(ignore=("$x.*", "é"))),
        source=Source(path="/a b/ms", iteration=5),
        metadata=Place(path="meta"),
    )
    text = to_json(spec)
    assert from_json(text, "test") == spec
    assert '"noopLayers":[]' in text, "none is not the same as not given"
    assert "layersPerStage" not in text


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"mode":"x"}', '{"model":{"numLayers":0}}', '{"verify":null}', "[" * 9999]
)
def test_what_is_no_spec_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not the spec of a conversion") as refused:
        from_json(text, "--spec")
    assert refused.value.where == "--spec"


def test_every_field_of_a_spec_is_one_of_the_schema() -> None:
    known = root_schema()["properties"]["spec"]["properties"]
    assert set(Spec.__struct_encode_fields__) <= set(known)
    assert set(known) - set(Spec.__struct_encode_fields__) == {"timeToLiveSeconds"}, "the operator's alone"
    for name in ("model", "parallelism", "retries", "readiness", "follow"):
        kind = type(getattr(Spec(follow=Follow()), name))
        assert set(kind.__struct_encode_fields__) == set(known[name]["properties"])


def test_paths_and_rules() -> None:
    assert (below("/volumes/source", "."), below("/volumes/source", "run7/ms")) == (
        "/volumes/source",
        "/volumes/source/run7/ms",
    )
    found = rules_of(names.Rules(modules={"a": "b"}, ignore=("x.*",)))
    assert found == Rules(modules={"a": "b"}, ignore=("x.*",))
