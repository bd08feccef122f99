"""One look: the status first and only if it is news, then what follows; the API server may say no at any moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from apiserver import Answer, Server
from ckpt2pt_operator.api import ApiError
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.reconcile import Reconciler, steady
from ckpt2pt_operator.rules.conditions import stamp
from ckpt2pt_operator.rules.kept import key_of
from ckpt2pt_operator.rules.seen import OperatorDefaults
from ckpt2pt_operator.rules.views import pod_view
from ckpt2pt_operator.store import Store
from documents import HOSTILE_NAMES, changed, claim
from simulation import done, owned_by_job
from statuses import reported
from talking import api_of

Raw = dict[str, Any]
HOUSE = OperatorDefaults(image="ckpt2pt:1")


def conversion(*changes: tuple[str, object]) -> Raw:
    document: Raw = changed(("spec.parallelism.pipeline", 4), *changes)
    document["metadata"] |= {"uid": "u", "namespace": "team", "generation": 1, "resourceVersion": "1"}
    return document


class World:
    """An API server with one conversion, its claim and its Jobs; ``refuses`` answers in its place where it says anything."""

    def __init__(self, *changes: tuple[str, object]) -> None:
        self.conversion = conversion(*changes)
        self.objects: dict[str, Raw] = {}
        self.refuses: Callable[[str, str], Answer | None] = lambda *_: None
        self.version, self.ending = 1, False
        self.pods: list[Raw] = []
        self.events: list[Raw] = []
        self.headers: dict[str, str] = {}
        self.metrics = Metrics("0")

    def answer(self, method: str, path: str, body: Any) -> Answer:
        path, _, query = path.partition("?")
        refused = self.refuses(method, path)
        if refused:
            return refused
        if "/persistentvolumeclaims/" in path:
            return 200, {"status": {"phase": "Bound", "accessModes": ["ReadWriteMany"]}}
        if path.endswith("/status"):
            if body["metadata"]["resourceVersion"] != self.conversion["metadata"]["resourceVersion"]:
                return 409, {"reason": "Conflict"}
            meta = {**self.conversion["metadata"], "resourceVersion": self._next()}
            self.conversion = {**self.conversion, "metadata": meta, "status": body["status"]}
            return 200, self.conversion
        if path.endswith("/jobs") or "/jobs/" in path:
            return self.answer_of_jobs(method, path.rsplit("/", 1)[1], body)
        if path.endswith("/events") and "dryRun" in query:
            ending = {"message": "unable to create new content in namespace team because it is being terminated"}
            return (403, ending) if self.ending else (201, {})
        if path.endswith("/events"):
            self.events += [body] if method == "POST" else []
            return (200, {"items": []}) if method == "GET" else (201, {"metadata": {"name": "e"}})
        raise AssertionError(f"{method} {path}")

    def answer_of_jobs(self, method: str, name: str, body: Any) -> Answer:
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.objects:
                return 409, {"reason": "AlreadyExists"}
            meta = {
                "uid": f"uid-of-{name}",
                "resourceVersion": self._next(),
                "creationTimestamp": "2026-01-02T03:04:05Z",
            }
            self.objects[name] = {**body, "metadata": {**body["metadata"], **meta}}
            return 201, self.objects[name]
        if name not in self.objects:
            return 404, {"reason": "NotFound"}
        return 200, self.objects.pop(name) if method == "DELETE" else self.objects[name]

    def _next(self) -> str:
        self.version += 1
        return str(self.version)

    def look(self, times: int = 1, *, anew: bool = False, stubborn: bool = False) -> tuple[list[str], float | None]:
        """Look so often; what was asked, as ``PUT demo/status``, and when the last look wants the next.

        ``anew`` knows nothing but the conversion each time, as an operator that was just started; ``stubborn``
        goes on after an error.
        """
        server = Server(self.answer)
        server.headers = self.headers

        async def run() -> float | None:
            api, again = api_of(server.url, self.metrics), None
            store = Store(lambda _: None)
            reconciler = Reconciler(api, store, self.metrics, HOUSE, check_volumes=True)
            try:
                for _ in range(times):
                    if anew:
                        store = Store(lambda _: None)
                        reconciler = Reconciler(api, store, self.metrics, HOUSE, check_volumes=True)
                    store.put_conversion(self.conversion)
                    for pod in self.pods:
                        store.put_pod(pod_view(pod))
                    with suppress(ApiError) if stubborn else nullcontext():
                        again = await reconciler.reconcile(key_of(self.conversion))
            finally:
                await reconciler.close()
                await api.close()
            return again

        with server.running():
            again = asyncio.run(run())
        return [
            f"{method} {'/'.join(path.partition('?')[0].split('/')[-2:])}" for method, path, *_ in server.asked
        ], again

    @property
    def status(self) -> Raw:
        found: Raw = self.conversion.get("status", {})
        return found


WRITES = ("PUT", "POST", "PATCH", "DELETE")


def writes(asked: list[str]) -> list[str]:
    return [one for one in asked if one.startswith(WRITES)]


def test_the_status_is_written_before_the_job_is_made() -> None:
    world = World()
    asked, _ = world.look(2)
    assert writes(asked) == ["PUT demo/status", "POST team/jobs", "PUT demo/status", "POST team/events"]
    assert list(world.objects) == ["demo-1"]
    assert world.status["jobUID"] == "uid-of-demo-1"


@pytest.mark.parametrize("anew", [False, True], ids=["running", "restarted"])
def test_at_rest_nothing_is_written(anew: bool) -> None:
    world = World()
    world.look(3)
    asked, _ = world.look(5, anew=anew)
    assert writes(asked) == []


def test_a_job_that_an_earlier_life_made_is_taken_over() -> None:
    world = World()
    world.look()
    world.conversion.pop("status")
    world.look(2)
    assert list(world.objects) == ["demo-1"]
    assert world.status["jobUID"] == "uid-of-demo-1"


def test_a_job_of_somebody_else_is_left_alone_and_named() -> None:
    world = World()
    world.objects["demo-1"] = {"metadata": {"name": "demo-1", "uid": "x", "ownerReferences": []}}
    asked, _ = world.look()
    assert reported(world.status, "Failed") == ("True", "NameConflict")
    assert "delete it, or choose another name" in json.dumps(world.status)
    assert "DELETE" not in " ".join(asked)


def test_a_job_of_an_earlier_conversion_of_this_name_is_waited_for() -> None:
    world = World()
    labels = {"app.kubernetes.io/managed-by": "ckpt2pt-operator"}
    owner = [{"controller": True, "uid": "before"}]
    world.objects["demo-1"] = {"metadata": {"name": "demo-1", "uid": "x", "labels": labels, "ownerReferences": owner}}
    with pytest.raises(ApiError) as caught:
        world.look()
    assert (caught.value.code, caught.value.pause) == (409, 2.0)


def test_a_job_that_was_left_behind_by_one_is_in_the_way() -> None:
    """After `kubectl delete --cascade=orphan` nobody collects it."""
    world = World()
    labels = {"app.kubernetes.io/managed-by": "ckpt2pt-operator"}
    world.objects["demo-1"] = {"metadata": {"name": "demo-1", "uid": "x", "labels": labels}}
    world.look()
    assert reported(world.status, "Failed") == ("True", "NameConflict")
    assert "delete it" in json.dumps(world.status)


def test_a_pending_deadline_is_counted_by_the_clock_of_the_api_server() -> None:
    """Which tells when the Job began; ours is an hour ahead, or behind."""
    world = World()
    world.look()
    began = datetime.now(UTC)
    for ahead in (timedelta(hours=-1), timedelta(hours=1)):
        world.objects["demo-1"]["status"] = {"startTime": stamp(began + ahead)}
        world.headers = {"Date": format_datetime(began + ahead, usegmt=True)}
        world.look(2)
        assert world.status["phase"] == "Pending", ahead
    world.headers = {"Date": format_datetime(began + timedelta(hours=3), usegmt=True)}
    world.look(2)
    assert reported(world.status, "Failed") == ("True", "PendingDeadline")


QUOTA = {"reason": "Forbidden", "message": "exceeded quota: none, requested: count/jobs.batch=1"}


@pytest.mark.parametrize(
    ("answer", "reason", "phase"),
    [
        ((403, QUOTA), "QuotaExceeded", "Pending"),
        ((403, {"message": "admission webhook says no"}), "JobRefused", "Pending"),
        ((400, {"message": "admission webhook w denied the request: no"}), "JobRefused", "Pending"),
        ((451, {"message": "not here"}), "JobRefused", "Pending"),
        (
            (422, {"message": "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no"}),
            "JobRefused",
            "Pending",
        ),
        ((500, {"message": "failed calling webhook w: connection refused"}), "JobRefused", "Pending"),
        (
            (403, {"message": "pods is forbidden: failed quota: q: must specify limits.memory"}),
            "QuotaExceeded",
            "Pending",
        ),
        ((429, {"message": "too many requests"}), "JobNotCreated", "Pending"),
        ((500, {"message": "etcdserver: leader changed"}), "JobNotCreated", "Pending"),
        ((503, {"message": "apiserver is shutting down"}), "JobNotCreated", "Pending"),
        ((422, {"message": "spec.template: Invalid value"}), "InvalidSpec", "Failed"),
        ((400, {"message": "json: cannot unmarshal string into Go struct field PodSpec"}), "InvalidSpec", "Failed"),
        ((413, {"message": "Request entity too large: limit is 3145728"}), "InvalidSpec", "Failed"),
    ],
)
def test_a_job_that_the_api_server_refuses_is_reported_in_its_words(answer: Answer, reason: str, phase: str) -> None:
    world = World()
    world.refuses = lambda method, path: answer if (method, path.endswith("/jobs")) == ("POST", True) else None
    _, again = world.look()
    assert (world.status["phase"], reported(world.status, "Ready")[1]) == (phase, reason)
    assert str(answer[1]["message"]) in json.dumps(world.status)  # type: ignore[index]
    assert (again is not None) == (phase == "Pending")
    degraded, accepted = reported(world.status, "Degraded"), reported(world.status, "Accepted")
    assert degraded == (("True", reason) if phase == "Pending" else ("False", "Ended"))
    assert accepted == (("True", "Valid") if phase == "Pending" else ("False", "InvalidSpec"))
    asked, _ = world.look(4)
    assert "PUT demo/status" not in asked, "the same refusal again is no news"


def test_a_refusal_is_reported_in_few_words() -> None:
    world = World()
    world.refuses = lambda _, path: (400, {"message": "x" * 9000}) if path.endswith("/jobs") else None
    world.look()
    assert max(len(condition["message"]) for condition in world.status["conditions"]) == 1024


def test_a_busy_api_server_is_asked_again_when_it_says() -> None:
    world = World()
    world.headers = {"Retry-After": "17"}
    world.refuses = lambda _, path: (429, {"message": "busy"}) if path.endswith("/jobs") else None
    _, again = world.look()
    assert again == 17.0
    world.headers = {}
    _, again = world.look()
    assert again == 5.0


def test_a_change_of_its_job_that_is_refused_is_reported() -> None:
    """A policy may keep anybody from that; the status alone would say that all is well."""
    world = World()
    world.look(2)
    world.refuses = lambda method, _: (
        (403, {"message": "admission webhook w denied the request: no"}) if method == "PATCH" else None
    )
    world.conversion["spec"]["suspend"] = True
    world.conversion["metadata"]["generation"] = 2
    with pytest.raises(ApiError):
        world.look()
    [reported_of] = [body for body in world.events if body["reason"] == "JobNotChanged"]
    assert reported_of["message"] == "Job demo-1 cannot be changed: admission webhook w denied the request: no"


@pytest.mark.parametrize("code", [401, 404])
def test_what_may_pass_is_no_refusal(code: int) -> None:
    world = World()
    world.refuses = lambda _, path: (code, {"message": "no"}) if path.endswith("/jobs") else None
    with pytest.raises(ApiError) as caught:
        world.look()
    assert caught.value.code == code
    assert reported(world.status, "Ready")[1] == "InProgress"


@pytest.mark.parametrize("code", [409, 429, 500, 503])
def test_when_the_status_cannot_be_written_nothing_else_is_done(code: int) -> None:
    world = World()
    world.refuses = lambda method, _: (code, {"reason": "No"}) if method == "PUT" else None
    with pytest.raises(ApiError) as caught:
        world.look()
    assert caught.value.code == code
    assert not world.objects


def test_a_conversion_that_is_gone_is_nothing_to_worry_about() -> None:
    world = World()
    world.refuses = lambda method, _: (404, {"reason": "NotFound"}) if method == "PUT" else None
    asked, again = world.look()
    assert again is None, "no error, and no hurry"
    assert writes(asked) == ["PUT demo/status"], "and no Job for it"


def test_one_that_is_being_deleted_is_left_to_the_api_server() -> None:
    world = World()
    world.conversion["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z"
    assert world.look() == ([], None)


def test_a_document_that_describes_nothing_is_refused_once() -> None:
    world = World(("spec.parallelism.pipeline", 3))
    world.look(3)
    assert reported(world.status, "Accepted") == ("False", "InvalidSpec")
    assert not world.objects
    assert writes(world.look(2)[0]) == []


def test_without_the_right_to_look_at_claims_it_goes_on() -> None:
    world = World()
    world.refuses = lambda _, path: (403, {}) if "/persistentvolumeclaims/" in path else None
    world.look(2)
    assert reported(world.status, "VolumesReady") == ("Unknown", "NotChecked")
    assert list(world.objects) == ["demo-1"]


def test_a_missing_claim_is_looked_for_again_and_again_but_reported_once() -> None:
    world = World()
    world.refuses = lambda _, path: (404, {"reason": "NotFound"}) if "/persistentvolumeclaims/" in path else None
    world.look()
    assert reported(world.status, "VolumesReady") == ("False", "PVCNotFound")
    asked, again = world.look(3)
    assert writes(asked) == []
    assert again
    assert again <= 15


def test_numbers_alone_are_no_reason_to_write() -> None:
    stage = {"stage": 0, "state": "Running", "bytes": 1, "throughput": 5, "bytesTotal": 9}
    one: Raw = {"phase": "Running", "progress": "1%", "bytesDone": 1, "stageStatuses": [stage]}
    other = {**one, "progress": "2%", "bytesDone": 2, "stageStatuses": [{**stage, "bytes": 2}]}
    assert steady(one) == steady(other)
    assert steady(one) != steady({**one, "stageStatuses": [{**stage, "state": "Failed"}]})


def test_progress_is_not_reported_more_often_where_no_answer_comes() -> None:
    world = World()
    world.look(3)
    world.status["bytesDone"] = 7
    world.refuses = lambda method, _: (500, {}) if method == "PUT" else None
    asked, _ = world.look(5, stubborn=True)
    assert writes(asked) == ["PUT demo/status"]


def test_what_a_newer_schema_has_stays_in_the_object() -> None:
    world = World(("spec.fieldOfTomorrow", 1))
    world.look()
    assert world.conversion["spec"]["fieldOfTomorrow"] == 1


def converted(*statuses: Raw) -> list[float]:
    """Bytes that are counted after each status of one life."""
    metrics = Metrics("0")
    reconciler = Reconciler(object(), Store(lambda _: None), metrics, HOUSE, check_volumes=True)  # type: ignore[arg-type]
    found: list[float] = []
    for before, after in zip([{}, *statuses], statuses, strict=False):
        reconciler._count(before, after)
        found.append(metrics.registry.get_sample_value("ckpt2pt_operator_converted_bytes_total") or 0.0)
    return found


def a_status(reason: str, state: str, done: int, **more: object) -> Raw:
    complete = {"type": "Complete", "status": "True" if state == "Succeeded" else "False", "reason": reason}
    stage = {"stage": 0, "state": state, "bytes": done, "bytesTotal": 7}
    return {"phase": state, "conditions": [complete], "stageStatuses": [stage], "bytesTotal": 7, **more}


def test_bytes_are_counted_when_a_stage_is_done() -> None:
    going = a_status("InProgress", "Running", 3)
    known = a_status("InProgress", "Running", 5, iteration=500)
    assert converted(going, known, a_status("AllStagesSucceeded", "Succeeded", 7, iteration=500)) == [0, 0, 7]


def test_bytes_of_a_training_that_is_followed_are_counted_with_each_of_its_checkpoints() -> None:
    begun = a_status("Following", "Running", 0)
    first, same = (a_status("Following", "Running", done, iteration=0) for done in (7, 2))
    second = a_status("Following", "Running", 1, iteration=500)
    over = a_status("TrainingFollowed", "Succeeded", 7, iteration=500)
    assert converted(begun, first, same, second, over) == [0, 7, 7, 14, 14]
    last = a_status("TrainingFollowed", "Succeeded", 7, iteration=1000)
    assert converted(second, last) == [7, 14]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_the_name_of_a_claim_that_is_none_is_not_asked_for(name: str) -> None:
    """One that was stored before the schema had a pattern for it."""
    world = World(("spec.source.volume", claim(name)))
    asked, _ = world.look(2)
    assert not [one for one in asked if one.startswith("GET")]
    assert (world.status["phase"], reported(world.status, "Failed")[1]) == ("Failed", "InvalidSpec")
    [message] = {c["message"] for c in world.status["conditions"] if c["type"] == "Failed"}
    assert "spec.source.volume.persistentVolumeClaim.claimName" in message


def left_behind() -> Raw:
    """A worker that was deleted and has ended, and that its Job's controller still holds."""
    labels = {"ckpt2pt.dev/conversion-uid": "u"}
    meta = {
        "ownerReferences": owned_by_job("demo-1", "uid-of-demo-1"),
        "name": "demo-1-0",
        "uid": "p",
        "namespace": "team",
        "labels": labels,
        "deletionTimestamp": "2026-01-02T03:04:05Z",
    }
    return {"metadata": meta, "status": {"phase": "Failed"}}


@pytest.mark.parametrize("ending", [True, False])
def test_the_job_of_a_namespace_that_is_being_deleted_goes_so_that_the_namespace_can(ending: bool) -> None:
    world = World()
    world.look(2)
    world.pods, world.ending = [left_behind()], ending
    asked, _ = world.look(3)
    assert ("DELETE jobs/demo-1" in asked) == ending
    assert bool(world.objects) != ending, "and it is not made anew"


def test_the_last_words_of_workers_are_fetched_where_the_watch_is_silent() -> None:
    world = World(("spec.parallelism.pipeline", 1))
    world.look(2)
    world.objects["demo-1"]["status"] = {
        "completedIndexes": "0",
        "conditions": [{"type": "Complete", "status": "True"}],
        "completionTime": "2026-01-02T03:04:05Z",
    }
    report = done([0], bytes=7, bytesTotal=7)
    terminated = {
        "exitCode": 0,
        "message": report,
        "startedAt": "2026-01-02T03:04:05Z",
        "finishedAt": "2026-01-02T03:04:06Z",
    }
    worker = left_behind()
    del worker["metadata"]["deletionTimestamp"]
    worker["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] = "0"
    worker["status"] = {
        "phase": "Succeeded",
        "containerStatuses": [{"name": "convert", "state": {"terminated": terminated}}],
    }
    listed: Raw = {"metadata": {}, "items": [worker]}
    world.refuses = lambda _, path: (200, listed) if path.endswith("/pods") else None
    world.look(3)
    assert (world.status["phase"], world.status["iteration"], world.status["bytesDone"]) == ("Succeeded", 500, 7)
