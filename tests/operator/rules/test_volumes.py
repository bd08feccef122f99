"""Whether the workers can have their volumes."""

from __future__ import annotations

import pytest

from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt_operator.rules.views import Claim
from ckpt2pt_operator.rules.volumes import claims_of, verdict
from documents import claim
from simulation import conversion

OTHER_TARGET = ("spec.target", {"path": "out", "volume": claim("results")})


def bound(*modes: str, phase: str = "Bound") -> Claim:
    return Claim(phase=phase, modes=frozenset(modes))


@pytest.mark.parametrize(
    ("claims", "workers", "expected"),
    [
        (None, 4, ("Unknown", "NotChecked")),
        ({"training": None}, 4, ("False", "PVCNotFound")),
        ({}, 4, ("False", "PVCNotFound")),
        ({"training": bound("ReadWriteMany")}, 4, ("True", "Bound")),
        ({"training": bound("ReadWriteMany", phase="Pending")}, 4, ("Unknown", "PVCPending")),
        ({"training": bound("ReadWriteMany", phase="Lost")}, 4, ("False", "PVCLost")),
        ({"training": bound("ReadWriteOnce")}, 4, ("False", "AccessModeConflict")),
        ({"training": bound("ReadWriteOnce")}, 1, ("True", "Bound")),
        ({"training": bound("ReadOnlyMany")}, 1, ("False", "AccessModeConflict")),
        ({"training": bound()}, 4, ("True", "Bound")),
    ],
)
def test_verdicts(claims: dict[str, Claim | None] | None, workers: int, expected: tuple[str, str]) -> None:
    assert verdict(parse(conversion()), claims, workers)[:2] == expected


@pytest.mark.parametrize(("mode", "reason"), [("ReadWriteOnce", "Bound"), ("ReadWriteOncePod", "AccessModeConflict")])
def test_workers_beside_each_other_can_share_a_node_but_not_a_pod(mode: str, reason: str) -> None:
    document = parse(conversion(("spec.workers", {"coSchedule": True})))
    assert verdict(document, {"training": bound(mode)}, 4)[1] == reason


def test_a_source_may_be_read_only_and_each_claim_is_looked_for_once() -> None:
    document = parse(conversion(OTHER_TARGET))
    assert set(claims_of(document)) == {"training", "results"}
    claims = {"training": bound("ReadOnlyMany"), "results": bound("ReadWriteMany")}
    assert verdict(document, claims, 4)[:2] == ("True", "Bound")
    status, reason, message = verdict(document, claims | {"results": None}, 4)
    assert (status, reason) == ("False", "PVCNotFound")
    assert '"results"' in message
    assert "spec.target.volume" in message


def test_no_claim_no_trouble() -> None:
    document = parse(conversion(("spec.source.volume", {"hostPath": {"path": "/data"}})))
    assert verdict(document, None, 4)[:2] == ("True", "Bound")
