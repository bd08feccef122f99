"""A small world for the rules of the operator: the Job controller, kubelets and a clock, all as plain values.

It stands in for no API server: there is no HTTP, no watch and no admission.  The world holds objects as an API server
shows them, ``look`` gives ``plan`` what an operator would see, and ``step`` obeys the plan.  Behaviour against a real
control plane is proved in ``tests/cluster``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from ckpt2pt.errors import FAILS_JOB, FAILS_STAGE
from ckpt2pt.kube.conversion.report import Report
from ckpt2pt_operator.rules.conditions import stamp
from ckpt2pt_operator.rules.plan import plan
from ckpt2pt_operator.rules.seen import (
    Action,
    CreateJob,
    DeleteConversion,
    OperatorDefaults,
    PatchJob,
    Plan,
    Refusal,
    Seen,
    Training,
)
from ckpt2pt_operator.rules.views import Claim, claim_view, indexes, job_view, pod_view
from documents import changed

Raw = dict[str, Any]
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOUSE = OperatorDefaults(image="registry.example/ckpt2pt:1")
BOUND = claim_view({"status": {"phase": "Bound", "accessModes": ["ReadWriteMany"]}})
UID = "uid-of-demo"
"""Of the conversion."""


def conversion(*changes: tuple[str, object]) -> Raw:
    """The minimal document as an API server holds it, with four stages."""
    document = changed(("spec.parallelism.pipeline", 4), *changes)
    document["metadata"] |= {"uid": UID, "namespace": "team", "generation": 1, "resourceVersion": "1"}
    return document


def owned_by_job(name: str, uid: str) -> list[Raw]:
    """The owner of a pod that the Job controller has made."""
    return [{"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "controller": True}]


def spans(numbers: set[int]) -> str:
    """``{0, 1, 3}`` is ``0,1,3``, which an API server would write ``0-1,3``."""
    return ",".join(map(str, sorted(numbers)))


def done(stages: Sequence[int], **more: object) -> str:
    """The termination message of a worker that has done these stages."""
    facts = {"version": 1, "exitCode": 0, "reason": "Converted", "message": "", "stages": [*stages], "iteration": 500}
    return json.dumps({**facts, "verified": "digest", **more})


class World:
    """One conversion and what became of it."""

    def __init__(self, *changes: tuple[str, object]) -> None:
        self.document = conversion(*changes)
        self.now = START
        self.jobs: dict[str, Raw] = {}
        self.pods: dict[str, Raw] = {}
        self.departed: dict[str, Raw] = {}
        """Pods that are gone, as an operator that was there has seen them last."""
        self.claims: dict[str, Claim | None] | None = {"training": BOUND}
        self.training: Training | None = None
        self.live: dict[str, Report] = {}
        self.warnings: dict[str, str] = {}
        self.refuses_pods = ""
        """In what words the API server refuses every pod; empty while it takes them."""
        self.written: list[Raw] = []
        self.made: list[Raw] = []
        self._counter = 0

    # -------------------------------------------------------------------------------------------------- the operator

    @property
    def status(self) -> Raw:
        """The status as it was written last."""
        found: Raw = self.document.get("status", {})
        return found

    @property
    def phase(self) -> str:
        """Its phase, empty before the first look."""
        return str(self.status.get("phase", ""))

    def look(self) -> Seen:
        """What an operator sees that has just been started: nothing but what is stored."""
        return Seen(
            conversion=deepcopy(self.document),
            now=self.now,
            jobs=tuple(job_view(job) for job in self.jobs.values()),
            pods=(
                *(pod_view(pod) for pod in self.pods.values()),
                *(replace(pod_view(pod), gone=True) for pod in self.departed.values()),
            ),
            claims=self.claims,
            live=self.live,
            warnings=self.warnings,
            training=self.training,
        )

    def step(self, *, dies: bool = False) -> Plan:
        """One look and what follows from it; an operator that dies writes the status and does no more."""
        decided = plan(self.look(), HOUSE)
        if decided.status != self.status:
            self.document["status"] = deepcopy(dict(decided.status))
            self.written.append(self.document["status"])
        if not dies:
            for action in decided.actions:
                self.obey(action)
        return decided

    def obey(self, action: Action) -> None:
        """As the API server does, for this owner."""
        if isinstance(action, CreateJob):
            self.create(deepcopy(dict(action.manifest)))
        elif isinstance(action, DeleteConversion):
            raise AssertionError("the world has no end")
        elif action.job.name in self.jobs and self.jobs[action.job.name]["metadata"]["uid"] == action.job.uid:
            if isinstance(action, PatchJob):
                self.jobs[action.job.name]["spec"].update(action.spec)
            else:
                self.delete_job(action.job.name)

    def settle(self, most: int = 6) -> Plan:
        """Look until nothing changes; an operator that goes round and round fails the test."""
        for _ in range(most):
            writes, jobs = len(self.written), deepcopy(self.jobs)
            decided = self.step()
            if len(self.written) == writes and self.jobs == jobs:
                assert not decided.actions, decided.actions
                return decided
        raise AssertionError(f"no rest after {most} looks: {self.written[-2:]}")

    def run(self, seconds: float = 0.0) -> Plan:
        """Time goes on, controllers work, the operator looks, until all of them rest."""
        self.now += timedelta(seconds=seconds)
        for _ in range(8):
            before = (deepcopy(self.jobs), deepcopy(self.pods), len(self.written))
            self.control()
            decided = self.settle()
            if before == (self.jobs, self.pods, len(self.written)):
                return decided
        raise AssertionError("the world does not come to rest")

    # ----------------------------------------------------------------------------------------------- the Job controller

    def uid(self) -> str:
        """A new one."""
        self._counter += 1
        return f"uid-{self._counter:04d}"

    def create(self, manifest: Raw) -> None:
        """A Job, unless its name is taken."""
        name = manifest["metadata"]["name"]
        if name in self.jobs:
            return
        self.made.append(manifest)
        manifest["metadata"] |= {
            "uid": self.uid(), "resourceVersion": str(self._counter), "creationTimestamp": stamp(self.now),
        }  # fmt: skip
        manifest["status"] = {}
        self.jobs[name] = manifest

    def delete_job(self, name: str) -> None:
        """In the background: the Job is gone, and its pods are asked to stop."""
        gone = self.jobs.pop(name)
        for pod in self.of_job(gone):
            pod["metadata"].setdefault("deletionTimestamp", stamp(self.now))

    def of_job(self, job: Raw) -> list[Raw]:
        """Its pods."""
        uid = job["metadata"]["uid"]
        return [pod for pod in self.pods.values() if pod["metadata"]["ownerReferences"][0]["uid"] == uid]

    @property
    def alive(self) -> list[Raw]:
        """Pods that have not ended."""
        return [pod for pod in self.pods.values() if pod["status"]["phase"] not in {"Succeeded", "Failed"}]

    def over(self, job: Raw) -> bool:
        """The Job has ended."""
        return bool(job["status"].get("conditions"))

    def control(self) -> None:
        """The Job controller and the garbage collector, until they rest."""
        owners = {job["metadata"]["uid"] for job in self.jobs.values()}
        for name, pod in list(self.pods.items()):
            if pod["metadata"]["ownerReferences"][0]["uid"] not in owners and pod not in self.alive:
                self.departed[name] = self.pods.pop(name)
        for job in self.jobs.values():
            if not self.over(job):
                self._control(job)

    def _control(self, job: Raw) -> None:
        spec, status = job["spec"], job["status"]
        done = set(indexes(status.get("completedIndexes", "")))
        given_up = set(indexes(status.get("failedIndexes", "")))
        ends = str(job.get("ends", ""))
        for pod in self.of_job(job):
            index, code = pod["index"], self.exit_code(pod)
            if pod["status"]["phase"] == "Succeeded":
                done.add(index)
            elif pod["status"]["phase"] != "Failed" or pod.get("counted"):
                continue
            elif not any(c["type"] == "DisruptionTarget" for c in pod["status"].get("conditions", [])):
                failures = self.failures(job, index)
                ends = "PodFailurePolicy" if code in FAILS_JOB else ends
                if code in FAILS_STAGE or failures >= spec["backoffLimitPerIndex"]:
                    given_up.add(index)
                job.setdefault("failures", {})[index] = failures + 1
            pod["counted"] = True
        status["completedIndexes"], status["failedIndexes"] = spans(done), spans(given_up)
        if len(given_up) > spec.get("maxFailedIndexes", 10**6):
            ends = "MaxFailedIndexesExceeded"
        if not ends and len(done | given_up) == spec["completions"]:
            ends = "FailedIndexes" if given_up else "CompletionsReached"
        job["ends"] = ends
        if ends:
            self._end(job, ends)
        elif spec.get("suspend"):
            status.pop("startTime", None)
            self.stop(self.of_job(job))
        else:
            status.setdefault("startTime", stamp(self.now))
            self._fill(job, done | given_up)

    def failures(self, job: Raw, index: int) -> int:
        """How often that index has failed."""
        return int(job.get("failures", {}).get(index, 0))

    def stop(self, pods: list[Raw]) -> None:
        """Tell them to end; a kubelet has to do it."""
        for pod in pods:
            if pod in self.alive:
                pod["metadata"].setdefault("deletionTimestamp", stamp(self.now))

    def _end(self, job: Raw, reason: str) -> None:
        living = [pod for pod in self.of_job(job) if pod in self.alive]
        self.stop(living)
        if living:
            return  # it says so when they have ended
        kind = "Complete" if reason == "CompletionsReached" else "Failed"
        job["status"]["conditions"] = [
            {"type": kind, "status": "True", "reason": reason, "message": "", "lastTransitionTime": stamp(self.now)}
        ]

    def _fill(self, job: Raw, finished: set[int]) -> None:
        living = [pod for pod in self.of_job(job) if pod in self.alive]
        if self.refuses_pods:
            self.warnings[job["metadata"]["uid"]] = self.refuses_pods
            return
        free = job["spec"]["parallelism"] - len(living)
        taken = finished | {pod["index"] for pod in living}
        for index in [index for index in range(job["spec"]["completions"]) if index not in taken][: max(free, 0)]:
            self._pod(job, index)

    def _pod(self, job: Raw, index: int) -> None:
        uid = self.uid()
        name = f"{job['metadata']['name']}-{index}-{uid}"
        [container] = job["spec"]["template"]["spec"]["containers"]
        given = next((item["value"] for item in container["env"] if item["name"] == "CKPT2PT_STAGES"), "")
        self.pods[name] = {
            "index": index,
            "stage": int(given.split(",")[index]) if given else index,
            "metadata": {
                "name": name,
                "namespace": "team",
                "uid": uid,
                "creationTimestamp": stamp(self.now),
                "ownerReferences": owned_by_job(job["metadata"]["name"], job["metadata"]["uid"]),
                "labels": {
                    **job["metadata"]["labels"],
                    "batch.kubernetes.io/job-completion-index": str(index),
                },
                "annotations": {
                    **job["spec"]["template"]["metadata"].get("annotations", {}),
                    "batch.kubernetes.io/job-index-failure-count": str(self.failures(job, index)),
                },
            },
            "spec": {"nodeName": "node-a"},
            "status": {"phase": "Pending"},
        }

    # ------------------------------------------------------------------------------------------------------- kubelets

    def exit_code(self, pod: Raw) -> int | None:
        """Of a pod that has ended."""
        [state] = [c["state"] for c in pod["status"].get("containerStatuses", [])] or [{}]
        code = state.get("terminated", {}).get("exitCode")
        return None if code is None else int(code)

    def worker(self, stage: int) -> Raw:
        """The living pod of a stage."""
        found = [pod for pod in self.alive if self.stage_of(pod) == stage]
        assert len(found) == 1, f"{len(found)} workers of stage {stage}"
        return found[0]

    def stage_of(self, pod: Raw) -> int:
        """The pipeline stage that a pod converts."""
        return int(pod["stage"])

    def start(self, *stages: int) -> None:
        """Their containers run."""
        for stage in stages:
            running = {"name": "convert", "state": {"running": {"startedAt": stamp(self.now)}}}
            self.worker(stage)["status"] = {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [running]}

    def report(self, pod: Raw, **more: object) -> str:
        """What a worker leaves that has done what it was asked for."""
        spec = self.document["spec"]
        one, plans = "follow" in spec or spec.get("dryRun") is True, spec.get("dryRun") is True
        stages = range(spec["parallelism"]["pipeline"]) if one else [self.stage_of(pod)]
        return done(stages, **({"reason": "Planned", "plan": {"files": 1}} if plans else {}) | more)

    def finish(self, pod: Raw, code: int, *, reason: str = "", report: str | None = None, disrupted: str = "") -> None:
        """It ends with an exit code, and what it leaves as its termination message: by default what a worker leaves."""
        report = (self.report(pod) if code == 0 else "") if report is None else report
        ended = {"exitCode": code, "reason": reason or ("Error" if code else "Completed"), "message": report,
                 "startedAt": stamp(self.now), "finishedAt": stamp(self.now)}  # fmt: skip
        pod["status"] |= {
            "phase": "Failed" if code or disrupted else "Succeeded",
            "containerStatuses": [{"name": "convert", "state": {"terminated": ended}}],
        }
        if disrupted:
            pod["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": disrupted}]

    def end(self, stage: int, code: int = 0, **more: str) -> None:
        """The worker of a stage ends."""
        self.finish(self.worker(stage), code, **more)

    def lose_pods(self) -> None:
        """Those that have ended are deleted while no operator is there to see them."""
        for name, pod in list(self.pods.items()):
            if pod not in self.alive:
                del self.pods[name]
        self.departed.clear()

    def reap(self) -> None:
        """Kubelets end what was asked to stop: gone at once where the Job is gone or waits."""
        for name, pod in list(self.pods.items()):
            if "deletionTimestamp" in pod["metadata"] and pod in self.alive:
                del self.pods[name]

    def edit(self, **spec: object) -> None:
        """A user changes the spec."""
        self.document["spec"].update(spec)
        self.document["metadata"]["generation"] += 1

    def retry(self, token: str) -> None:
        """A user annotates it."""
        self.document["metadata"].setdefault("annotations", {})["ckpt2pt.dev/retry"] = token

    def refused(self, to_error: Refusal) -> Plan:
        """What is decided when the API server does not take the Job."""
        decided = plan(replace(self.look(), to_error=to_error), HOUSE)
        self.document["status"] = dict(decided.status)
        return decided
