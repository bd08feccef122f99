"""Lists in pages, watches that go on where they were, and what is reported pods that ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from apiserver import Answer
from ckpt2pt_operator import informer as module
from ckpt2pt_operator.api import Api, ApiError
from ckpt2pt_operator.informer import PodInformer
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.store import Store
from simulation import owned_by_job
from talking import talk

Raw = dict[str, Any]


def pod(uid: str, version: int = 1, **status: object) -> Raw:
    labels = {"ckpt2pt.dev/conversion-uid": "u"}
    meta = {"namespace": "team", "name": uid, "uid": uid, "resourceVersion": str(version), "labels": labels}
    return {"metadata": {**meta, "ownerReferences": owned_by_job("demo-1", "j")}, "status": status}


def ended(code: int, message: str = "") -> Raw:
    times = {"startedAt": "2026-01-02T03:04:05Z", "finishedAt": "2026-01-02T03:05:05Z"}
    terminated = {"exitCode": code, "message": message, "reason": "Error" if code else "Completed", **times}
    return {
        "phase": "Failed" if code else "Succeeded",
        "containerStatuses": [{"name": "convert", "state": {"terminated": terminated}}],
    }


RUNNING: Raw = {
    "phase": "Running",
    "containerStatuses": [{"name": "convert", "state": {"running": {"startedAt": "2026-01-02T03:04:05Z"}}}],
}


def event(kind: str, raw: Raw) -> str:
    return json.dumps({"type": kind, "object": raw}) + "\n"


KEY = "team", "demo"


class Pods:
    """Two pages of pods, then one watch after another as they are scripted; the last one is the end of the test."""

    def __init__(self, *watches: Answer, pages: tuple[Raw, ...] | None = None) -> None:
        self.watches = list(watches)
        self.lists = 0
        self.versions: list[str] = []
        self.over = asyncio.Event()
        first: Raw = {"metadata": {"resourceVersion": "7", "continue": "more"}, "items": [pod("a")]}
        self.pages = pages or (first, {"metadata": {"resourceVersion": "7"}, "items": [pod("b")]})

    def __call__(self, method: str, path: str, body: Any) -> Answer:
        query = {name: values[0] for name, values in parse_qs(urlsplit(path).query).items()}
        assert query["labelSelector"] == "app.kubernetes.io/managed-by=ckpt2pt-operator"
        if "watch" in query:
            self.versions.append(query["resourceVersion"])
            return self.watches.pop(0) if self.watches else (500, "the script is over")
        self.lists += 1
        return 200, self.pages[1 if query.get("continue") == "more" else 0]


def follow(
    pods: Pods, monkeypatch: pytest.MonkeyPatch, slept: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> tuple[Store, Metrics, PodInformer]:
    """Run an informer until the script is over."""
    store, metrics = Store(lambda _: None), Metrics("0")
    store.put_conversion({"metadata": {"namespace": "team", "name": "demo", "uid": "u", "resourceVersion": "1"}})
    found: list[PodInformer] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        await slept(0 if slept is real else seconds)
        if not pods.watches:
            raise asyncio.CancelledError

    async def use(api: Api) -> None:
        informer = PodInformer(api, store, metrics, "")
        found.append(informer)
        monkeypatch.setattr(asyncio, "sleep", sleep)
        try:
            await informer.run()
        except asyncio.CancelledError:
            pass
        finally:
            monkeypatch.undo()

    talk(pods, use)
    return store, metrics, found[0]


def test_every_page_is_read_and_a_watch_goes_on_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pods = Pods(
        (200, event("ADDED", pod("c", 9)) + event("DELETED", pod("a", 10))), (200, event("BOOKMARK", pod("", 30)))
    )
    store, _, informer = follow(pods, monkeypatch)
    assert sorted(found.uid for found in store.pods(KEY, "u")) == ["b", "c"]
    assert pods.versions == ["7", "10", "30"], "a watch that the server ends is begun again where it was"
    assert pods.lists == 2
    assert informer.synced.is_set()


def test_an_object_that_is_not_understood_costs_nobody_else_anything(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real: Callable[[Raw], Any] = vars(module)["pod_view"]

    def view(raw: Raw) -> Any:
        if raw["metadata"]["uid"] == "b":
            raise TypeError("odd")
        return real(raw)

    monkeypatch.setattr(module, "pod_view", view)
    pods = Pods((200, event("ADDED", pod("b", 8)) + event("ADDED", pod("c", 9))), (200, event("BOOKMARK", pod("", 30))))
    patch = pytest.MonkeyPatch()
    store, _, _ = follow(pods, patch)
    assert sorted(found.uid for found in store.pods(KEY, "u")) == ["a", "c"]
    assert caplog.text.count("a bug; an object is not understood") == 2


def test_a_version_that_is_too_old_is_listed_anew_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = event("ERROR", {"code": 410, "reason": "Expired", "message": "too old"})
    pods = Pods((200, gone), (200, event("ADDED", pod("c", 9))))
    store, _, _ = follow(pods, monkeypatch)
    assert pods.lists == 4
    assert sorted(found.uid for found in store.pods(KEY, "u")) == ["a", "b", "c"]


def test_what_a_new_list_does_not_name_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = event("ADDED", pod("lost", 8)) + event("ERROR", {"code": 410, "reason": "Expired"})
    store, _, _ = follow(Pods((200, gone), (200, "")), monkeypatch)
    assert sorted(found.uid for found in store.pods(KEY, "u")) == ["a", "b"]


@pytest.mark.parametrize(
    "broken", [(200, event("ADDED", pod("c", 9))[:-20]), (200, "<html>\n"), (503, "busy"), (429, {})]
)
def test_a_watch_that_breaks_is_begun_anew_and_says_so(broken: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    pods = Pods(broken, (200, event("ADDED", pod("d", 12))))
    store, _, informer = follow(pods, monkeypatch)
    assert "d" in {found.uid for found in store.pods(KEY, "u")}
    assert informer.trouble, "the last watch of the script was refused"


def test_a_watch_that_is_cut_goes_on_where_it_was_and_lists_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = event("ADDED", pod("c", 9)) + event("ADDED", pod("d", 10))[:-20]
    pods = Pods((200, cut), (503, "busy"), (200, event("ADDED", pod("d", 10))))
    store, _, _ = follow(pods, monkeypatch)
    assert pods.versions[:3] == ["7", "9", "9"]
    assert pods.lists == 2, "two pages, once"
    assert sorted(found.uid for found in store.pods(KEY, "u")) == ["a", "b", "c", "d"]


def test_a_watch_that_fails_again_and_again_is_listed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pods = Pods(*[(503, "busy")] * 4, (200, event("ADDED", pod("c", 9))))
    follow(pods, monkeypatch)
    assert pods.lists == 4


def test_a_server_that_ends_each_watch_at_once_is_not_asked_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    pods = Pods(*[(200, "")] * 3)
    real, pauses = asyncio.sleep, list[float]()

    async def slept(seconds: float) -> None:
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr("random.uniform", lambda *_: 1.0)
    _, _, informer = follow(pods, monkeypatch, slept)
    assert pauses[:3] == [1.0, 2.0, 4.0]
    assert "ended as soon as it had begun" in informer.trouble


def test_an_api_server_that_is_away_is_not_a_watch_that_is_silent() -> None:
    """A silent watch ends the process; that would not bring an API server back."""

    async def use(api: Api) -> float:
        informer = PodInformer(api, Store(lambda _: None), Metrics("0"), "")
        informer.received = float("-inf")
        running = asyncio.create_task(informer.run())
        while not informer.trouble:
            await asyncio.sleep(0.01)
        running.cancel()
        return informer.received

    assert talk(lambda *_: (503, "away"), use)[0] > 0


def test_a_watch_in_which_nothing_happens_and_that_ends_in_its_time_is_not_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", 0.0)
    watches: list[Answer] = [(200, ""), (410, {})]

    async def use(api: Api) -> float:
        informer = PodInformer(api, Store(lambda _: None), Metrics("0"), "")
        informer.received = float("-inf")
        with pytest.raises(ApiError):
            await informer._follow()
        return informer.received

    assert talk(lambda *_: watches.pop(0), use)[0] > 0


DONE = json.dumps({"version": 1, "exitCode": 0, "reason": "Converted"})


def test_a_worker_that_ends_is_counted_once_with_a_reason_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.dumps({"version": 1, "exitCode": 65, "reason": "ChosenByAUser", "message": "m"})
    reported = "".join(
        event("MODIFIED", pod(uid, version, **status))
        for version, (uid, status) in enumerate(
            [("a", RUNNING), ("b", RUNNING), ("a", ended(0, DONE)), ("a", ended(0, DONE)), ("b", ended(65, report))], 10
        )
    )
    _, metrics, _ = follow(Pods((200, reported)), monkeypatch)
    found = {
        (sample.labels["result"], sample.labels["reason"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "ckpt2pt_operator_stage_attempts_total"
    }
    assert found == {("Succeeded", "Converted"): 1, ("Failed", "Other"): 1}
