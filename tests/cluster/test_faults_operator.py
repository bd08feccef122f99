"""An operator that crashes, is away or is not alone: whatever was begun goes on, and nothing is done twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.checkpoints import Unfinished
from harness.golden import KIND, document, message, reach, reported, status
from harness.kubectl import Kubectl
from harness.machine import wait_until
from harness.process import Process
from harness.proxy import Call, Fault, Proxy
from statuses import check_status


def jobs(namespace: Kubectl) -> dict[str, str]:
    """Name -> uid."""
    return {job["metadata"]["name"]: job["metadata"]["uid"] for job in namespace.get("jobs")["items"]}


def check_reported(namespace: Kubectl) -> dict[str, Any]:
    """Everything that the workers had to tell is in the status."""
    found = status(namespace)
    check_status(found)
    assert (found["phase"], found["stageSummary"], found["iteration"]) == ("Succeeded", "2/2", 2)
    for stage in found["stageStatuses"]:
        assert (stage["state"], stage["attempts"]) == ("Succeeded", 1)
        assert stage["bytes"] == stage["bytesTotal"] > 0
    return found


def test_an_operator_that_is_killed_after_each_write_gets_there(
    proxy: Proxy, processes: Callable[..., Process], namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    """The server carries a write out, and the operator dies before it is called with so; the next one does one write more."""
    process, died = processes(proxy), threading.Event()
    lock = threading.Lock()

    def die(_: Call) -> None:
        with lock:
            if not died.is_set() and process.child is not None:
                process.child.kill()
                died.set()

    proxy.after_write = die
    namespace.apply(document(checkpoint, volume))
    lives = 0
    while status(namespace).get("phase") != "Succeeded":
        died.clear()
        process.start(ready=False)
        lives += 1
        wait_until("the operator to die", lambda: process.ended() is not None, seconds=60)
        assert lives < 15
    proxy.after_write = lambda _: None
    process.start()
    check_reported(namespace)
    assert list(jobs(namespace)) == ["golden-1"]
    assert proxy.written("POST", "jobs") == 1
    assert lives >= 4, "status, Job, status, status: each was the last of one operator"


def test_what_workers_did_while_the_operator_was_away_is_reported_when_it_is_back(
    processes: Callable[..., Process], namespace: Kubectl, unfinished: Unfinished
) -> None:
    process = processes()
    process.start()
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    assert process.stop() == 0
    unfinished.finish()
    namespace.wait("job", "golden-1", "Complete")
    assert status(namespace)["phase"] == "Running"
    process.start()
    reach(namespace, "Succeeded")
    check_reported(namespace)


def test_a_status_that_was_lost_is_reported_again_and_nothing_is_done_again(
    processes: Callable[..., Process], namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    """As after a restore from a backup: those keep no status."""
    process = processes()
    process.start()
    namespace.apply(document(checkpoint, volume))
    before, made = reach(namespace, "Succeeded"), jobs(namespace)
    process.stop()
    namespace("patch", KIND, "golden", "--subresource=status", "--type=merge", "--patch", json.dumps({"status": None}))
    assert status(namespace) == {"observedGeneration": -1}, "as of a new one"
    process.start()
    reach(namespace, "Succeeded")
    assert check_reported(namespace)["stageStatuses"] == before["stageStatuses"]
    assert jobs(namespace) == made


def test_a_conversion_that_was_replaced_meanwhile_gets_a_job_of_its_own(
    processes: Callable[..., Process], namespace: Kubectl, unfinished: Unfinished
) -> None:
    """Deleted and made anew under the same name while nobody looked."""
    process = processes()
    process.start()
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    [uid] = jobs(namespace).values()
    process.stop()
    namespace("delete", KIND, "golden", "--wait=false")
    namespace.wait_gone(KIND, "golden")
    # Workers of the first would convert the finished source, and leave those of the second nothing to read.
    wait_until("the pods of the first to be gone", lambda: not namespace.get("pods")["items"])
    unfinished.finish()
    namespace.apply(unfinished.document())
    process.start()
    reach(namespace, "Succeeded")
    check_reported(namespace)
    assert jobs(namespace).keys() == {"golden-1"}
    assert uid not in jobs(namespace).values()


def test_a_conversion_that_is_deleted_without_its_job_is_forgotten(
    processes: Callable[..., Process], namespace: Kubectl, unfinished: Unfinished
) -> None:
    """Nobody asks the API server about it any more: another one that is held shows that time has passed."""
    process = processes(None, "--resync-seconds", "1")
    process.start()
    held = unfinished.document(suspend=True)
    held["metadata"]["name"] = "held"
    namespace.apply(unfinished.document(), held)
    reach(namespace, "Running")
    reach(namespace, "Suspended", "held")
    namespace("delete", KIND, "golden", "--cascade=orphan")
    unfinished.finish()
    namespace.wait("job", "golden-1", "Complete")
    written = process.metric("status_writes_total")
    looks = process.metric("reconciles_total")
    wait_until("two resyncs", lambda: process.metric("reconciles_total") >= looks + 2)
    assert process.metric("status_writes_total") == written
    assert "a bug" not in process.log.read_text()


def test_a_namespace_that_is_deleted_goes_at_once(
    processes: Callable[..., Process], namespace: Kubectl, unfinished: Unfinished, kubectl: Kubectl
) -> None:
    process = processes()
    process.start()
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    kubectl("delete", "namespace", str(namespace.namespace), "--wait=false")
    kubectl.wait_gone("namespace", str(namespace.namespace), seconds=90)
    assert "a bug" not in process.log.read_text()


def test_two_operators_do_not_do_it_twice(
    processes: Callable[..., Process], namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    """Without a lease, by mistake."""
    both = processes(), processes()
    for process in both:
        process.start()
    uids: set[str] = set()
    namespace.apply(document(checkpoint, volume))

    def over() -> bool:
        uids.update(jobs(namespace).values())
        return status(namespace).get("phase") == "Succeeded"

    wait_until("it to succeed", over, seconds=90)
    check_reported(namespace)
    assert len(uids) == 1
    assert sum(process.metric("status_writes_total") for process in both) <= 30
    assert not any("a bug" in process.log.read_text() for process in both)


def test_of_two_operators_with_a_lease_one_works_and_the_other_takes_over(
    proxy: Proxy, processes: Callable[..., Process], namespace: Kubectl, unfinished: Unfinished
) -> None:
    flags = "--leader-elect", "--lease-namespace", str(namespace.namespace)
    first, second = processes(proxy, *flags), processes(None, *flags)
    first.start()
    wait_until("the first to work", lambda: "API server" in first.log.read_text())
    second.start()
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    assert second.metric("reconciles_total") == 0, "it stands by"
    proxy.script = lambda _: Fault(lost="request")
    proxy.cut_watches()
    wait_until("the first to end", lambda: first.ended() is not None, seconds=60)
    assert first.ended() == 1
    assert "could not be renewed" in first.log.read_text()
    unfinished.finish()
    reach(namespace, "Succeeded")
    check_reported(namespace)
    assert second.metric("reconciles_total") > 0


def test_a_job_of_somebody_else_under_the_same_name_is_left_alone(
    processes: Callable[..., Process], namespace: Kubectl, checkpoint: Path, volume: Path, converter_image: str
) -> None:
    pod = {"restartPolicy": "Never", "containers": [{"name": "x", "image": converter_image, "args": ["--version"]}]}
    theirs = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "golden-1"},
        "spec": {"template": {"spec": pod}},
    }
    namespace.apply(theirs)
    made = jobs(namespace)
    process = processes()
    process.start()
    namespace.apply(document(checkpoint, volume))
    found = reach(namespace, "Failed")
    assert reported(found, "Failed") == ("True", "NameConflict")
    assert "golden-1" in message(found, "Failed")
    assert jobs(namespace) == made
