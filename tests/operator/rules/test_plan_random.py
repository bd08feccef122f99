"""Random lives of a conversion: whatever happens, in whatever order, some things hold."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ckpt2pt.kube.conversion.status import TERMINAL
from simulation import World, done
from statuses import check_status

CODES = (0, 0, 0, 64, 65, 66, 70, 74, 75, 76, 137, 143)
REPORTS = (
    None,
    None,
    "",
    done([7]),
    done([0, 1, 2, 3]),
    done([0], conversion="uid-of-another"),
    "Traceback (most recent call last):\n  boom",
    '{"version": 1, "exitCode": 75, "reason": "TryAgain", "message": "no space", "bytes": 5, "iteration": 500}',
    '{"version": 1, "reason": "not a word\\n", "message": "\\u0000\\ud800", "bytes": 9223372036854775807}',
)


class Life(RuleBasedStateMachine):
    """The world moves between any two looks of the operator, and the operator may die after any write."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(
            ("spec.workers.resources", {"limits": {"memory": "256Mi"}}), ("spec.retries", {"perStage": 1})
        )
        self.done: set[int] = set()
        self.really_done: set[int] = set()
        self.tokens = 0
        self.ended = ""
        self.token: object = ""
        self.retried = False

    # ------------------------------------------------------------------------------------------------- the operator

    @rule(dies=st.booleans())
    def look(self, *, dies: bool) -> None:
        self.world.step(dies=dies)

    @rule()
    def rest(self) -> None:
        """``writes at rest: 0``: when nothing else moves, the operator stops writing."""
        self.world.settle()

    @rule(seconds=st.sampled_from([1, 6, 60, 1000]))
    def wait(self, seconds: int) -> None:
        self.world.now += timedelta(seconds=seconds)

    # -------------------------------------------------------------------------------------------------- the cluster

    @rule()
    def control(self) -> None:
        self.world.control()

    @rule()
    def reap(self) -> None:
        self.world.reap()

    @rule()
    def lose_pods(self) -> None:
        """While no operator is there."""
        self.world.lose_pods()

    @precondition(lambda self: self.world.alive)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        pod = data.draw(st.sampled_from(self.world.alive), label="pod")
        at = {"startedAt": "2026-01-02T03:04:06Z"}
        pod["status"] |= {"phase": "Running", "containerStatuses": [{"name": "convert", "state": {"running": at}}]}

    @precondition(lambda self: self.world.alive)
    @rule(
        data=st.data(),
        code=st.sampled_from(CODES),
        report=st.sampled_from(REPORTS),  # by default what a worker leaves at the end of its own stage
        disrupted=st.sampled_from(["", "", "", "EvictionByEvictionAPI"]),
    )
    def finish(self, data: st.DataObject, code: int, report: str | None, disrupted: str) -> None:
        pod: dict[str, Any] = data.draw(st.sampled_from(self.world.alive), label="pod")
        reason = "OOMKilled" if code == 137 else ""
        if code == 0 and report is None:
            self.really_done.add(self.world.stage_of(pod))
        self.world.finish(pod, code, report=report, reason=reason, disrupted=disrupted)

    @precondition(lambda self: self.world.jobs)
    @rule(data=st.data())
    def delete_job(self, data: st.DataObject) -> None:
        self.world.delete_job(data.draw(st.sampled_from(sorted(self.world.jobs)), label="job"))

    @rule(stages=st.integers(min_value=1, max_value=4))
    def work(self, stages: int) -> None:
        """A good day: the controllers work, and so do some workers."""
        self.world.control()
        for pod in self.world.alive[:stages]:
            self.really_done.add(self.world.stage_of(pod))
            self.world.finish(pod, 0)
        self.world.control()

    # ------------------------------------------------------------------------------------------------------ the user

    @rule(suspend=st.booleans())
    def suspend(self, *, suspend: bool) -> None:
        self.world.edit(suspend=suspend)

    @precondition(lambda self: len(self.world.written) > 6)
    @rule(really=st.sampled_from([False, False, False, True]))
    def cancel(self, *, really: bool) -> None:
        if really:
            self.world.edit(cancel=True)

    @rule(stages=st.integers(min_value=1, max_value=4))
    def resize(self, stages: int) -> None:
        self.world.document["spec"].setdefault("workers", {})["maxParallelStages"] = stages

    @rule()
    def retry(self) -> None:
        self.tokens += 1
        self.world.retry(str(self.tokens))

    # ------------------------------------------------------------------------------------------------- what holds

    @invariant()
    def one_job_at_a_time(self) -> None:
        assert sum(not self.world.over(job) for job in self.world.jobs.values()) <= 1

    @invariant()
    def one_writer_for_each_stage(self) -> None:
        working = [self.world.stage_of(pod) for pod in self.world.alive]
        assert len(working) == len(set(working)), working

    @invariant()
    def each_status_is_whole(self) -> None:
        if self.world.status:
            check_status(self.world.status)

    @invariant()
    def success_is_success(self) -> None:
        status = self.world.status
        stages = status.get("stageStatuses", [])
        done = {item["stage"] for item in stages if item["state"] == "Succeeded"}
        assert done <= self.really_done
        if status.get("phase") == "Succeeded":
            assert len(done) == len(stages) == 4

    @invariant()
    def results_stay(self) -> None:
        stages = self.world.status.get("stageStatuses", [])
        done = {item["stage"] for item in stages if item["state"] == "Succeeded"}
        assert self.done <= done
        self.done = done

    @invariant()
    def an_end_is_an_end(self) -> None:
        phase = self.world.phase
        if self.ended:
            again = self.ended == "Failed" and self.world.status.get("retryToken", "") != self.token
            assert phase == self.ended or again, f"{self.ended} became {phase}"
        self.ended = phase if phase in TERMINAL else ""
        if self.ended:
            event(f"{phase}, {self.world.status.get('attempt')}")
        self.token = self.world.status.get("retryToken", "")

    @invariant()
    def times_move_when_a_status_turns(self) -> None:
        for before, after in zip(self.world.written[-2:-1], self.world.written[-1:], strict=False):
            old = {c["type"]: c for c in before["conditions"]}
            for new in after["conditions"]:
                was = old.get(new["type"], {})
                same = was.get("status") == new["status"]
                assert not same or was["lastTransitionTime"] == new["lastTransitionTime"], new["type"]


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
