"""What a bad network, or an API server that is too busy, does to the operator: everything converges, nothing is done twice.

Between the operator, a process of this machine, and the real API server is a proxy that does as each test scripts it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.checkpoints import Unfinished
from harness.golden import digests, document, reach, status
from harness.kubectl import Kubectl
from harness.machine import wait_until
from harness.process import Process
from harness.proxy import Call, Fault, Proxy
from statuses import check_status

MOST_WRITES = 60
"""Of a conversion that takes ten seconds; without faults it is a dozen."""


@pytest.fixture
def process(proxy: Proxy, processes: Callable[..., Process]) -> Process:
    """The operator behind the proxy, not started yet; it looks at everything every three seconds."""
    return processes(proxy, "--resync-seconds", "3")


def check_converged(process: Process, proxy: Proxy, namespace: Kubectl, target: Path, expected: dict[str, str]) -> None:
    """The bytes of the command, one Job, a status with all that the workers reported, and then silence."""
    found = status(namespace)
    check_status(found)
    assert digests(target) == expected
    assert [job["metadata"]["name"] for job in namespace.get("jobs")["items"]] == ["golden-1"]
    assert proxy.written("POST", "jobs") == 1
    assert [stage["bytes"] for stage in found["stageStatuses"]] == [s["bytesTotal"] for s in found["stageStatuses"]]
    assert all(stage["bytes"] > 0 and stage["attempts"] == 1 for stage in found["stageStatuses"])
    assert proxy.writes() <= MOST_WRITES, proxy.done
    proxy.script = lambda _: None
    before, looks = proxy.writes(), process.metric("reconciles_total")
    wait_until("everything to be looked at twice again", lambda: process.metric("reconciles_total") >= looks + 2)
    assert proxy.writes() == before, "nothing is written when nothing has changed"


def every_other(fault: Fault) -> Callable[[Call], Fault | None]:
    """Of each kind of request the first, the third, the fifth..."""
    return lambda call: fault if call.before % 2 == 0 else None


BAD = {
    "429": Fault(status=429, retry_after=1),
    "500": Fault(status=500),
    "503": Fault(status=503),
    "request-lost": Fault(lost="request"),
    "answer-lost": Fault(lost="answer"),
}


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD)
def test_every_other_request_fails(
    process: Process,
    proxy: Proxy,
    namespace: Kubectl,
    checkpoint: Path,
    volume: Path,
    expected: dict[str, str],
    fault: Fault,
) -> None:
    proxy.script = every_other(fault)
    process.start(ready=False)
    namespace.apply(document(checkpoint, volume))
    reach(namespace, "Succeeded")
    check_converged(process, proxy, namespace, volume / "out", expected)


def test_every_answer_is_slow(
    process: Process, proxy: Proxy, namespace: Kubectl, checkpoint: Path, volume: Path, expected: dict[str, str]
) -> None:
    process.start()
    proxy.script = lambda _: Fault(delay=1.0)
    namespace.apply(document(checkpoint, volume))
    reach(namespace, "Succeeded")
    check_converged(process, proxy, namespace, volume / "out", expected)


def test_every_watch_is_cut_again_and_again(
    process: Process, proxy: Proxy, namespace: Kubectl, checkpoint: Path, volume: Path, expected: dict[str, str]
) -> None:
    process.start()
    namespace.apply(document(checkpoint, volume))

    def over() -> bool:
        proxy.cut_watches()
        return status(namespace).get("phase") == "Succeeded"

    wait_until("it to succeed", over, seconds=90, every=0.5)
    check_converged(process, proxy, namespace, volume / "out", expected)


def test_watches_are_reported_that_their_version_is_gone(
    process: Process, proxy: Proxy, namespace: Kubectl, checkpoint: Path, volume: Path, expected: dict[str, str]
) -> None:
    proxy.script = lambda call: Fault(gone=True) if call.watch and call.before % 2 == 0 else None
    process.start()
    namespace.apply(document(checkpoint, volume))
    reach(namespace, "Succeeded")
    check_converged(process, proxy, namespace, volume / "out", expected)


def test_the_network_is_gone_while_a_checkpoint_is_converted(
    process: Process, proxy: Proxy, namespace: Kubectl, unfinished: Unfinished, expected: dict[str, str]
) -> None:
    process.start()
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    proxy.script = lambda _: Fault(lost="request")
    proxy.cut_watches()
    unfinished.finish()
    namespace.wait("job", "golden-1", "Complete")
    assert status(namespace)["phase"] == "Running", "nobody could tell"
    proxy.script = lambda _: None
    reach(namespace, "Succeeded")
    check_converged(process, proxy, namespace, unfinished.target, expected)


def test_watches_that_say_nothing_any_more_are_found_out(
    process: Process, proxy: Proxy, namespace: Kubectl, unfinished: Unfinished, expected: dict[str, str]
) -> None:
    """The other end is gone and nobody says so; an API server sends a bookmark each minute, so silence is a sign."""
    process.start()
    namespace.apply(unfinished.document())
    reach(namespace, "Running")
    proxy.mute_watches()
    unfinished.finish()
    namespace.wait("job", "golden-1", "Complete")
    reach(namespace, "Succeeded", seconds=120)
    check_converged(process, proxy, namespace, unfinished.target, expected)


def test_an_operator_that_cannot_find_the_api_server_at_its_start_goes_on_as_soon_as_it_can(
    process: Process, proxy: Proxy, namespace: Kubectl, checkpoint: Path, volume: Path
) -> None:
    proxy.script = lambda _: Fault(lost="request")
    process.start(ready=False)
    namespace.apply(document(checkpoint, volume))
    wait_until("five requests", lambda: sum(proxy.calls.values()) >= 5)
    proxy.script = lambda _: None
    reach(namespace, "Succeeded")
