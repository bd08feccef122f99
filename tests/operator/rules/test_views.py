"""Objects of an API server as views; nothing that comes in is trusted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt2pt.kube.conversion.report import child
from ckpt2pt_operator.rules.views import claim_view, condition, indexes, items, job_view, pod_view, time
from simulation import World

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [("", set()), ("0", {0}), ("0-2,4", {0, 1, 2, 4}), ("x,-1,3-,5-4", {3}), ("0-99999999999", set(range(100_001)))],
)
def test_indexes(intervals: str, expected: set[int]) -> None:
    assert indexes(intervals) == expected


def test_times_have_a_zone() -> None:
    assert time({"t": "2026-01-02T03:04:05Z"}, "t") is not None
    assert time({"t": "2026-01-02T03:04:05+02:00"}, "t") == time({"t": "2026-01-02T01:04:05Z"}, "t")
    for wrong in (
        "2026-01-02T03:04:05",
        "yesterday",
        5,
        None,
        "0001-01-01T00:00:00+14:00",
        "9999-12-31T23:59:59-14:00",
    ):
        assert time({"t": wrong}, "t") is None


@given(ANYTHING)
def test_any_value_can_be_looked_into(value: object) -> None:
    raw = {"metadata": value, "spec": value, "status": value}
    for view in (job_view, pod_view):
        view(dict(raw))
        view(
            {
                "metadata": {"labels": value, "annotations": value, "ownerReferences": value},
                "status": {"conditions": value},
            }
        )
    assert isinstance(child(raw, "metadata", "labels"), dict)
    assert isinstance(items(raw, "spec"), list)


def test_a_job_and_its_pods() -> None:
    world = World()
    world.run()
    world.start(2)
    world.end(1, 65)
    world.control()
    job = job_view(world.jobs["demo-1"])
    assert (job.attempt, job.completions, job.parallelism, job.per_index) == (1, 4, 4, True)
    assert (job.failed, job.completed, job.ending, job.ours) == (frozenset({1}), frozenset(), "", True)
    assert (job.stages, job.stage_of(3)) == (None, 3)
    pods = {pod.index: pod for pod in map(pod_view, world.pods.values())}
    assert {pod.job_uid for pod in pods.values()} == {job.uid}
    assert (pods[2].running, pods[2].over) == (True, False)
    assert (pods[1].running, pods[1].over, pods[1].exit_code) == (False, True, 65)
    assert (pods[0].running, pods[0].over, pods[0].exit_code) == (False, False, None)


def test_indexes_of_some_stages() -> None:
    job = job_view({"metadata": {"annotations": {"ckpt2pt.dev/stages": "3,7"}}})
    assert (job.stage_of(0), job.stage_of(1), job.stage_of(2)) == (3, 7, -1)


def test_conditions_and_claims() -> None:
    assert condition([{"type": "A"}, {"type": "B", "status": "True"}], "B") == {"type": "B", "status": "True"}
    assert condition([], "B") == {}
    claim = claim_view({"spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Pending"}})
    assert (claim.phase, claim.modes) == ("Pending", frozenset({"ReadWriteOnce"}))


@pytest.mark.parametrize("digits", ["9" * 5000, "9" * 19, "\u0663" * 3])
def test_a_number_of_any_length_in_a_label_or_an_annotation_ends_nothing(digits: str) -> None:
    """Whoever may make a pod or a Job may write them, and an error there would end the operator."""
    annotations = {"batch.kubernetes.io/job-completion-index": digits, "ckpt2pt.dev/stages": f"1,{digits}"}
    status = {"completedIndexes": f"0,{digits}", "failedIndexes": f"{digits}-{digits}"}
    raw = {"metadata": {"annotations": annotations, "labels": {"ckpt2pt.dev/attempt": digits}}, "status": status}
    assert pod_view(raw).index < 1 << 63
    assert (job_view(raw).stages or ())[0] == 1
    assert 0 in job_view(raw).completed
