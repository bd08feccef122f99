"""What is remembered of trainings, and whom their events wake.  What the API server does is tested in tests/cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from apiserver import Answer
from ckpt2pt_operator.api import Api
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.rules.conditions import stamp
from ckpt2pt_operator.rules.kept import Key
from ckpt2pt_operator.rules.seen import Training
from ckpt2pt_operator.rules.trainings import Kind, kinds, workload
from ckpt2pt_operator.store import Store
from ckpt2pt_operator.trainings import Trainings
from documents import changed
from talking import talk

Raw = dict[str, Any]
AFTER: Raw = {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}


@pytest.fixture
def kind() -> Kind:
    row: Raw = {"apiVersion": "batch/v1", "kind": "Job", "plural": "jobs"}
    signs: Raw = {"succeeded": {"conditions": ["Complete"]}, "failed": {"conditions": ["Failed"]}}
    return kinds([row | signs])[0]


class Watched:
    """Trainings of one kind, and one conversion that waits for one of them."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.woken = kind, list[Key]()
        self.store = Store(lambda _: None)
        self.conversion: Raw = changed(("spec.startAfter", AFTER))
        self.conversion["metadata"] |= {"namespace": "team", "uid": "c", "resourceVersion": "1"}
        self.store.put_conversion(self.conversion)
        nobody = cast("Api", None)
        self.trainings = Trainings(
            nobody, self.store, Metrics("0"), [kind], [], trigger=False, changed=self.woken.append
        )
        [self.watch] = self.trainings.informers
        self.watch.synced.set()

    def job(self, uid: str, condition: str = "", name: str = "pretrain") -> Raw:
        found = [{"type": condition, "status": "True"}] if condition else []
        return {"metadata": {"name": name, "namespace": "team", "uid": uid}, "status": {"conditions": found}}

    def look(self, seen: str = "") -> Training | None:
        """As the conversion sees it whose status knows that uid."""
        status = {"status": {"trainingUID": seen}} if seen else {}
        return asyncio.run(self.trainings.look({**self.conversion, **status}, AFTER))


@pytest.fixture
def watched(kind: Kind) -> Watched:
    return Watched(kind)


def test_it_stands_as_it_was_last_seen(watched: Watched) -> None:
    assert watched.look() == Training(state="Missing")
    watched.watch.put(watched.job("a"))
    assert watched.look() == Training(state="Running", uid="a")
    watched.watch.put(watched.job("a", "Complete"))
    assert watched.look("a") == Training(state="Succeeded", uid="a")
    watched.watch.put(watched.job("a", "Failed"))
    assert watched.look("a") == Training(state="Failed", uid="a")


@pytest.mark.parametrize(("condition", "state"), [("Complete", "Succeeded"), ("Failed", "Failed"), ("", "Missing")])
@pytest.mark.parametrize("again", [False, True], ids=["gone", "replaced"])
def test_how_one_ended_that_is_gone_is_known_to_whoever_has_seen_it(
    watched: Watched, condition: str, state: str, again: bool
) -> None:
    watched.watch.put(watched.job("a"))
    watched.watch.put(watched.job("a", condition))
    watched.watch.drop(watched.job("a", condition))
    if again:
        watched.watch.put(watched.job("b"))
    found = watched.look("a")
    assert found is not None
    assert found.state == state
    other = watched.look()
    assert other is not None
    assert other.state == ("Running" if again else "Missing"), "to a new conversion it is another training"


def test_one_that_was_replaced_between_two_lists(watched: Watched) -> None:
    watched.watch.put(watched.job("a", "Complete"))
    watched.watch.put(watched.job("b"))
    assert watched.look("a") == Training(state="Succeeded", uid="a")


VOLCANO = kinds(
    [
        {
            "apiVersion": "batch.volcano.sh/v1alpha1", "kind": "Job", "plural": "jobs",
            "succeeded": {"phasePath": "status.state.phase", "phases": ["Completed"]},
            "failed": {"phasePath": "status.state.phase", "phases": ["Failed"]},
        }
    ]
)[0]  # fmt: skip


def reported_hours_ago(hours: int) -> Raw:
    return {"lastTransitionTime": stamp(datetime.now(UTC) - timedelta(hours=hours))}


@pytest.mark.parametrize(
    ("before", "state", "made"),
    [
        (None, reported_hours_ago(1), True),
        (None, reported_hours_ago(25), False),
        (None, {}, False),
        ("Running", {}, True),
        ("Completed", {}, False),
    ],
    ids=["just-now", "the-day-before", "nobody-knows-when", "seen-at-work", "seen-ended"],
)
def test_a_run_that_ended_by_a_phase_gets_its_conversion_unless_it_may_be_old(
    watched: Watched, before: str | None, state: Raw, made: bool
) -> None:
    async def run() -> int:
        trainings = Trainings(
            cast("Api", None), watched.store, Metrics("0"), [VOLCANO], [], trigger=True, changed=watched.woken.append
        )
        meta = {**watched.job("a")["metadata"], "annotations": {"ckpt2pt.dev/convert-on-success": "mine"}}
        for phase in (before, "Completed"):
            if phase:
                trainings.informers[0].put({"metadata": meta, "status": {"state": {"phase": phase, **state}}})
        return len(trainings._due)

    assert asyncio.run(run()) == made


@pytest.mark.parametrize("too_old", [False, True])
def test_a_wrong_template_is_tried_again_until_the_run_is_too_old(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, too_old: bool
) -> None:
    texts = ["metadata: {name: '${nothing}'}", json.dumps(changed(("metadata.name", "corrected")))]
    asked: list[str] = []

    def answer(_: str, path: str, body: Any) -> Answer:
        if path.endswith("/configmaps/mine"):
            asked.append("template")
            return 200, {"data": {"conversion.yaml": texts.pop(0)}}
        asked.append(body.get("reason") or body["metadata"]["name"])
        return 201, body

    async def use(api: Api) -> None:
        trainings = Trainings(
            api, watched.store, Metrics("0"), [watched.kind], [], trigger=True, changed=watched.woken.append
        )
        raw = watched.job("abcdef", "Complete")
        raw["metadata"]["annotations"] = {"ckpt2pt.dev/convert-on-success": "mine"}
        raw["status"]["conditions"][0]["lastTransitionTime"] = stamp(datetime.now(UTC) - timedelta(hours=1))
        trainings.informers[0].put(raw)
        if too_old:
            monkeypatch.setattr("ckpt2pt_operator.trainings._TOO_OLD", timedelta(minutes=59))
        with suppress(TimeoutError):
            await asyncio.wait_for(trainings.run(), 2.0)

    talk(answer, use)
    once = ["template", "ConversionTemplateWrong"]
    assert asked == (once if too_old else [*once, "template", "corrected-abcdef", "ConversionMade"])


def events_of(watched: Watched, annotation: str, answer: Callable[[str], Answer]) -> tuple[list[str], list[str]]:
    """What is asked for a training with that annotation, and the words of the events about it."""
    said: list[str] = []

    def received(_: str, path: str, body: Any) -> Answer:
        if path.endswith("/events"):
            said.append(body["message"])
            return 201, body
        return answer(path)

    async def use(api: Api) -> None:
        trainings = Trainings(
            api, watched.store, Metrics("0"), [watched.kind], [], trigger=True, changed=watched.woken.append
        )
        raw = watched.job("abcdef", "Complete")
        raw["metadata"]["annotations"] = {"ckpt2pt.dev/convert-on-success": annotation}
        raw["status"]["conditions"][0]["lastTransitionTime"] = stamp(datetime.now(UTC))
        trainings.informers[0].put(raw)
        with suppress(TimeoutError):
            await asyncio.wait_for(trainings.run(), 0.5)

    _, asked = talk(received, use)
    return [path for _, path, *_ in asked if not path.endswith("/events")], said


@pytest.mark.parametrize("name", ["../../other/configmaps/cm1", "..", "a?watch=true", "..%2f..%2fother", "a#b"])
def test_an_annotation_that_is_no_name_asks_for_nothing_and_is_reported(watched: Watched, name: str) -> None:
    asked, said = events_of(watched, name, lambda _: (200, {"data": {"conversion.yaml": json.dumps(changed())}}))
    assert asked == []
    assert said
    assert said[0].startswith("it is not the name of a ConfigMap")


def test_a_refusal_by_the_api_server_is_reported_without_the_values_that_it_quotes(watched: Watched) -> None:
    to_error = {
        "reason": "Invalid", "message": 'spec.verify: Unsupported value: "hunter2"',
        "details": {"causes": [{"field": "spec.verify", "message": 'Unsupported value: "hunter2"'}]},
    }  # fmt: skip

    def answer(path: str) -> Answer:
        template = json.dumps(changed(("spec.verify", "hunter2")))
        return (200, {"data": {"conversion.yaml": template}}) if "configmaps" in path else (422, to_error)

    _, said = events_of(watched, "mine", answer)
    assert said[0] == "the conversion that ConfigMap mine describes was not made: 422 Invalid: spec.verify"


def test_a_template_that_nobody_expected_ends_nothing(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What ends the loop ends the operator, of all tenants, and again after each restart."""

    def broken(*_: object) -> Raw:
        raise OverflowError("odd")

    monkeypatch.setattr("ckpt2pt_operator.trainings.conversion_for", broken)
    asked, _ = events_of(watched, "mine", lambda _: (200, {"data": {"conversion.yaml": "x"}}))
    assert asked
    assert "a bug; a conversion could not be made" in caplog.text
    assert "no conversion yet; again in" in caplog.text
    assert "OverflowError: odd" in caplog.text


def test_a_number_that_cannot_be_sent_is_reported(watched: Watched) -> None:
    text = json.dumps(changed(("spec.workers.podOverrides.spec", {"x": 0}))).replace('"x": 0', f'"x": 0x{"f" * 9000}')
    _, said = events_of(watched, "mine", lambda _: (200, {"data": {"conversion.yaml": text}}))
    assert said
    assert said[0].startswith("conversion.yaml cannot be read")


@pytest.mark.parametrize(
    "status",
    [{"conditions": [{"type": ["Complete"], "status": "True"}]}, {"conditions": [{"type": {}, "status": "True"}]}, [], 3,
     {"conditions": [[1], None, {"type": "Complete", "status": "True", "lastTransitionTime": {}}], "completionTime": []}],
)  # fmt: skip
def test_a_training_of_any_shape_does_no_harm(watched: Watched, status: object) -> None:
    """The status of a kind of somebody's own may be without a schema."""
    assert watched.watch._see({**watched.job("a"), "status": status}) == "a"
    assert watched.watch.put({**watched.job("a"), "status": status}) == "a"


def test_not_too_many_are_remembered(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt2pt_operator.trainings._REMEMBERED", 2)
    for uid in "abc":
        watched.watch.put(watched.job(uid, "Complete"))
        watched.watch.drop(watched.job(uid, "Complete"))
    assert [getattr(watched.look(uid), "state", "") for uid in "abc"] == ["Missing", "Succeeded", "Succeeded"]


def test_events_wake_whoever_waits_for_that_one(watched: Watched) -> None:
    watched.watch.put(watched.job("x", name="other"))
    assert watched.woken == []
    watched.watch.put(watched.job("a"))
    watched.watch.put(watched.job("a"))
    assert watched.woken == [("team", "demo")]
    watched.watch.drop(watched.job("a"))
    assert len(watched.woken) == 2


def test_a_list_wakes_whoever_waits_for_one_that_is_not_in_it(watched: Watched) -> None:
    watched.watch.keep([])
    assert watched.woken == [("team", "demo")], "it may have been deleted while nobody watched"


def test_before_the_first_list_nothing_is_known(watched: Watched) -> None:
    watched.watch.synced.clear()
    assert watched.look() == Training(state="Unknown")
    watched.watch.trouble = "404 NotFound"
    assert watched.look() == Training(state="Unknown", message="404 NotFound")


def test_a_kind_that_is_not_in_the_table(watched: Watched) -> None:
    found = asyncio.run(watched.trainings.look(watched.conversion, {**AFTER, "kind": "CronJob"}))
    assert (found.state, found.message) == ("Unwatched", "batch/v1 Job")
    assert workload(watched.job("a"), watched.kind).uid == "a"
