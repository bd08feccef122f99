"""What is remembered of the cluster, and who is reported a change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ckpt2pt.kube.conversion.report import report_of
from ckpt2pt_operator.rules.kept import Key, key_of
from ckpt2pt_operator.rules.views import Pod, job_view, pod_view
from ckpt2pt_operator.store import Store
from simulation import owned_by_job

Raw = dict[str, Any]
KEY = ("team", "demo")


class Watched:
    def __init__(self) -> None:
        self.reported: list[Key] = []
        self.store = Store(self.reported.append)

    def news(self) -> list[Key]:
        found, self.reported[:] = list(self.reported), []
        return found


@pytest.fixture
def watched() -> Watched:
    return Watched()


def conversion(version: int = 1, uid: str = "u", **more: object) -> Raw:
    meta = {"namespace": "team", "name": "demo", "uid": uid, "resourceVersion": str(version)}
    return {"metadata": meta, **more}


def job(uid: str = "j", version: int = 1, owner: str = "u") -> Raw:
    owners = [{"controller": True, "uid": owner}]
    meta = {
        "namespace": "team",
        "name": "demo-1",
        "uid": uid,
        "resourceVersion": str(version),
        "ownerReferences": owners,
    }
    return {"metadata": meta}


def pod(uid: str = "p", owner: str = "u", namespace: str = "team") -> Raw:
    meta = {"namespace": namespace, "name": uid, "uid": uid, "labels": {"ckpt2pt.dev/conversion-uid": owner}}
    return {"metadata": {**meta, "ownerReferences": owned_by_job("demo-1", "j")}}


def test_an_older_version_is_not_news(watched: Watched) -> None:
    watched.store.put_conversion(conversion(5))
    watched.store.put_conversion(conversion(5))
    watched.store.put_conversion(conversion(4))
    assert watched.news() == [KEY]
    watched.store.put_conversion(conversion(6))
    assert watched.news() == [KEY]
    assert watched.store.conversions[KEY].version == 6


def test_one_that_was_made_anew_takes_the_place_of_the_old_whatever_their_versions(watched: Watched) -> None:
    watched.store.put_conversion(conversion(9, uid="old"))
    watched.store.put_conversion(conversion(3, uid="new"))
    assert watched.store.conversions[KEY].uid == "new"
    watched.store.drop_conversion(conversion(10, uid="old"))
    assert KEY in watched.store.conversions, "the late news of the old one's end is not of the new one"


def test_jobs_and_pods_wake_the_conversion_they_belong_to(watched: Watched) -> None:
    watched.store.put_job(job_view(job()))
    assert watched.news() == [], "nobody is known whose it is"
    watched.store.put_conversion(conversion())
    watched.news()
    watched.store.put_job(job_view(job(version=2)))
    watched.store.put_pod(pod_view(pod()))
    assert watched.news() == [KEY, KEY]
    watched.store.put_job(job_view(job(version=1)))
    assert watched.news() == [], "an older version of a Job is not news"
    watched.store.drop_pod(pod_view(pod()))
    watched.store.drop_pod(pod_view(pod()))
    assert watched.news() == [KEY], "what is gone goes once"
    assert [found.uid for found in watched.store.jobs(KEY, "u")] == ["j"]
    watched.store.drop_job(job_view(job()))
    assert watched.store.jobs(KEY, "u") == ()


def test_after_a_new_list_the_pods_that_are_not_in_it_are_gone(watched: Watched) -> None:
    watched.store.put_conversion(conversion())
    for name, namespace in (("a", "team"), ("b", "team"), ("c", "other")):
        watched.store.put_pod(pod_view(pod(name, namespace=namespace)))
    watched.store.keep_pods("team", ["a"])
    assert [found.uid for found in watched.store.pods(KEY, "u")] == ["a"]
    assert [found.uid for found in watched.store.pods(("other", "demo"), "u")] == ["c"]
    watched.store.keep_pods("", [])
    assert watched.store.pods(KEY, "u") == watched.store.pods(("other", "demo"), "u") == ()


def without_a_job(raw: Raw) -> None:
    del raw["metadata"]["ownerReferences"]


def of_another_job(raw: Raw) -> None:
    raw["metadata"]["ownerReferences"] = owned_by_job("pretrain-1", "x")


def of_a_replica_set(raw: Raw) -> None:
    raw["metadata"]["ownerReferences"][0] |= {"apiVersion": "apps/v1", "kind": "ReplicaSet"}


def only_said_by_labels(raw: Raw) -> None:
    del raw["metadata"]["ownerReferences"]
    raw["metadata"]["labels"] |= {"batch.kubernetes.io/job-name": "demo-1", "batch.kubernetes.io/controller-uid": "j"}


def in_another_namespace(raw: Raw) -> None:
    raw["metadata"]["namespace"] = "other"


@pytest.mark.parametrize(
    "forge", [without_a_job, of_another_job, of_a_replica_set, only_said_by_labels, in_another_namespace]
)
def test_a_pod_that_carries_our_label_and_is_not_of_our_job_counts_nowhere(
    watched: Watched, forge: Callable[[Raw], None]
) -> None:
    watched.store.put_conversion(conversion())
    watched.news()
    raw = pod()
    forge(raw)
    for phase in ("Running", "Failed"):
        assert watched.store.put_pod(pod_view({**raw, "status": {"phase": phase}})) is None, "it is not counted either"
    assert watched.store.pods(KEY, "u") == ()
    watched.store.drop_pod(pod_view(raw))
    assert watched.news() == [], "and wakes nobody"


@pytest.mark.parametrize(
    "change", [{"namespace": "other"}, {"name": "demo"}, {"name": "other-1"}, {"name": "demo-1-1"}]
)
def test_a_job_of_another_namespace_or_name_is_not_ours_whatever_owner_it_names(
    watched: Watched, change: dict[str, str]
) -> None:
    watched.store.put_conversion(conversion())
    watched.news()
    raw = job()
    raw["metadata"] |= change
    watched.store.put_job(job_view(raw))
    assert (watched.store.jobs(KEY, "u"), watched.news()) == ((), [])


def test_nothing_is_kept_of_what_is_gone(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt2pt_operator.store._REMEMBERED", 8)
    for number in range(50):
        uid = f"u{number}"
        watched.store.put_conversion(conversion(number + 1, uid=uid))
        watched.store.put_job(job_view(job(f"j{number}", owner=uid)))
        watched.store.put_pod(pod_view(pod(f"p{number}", owner=uid)))
        watched.store.drop_pod(pod_view(pod(f"p{number}", owner=uid)))
        watched.store.drop_job(job_view(job(f"j{number}", owner=uid)))
        watched.store.drop_conversion(conversion(number + 1, uid=uid))
    kept = {name: value for name, value in vars(watched.store).items() if isinstance(value, dict)}
    assert len(kept.pop("_gone")) == 8, "but the last few uids"
    assert not any(kept.pop("phases").values())
    assert not any(kept.values()), kept


def test_what_was_deleted_does_not_come_back_by_a_late_answer(watched: Watched) -> None:
    watched.store.put_pod(pod_view(pod()))
    watched.store.put_job(job_view(job()))
    watched.store.drop_pod(pod_view(pod()))
    watched.store.drop_job(job_view(job()))
    assert watched.store.put_pod(pod_view(pod())) is None
    watched.store.put_job(job_view(job()))
    assert (watched.store.pods(KEY, "u"), watched.store.jobs(KEY, "u")) == ((), ())
    watched.store.put_pod(pod_view(pod("other")))
    assert len(watched.store.pods(KEY, "u")) == 1


def test_one_that_only_a_list_did_not_have_may_come_back(watched: Watched) -> None:
    """It may have been made while the list was under way."""
    watched.store.put_pod(pod_view(pod()))
    watched.store.keep_pods("", [])
    watched.store.put_pod(pod_view(pod()))
    assert len(watched.store.pods(KEY, "u")) == 1


def test_an_older_answer_about_a_pod_is_not_news(watched: Watched) -> None:
    def at(version: str, phase: str) -> Pod:
        raw = pod()
        raw["metadata"]["resourceVersion"] = version
        return pod_view({**raw, "status": {"phase": phase}})

    watched.store.put_pod(at("9", "Succeeded"))
    watched.store.put_pod(at("10", "Failed"))
    assert watched.store.put_pod(at("9", "Running")) is None
    assert [found.phase for found in watched.store.pods(KEY, "u")] == ["Failed"]


def test_what_a_worker_tells_is_kept_while_it_is_there(watched: Watched) -> None:
    report = report_of('{"version": 1}')
    assert report
    watched.store.put_live(pod_view(pod()), report)
    assert watched.store.live == {}
    watched.store.put_pod(pod_view(pod()))
    watched.store.put_live(pod_view(pod()), report)
    assert watched.store.live == {"p": report}
    watched.store.drop_pod(pod_view(pod()))
    assert watched.store.live == {}


def test_who_waits_for_a_training_is_found_by_its_name(watched: Watched) -> None:
    spec = {"startAfter": {"apiVersion": "batch/v1", "kind": "Job", "name": "pretrain"}}
    name = ("batch/v1", "Job", "team", "pretrain")
    watched.store.put_conversion(conversion(1, spec=spec))
    assert watched.store.waiting_for(name) == (KEY,)
    assert watched.store.trainings() == (name,)
    watched.store.put_conversion(conversion(2, spec=spec, status={"startTime": "2026-01-02T03:04:05Z"}))
    assert watched.store.waiting_for(name) == ()
    watched.store.put_conversion(conversion(3, uid="anew", spec=spec))
    watched.store.drop_conversion(conversion(4, uid="anew"))
    assert watched.store.trainings() == ()


def test_the_key_of_anything() -> None:
    assert key_of(conversion()) == KEY
    assert key_of({}) == ("", "")


def test_a_version_that_is_no_number_does_no_harm(watched: Watched) -> None:
    """It should be one, but a handler that fails is not called again."""
    for version in ("x", "", "7"):
        found = job()
        found["metadata"]["resourceVersion"] = version
        watched.store.put_job(job_view(found))
    assert [found.version for found in watched.store.jobs(KEY, "u")] == ["7"]


def ended(uid: str = "p") -> Pod:
    raw = pod(uid)
    raw["status"] = {"phase": "Succeeded"}
    return pod_view(raw)


def test_the_last_words_of_a_pod_that_is_gone_stay_until_its_conversion_has_ended(watched: Watched) -> None:
    store = watched.store
    store.put_conversion(conversion(1))
    store.put_pod(pod_view(pod()))
    store.drop_pod(ended())
    [kept] = store.pods(KEY, "u")
    assert (kept.gone, kept.over) == (True, True)
    store.put_pod(ended("q"))
    store.keep_pods("", [])
    assert {each.uid for each in store.pods(KEY, "u")} == {"p", "q"}
    store.put_conversion(conversion(2, status={"phase": "Running"}))
    assert len(store.pods(KEY, "u")) == 2
    store.put_conversion(conversion(3, status={"phase": "Succeeded"}))
    assert store.pods(KEY, "u") == ()
    store.put_pod(ended("r"))
    store.drop_pod(ended("r"))
    assert store.pods(KEY, "u") == (), "nobody asks for it any more"


def test_pods_that_only_carry_its_label_push_no_last_words_out(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may make thousands of them, in a namespace of his own."""
    monkeypatch.setattr("ckpt2pt_operator.store._REMEMBERED", 1)
    store = watched.store
    store.put_conversion(conversion(1))
    store.drop_pod(ended())
    raw = pod("forged")
    raw["metadata"] |= {"namespace": "other"}
    raw["status"] = {"phase": "Succeeded"}
    store.put_pod(pod_view(raw))
    store.drop_pod(pod_view(raw))
    assert [each.uid for each in store.pods(KEY, "u")] == ["p"]


def test_last_words_go_with_their_conversion_and_nobody_elses_are_kept(watched: Watched) -> None:
    store = watched.store
    store.drop_pod(ended())
    assert store.pods(KEY, "u") == (), "of a conversion that is not known"
    store.put_conversion(conversion(1))
    store.drop_pod(pod_view(pod("running")))
    assert store.pods(KEY, "u") == (), "it has said nothing"
    store.drop_pod(ended("q"))
    store.drop_conversion(conversion(1))
    assert store.pods(KEY, "u") == ()
