"""What is kept of a conversion: little, whatever its owner puts into it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from ckpt2pt.kube.conversion.report import child, text
from ckpt2pt_operator.rules.kept import MAX_PACKED, keep, refused, slim
from ckpt2pt_operator.rules.plan import plan
from ckpt2pt_operator.rules.seen import Seen
from ckpt2pt_operator.rules.views import condition, items
from simulation import HOUSE, START, conversion

Raw = dict[str, Any]
BIG = "x" * 200_000


@pytest.mark.parametrize(
    "meta",
    [
        {"managedFields": [{"fieldsV1": {"f:x": BIG}}]},
        {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": BIG}},
        {"annotations": {"kopf.zalando.org/last-handled-configuration": "[" * 100_000}},
        {"labels": {f"l{number}": "" for number in range(20_000)}},
        {"finalizers": [f"x/{number}" for number in range(20_000)]},
        {"ownerReferences": [{"uid": BIG}]},
        {"annotations": {"ckpt2pt.dev/retry": BIG}},
    ],
    ids=lambda meta: next(iter(meta)),
)
def test_of_metadata_only_what_rules_read_is_kept(meta: Raw) -> None:
    document = conversion()
    expected = slim(document)
    document["metadata"] |= meta
    found = slim(document)
    assert len(json.dumps(found)) < 3000
    assert child(found, "metadata") | {"annotations": 0} == child(expected, "metadata") | {"annotations": 0}
    assert slim(found) == found


def test_what_is_too_large_is_refused_without_its_spec_and_says_why() -> None:
    document = conversion(("spec.workers", {"podOverrides": {"spec": {"x": [{}] * 440_000}}}))
    kept = keep(document)
    assert kept.packed
    assert len(kept.packed) < 500
    found = kept.document()
    assert found
    assert "spec" not in found
    status = plan(Seen(conversion=found, now=START), HOUSE).status
    assert status["phase"] == "Failed"
    accepted = condition(items(status, "conditions"), "Accepted")
    assert accepted["reason"] == "InvalidSpec"
    assert "spec.workers.podOverrides" in text(accepted, "message")
    assert "1,320,016 bytes" in text(accepted, "message")
    assert slim(found) == found, "a second reading says the same"


def test_one_that_is_not_too_large_comes_back_as_it_was() -> None:
    document = conversion(("spec.workers", {"podOverrides": {"spec": {"hostname": "é"}}}))
    document["status"] = {"phase": "Running", "bytesDone": 7}
    kept = keep(document)
    assert kept.document() == document
    assert refused(document) is None
    assert (kept.phase, kept.version, kept.uid) == ("Running", 1, document["metadata"]["uid"])


def test_one_that_cannot_be_packed_small_is_not_held() -> None:
    noise = random.Random(0).randbytes(30_000).hex()
    kept = keep(conversion(("spec.workers", {"podOverrides": {"spec": {"x": noise}}})))
    assert kept.packed is None
    assert kept.document() is None
    assert MAX_PACKED == 16384
