"""The operator with many conversions, against a real API server (README.md says how).

Workers are held back by a scheduler that does not exist, so that what is measured is the operator.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from ckpt2pt.kube.conversion.job import PROGRESS_PORT
from ckpt2pt_operator.api import CONVERSIONS, JOBS, PODS, Api, ApiError
from ckpt2pt_operator.informer import SELECTOR, pages
from ckpt2pt_operator.metrics import Metrics
from ckpt2pt_operator.rules.kept import key_of
from measure import commit, host, installed, today

HERE = Path(__file__).parent
NAMESPACES = "api/v1", "namespaces"
CRDS = "apis/apiextensions.k8s.io/v1", "customresourcedefinitions"
PORT = 18081
WRITES = ("put", "post", "patch", "delete")
REST_SECONDS = 30
SILENT = 200
"""Workers that are said to run and whose progress port takes a connection and never answers."""


def document(number: int, stages: int, *, pods: bool = True) -> dict[str, Any]:
    """A conversion whose workers never start; without ``pods`` its Job is suspended."""
    return {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": f"scale-{number}"},
        "spec": {
            "model": {"numLayers": stages},
            "parallelism": {"pipeline": stages},
            "source": {"volume": {"hostPath": {"path": "/srv"}}, "path": "ms"},
            "metadata": {"path": "pt_meta"},
            "target": {"path": f"out/{number}"},
            "pendingDeadlineSeconds": 86400,
            "suspend": not pods,
            "workers": {"schedulerName": "nobody", "resources": {"limits": {"memory": "256Mi"}}},
        },
    }


class Running:
    """An operator as a process of its own."""

    def __init__(self, namespace: str, qps: float) -> None:
        self.began = time.monotonic()
        words = [
            "--allow=hostPath",
            "--worker-image",
            "none:1",
            "--namespace",
            namespace,
            "--metrics-port",
            str(PORT),
            "--log-level",
            "warning",
            f"--qps={qps}",
        ]
        self.process = subprocess.Popen([sys.executable, "-m", "ckpt2pt_operator.main", *words], env=installed())

    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.began

    def metrics(self) -> str:
        """What it tells Prometheus; empty before it does."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=10) as answer:
                text: str = answer.read().decode()
        except OSError:
            return ""
        return text

    def value(self, name: str, text: str | None = None) -> float:
        """The sum of a metric over its labels."""
        found = re.findall(rf"^ckpt2pt_operator_{name}(?:{{[^}}]*}})? (\S+)$", text or self.metrics(), re.MULTILINE)
        return sum(map(float, found))

    def memory(self) -> dict[str, int]:
        """Resident bytes, now and at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) << 10 for name in ("VmRSS", "VmHWM")}  # type: ignore[index]

    def cpu(self) -> float:
        """Seconds of processor time."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def quantile(self, name: str, q: float) -> float | None:
        """The upper bound of the histogram's bucket in which the quantile lies, in seconds; None beyond the last."""
        buckets = re.findall(rf'^ckpt2pt_operator_{name}_bucket{{le="([^"]+)"}} (\S+)$', self.metrics(), re.MULTILINE)
        total = float(buckets[-1][1])
        bound = next(le for le, count in buckets if float(count) >= q * total)
        return None if bound == "+Inf" else float(bound)

    async def until(self, what: str, reached: Callable[[str], bool], seconds: float) -> float:
        """Seconds from its start until ``reached`` is true of its metrics."""
        while time.monotonic() - self.began < seconds:
            if self.process.poll() is not None:
                raise SystemExit(f"the operator ended with {self.process.returncode}")
            text = self.metrics()
            if text and reached(text):
                return time.monotonic() - self.began
            await asyncio.sleep(0.25)
        raise SystemExit(f"not within {seconds} s: {what}")


@contextmanager
def operator(namespace: str, qps: float) -> Iterator[Running]:
    """Run one."""
    running = Running(namespace, qps)
    try:
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)


async def install(api: Api) -> None:
    """Our CRD, where it is not there."""
    crd = yaml.safe_load((HERE.parent / "crds" / "checkpointconversions.yaml").read_text())
    with suppress(ApiError):
        await api.create_object(CRDS, "", crd)
    for _ in range(100):
        with suppress(ApiError):
            await api.list(CONVERSIONS, "", key_of, limit="1")
            return
        await asyncio.sleep(0.2)


async def create(api: Api, namespace: str, count: int, stages: int, *, pods: bool) -> None:
    """Make the conversions, many at a time."""
    slots = asyncio.Semaphore(32)

    async def one(number: int) -> None:
        async with slots:
            await api.create_object(CONVERSIONS, namespace, document(number, stages, pods=pods))

    await asyncio.gather(*(one(number) for number in range(count)))


async def settled(api: Api, namespace: str, pods: int) -> int:
    """Wait until the Job controller has made the pods; returns how many there are."""
    found, since = 0, time.monotonic()
    while found < pods and time.monotonic() - since < 600:
        found = len([pod async for pod in pages(api, PODS, namespace, key_of, labelSelector=SELECTOR)])
        await asyncio.sleep(5)
    return found


async def beside_silent(api: Api, namespace: str, number: int, stages: int) -> float:
    """Seconds until a new conversion has its Job while workers run that do not tell how far they are."""
    began = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    container = {"name": "convert", "image": "none:1", "imageID": "", "ready": True, "restartCount": 0}
    running = {"containerStatuses": [{**container, "state": {"running": {"startedAt": began}}}]}
    address = {"phase": "Running", "podIP": "127.0.0.1", "podIPs": [{"ip": "127.0.0.1"}]}
    with socket.create_server(("127.0.0.1", PROGRESS_PORT), backlog=4096):
        names = [name async for _, name in pages(api, PODS, namespace, key_of, labelSelector=SELECTOR)]
        for name in names[:SILENT]:
            body = {"status": {**address, **running}}
            await api._request(
                "PATCH", PODS, namespace, name, subresource="status", body=body, content="application/merge-patch+json"
            )
        await asyncio.sleep(REST_SECONDS)
        asked = time.monotonic()
        await api.create_object(CONVERSIONS, namespace, document(number, stages))
        while time.monotonic() - asked < 600:
            with suppress(ApiError):
                await api.get(JOBS, namespace, f"scale-{number}-1")
                return time.monotonic() - asked
            await asyncio.sleep(0.05)
    raise SystemExit("a new conversion has no Job within 600 s")


async def from_nothing(
    api: Api, namespace: str, count: int, stages: int, qps: float, *, pods: bool
) -> tuple[dict[str, Any], int]:
    """Until each conversion has its Job, and then at rest; returns also how many pods there are."""
    with operator(namespace, qps) as first:
        asked = await first.until("Jobs", lambda page: first.value("api_requests_total", jobs(page)) >= count, 3600)
        await first.until("rest", lambda page: not first.value("queue_depth", page), 3600)
        wrote = sum(writes(first.metrics(), verb) for verb in WRITES)
        found = await settled(api, namespace, count * stages if pods else 0)
        await asyncio.sleep(REST_SECONDS)
        return {
            "jobs_created_seconds": asked,
            "writes": first.value("status_writes_total"),
            "writes_per_second": wrote / first.age(),
            "memory": first.memory(),
            "cpu_seconds": first.cpu(),
            "queue_latency_p99_at_most": first.quantile("queue_latency_seconds", 0.99),
            "reconcile_duration_p99_at_most": first.quantile("reconcile_duration_seconds", 0.99),
        }, found


async def restarted(namespace: str, count: int, qps: float, then: Callable[[], Awaitable[None]]) -> dict[str, Any]:
    """With everything there: until each has been looked at, and then at rest; ``then`` goes on while it runs."""
    with operator(namespace, qps) as again:
        listed = await again.until("list", lambda page: again.value("conversions", page) >= count, 300)
        listed_cpu = again.cpu()
        # Every one was looked at: its status is decided, and as there was nothing new to say, none was written.
        seen = await again.until(
            "seen",
            lambda page: again.value("reconciles_total", page) >= count and not again.value("queue_depth", page),
            300,
        )
        seen_cpu, seen_load = again.cpu(), os.getloadavg()[0]
        at_start = again.value("status_writes_total")
        await asyncio.sleep(REST_SECONDS)
        idle = again.metrics()
        before = {verb: writes(idle, verb) for verb in WRITES}
        cpu = again.cpu()
        await asyncio.sleep(REST_SECONDS)
        rest = again.metrics()
        found = {
            "all_listed_seconds": listed,
            "all_listed_cpu_seconds": listed_cpu,
            "all_reconciled_seconds": seen,
            "all_reconciled_cpu_seconds": seen_cpu,
            "load": seen_load,
            "writes_at_start": at_start,
            "writes_at_rest": sum(writes(rest, verb) - value for verb, value in before.items()),
            "cpu_share_at_rest": (again.cpu() - cpu) / REST_SECONDS,
            "memory": again.memory(),
            "queue_latency_p99_at_most": again.quantile("queue_latency_seconds", 0.99),
            "reconcile_duration_p99_at_most": again.quantile("reconcile_duration_seconds", 0.99),
        }
        await then()
    return found


async def measure(count: int, stages: int, qps: float, *, with_pods: bool, left: str = "") -> dict[str, Any]:
    """Once from nothing, and once from everything; of what an earlier run ``left`` in a namespace the latter alone."""
    api = await Api.create(Metrics("bench"), qps=1000, burst=1000)
    namespace = left or f"scale-{int(time.time())}"
    found: dict[str, Any] = {"conversions": count, "stages": stages, "qps": qps}
    pods = 0

    async def beside() -> None:
        new = await beside_silent(api, namespace, count, stages) if pods else None
        found["silent_workers"] = {"workers": min(SILENT, pods), "new_job_seconds": new}

    try:
        await install(api)
        if not left:
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
            await api.create_object(NAMESPACES, "", body)
            await create(api, namespace, count, stages, pods=with_pods)
            found["from_nothing"], pods = await from_nothing(api, namespace, count, stages, qps, pods=with_pods)
        found["restarted"] = await restarted(namespace, count, qps, beside)
        found["jobs"] = len([job async for job in pages(api, JOBS, namespace, key_of)])
        return found | {"pods": pods}
    finally:
        try:
            if not left:
                await api._request("DELETE", NAMESPACES, "", namespace, body={"propagationPolicy": "Background"})
        except ApiError as error:
            print(error, file=sys.stderr)
        await api.close()


def jobs(text: str) -> str:
    """Of all requests, those that made a Job."""
    return "\n".join(line for line in text.splitlines() if 'resource="jobs"' in line and 'verb="post"' in line)


def writes(text: str, verb: str) -> float:
    """Requests of a verb that change something."""
    lines = [line for line in text.splitlines() if f'verb="{verb}"' in line and "requests_total" in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if "selfsubjectaccessreviews" not in line)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversions", type=int, default=1000)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--qps", type=float, default=20.0, help="writes a second that the operator is allowed")
    parser.add_argument(
        "--no-pods", action="store_true", help="suspend the Jobs: making pods takes controllers most of an hour"
    )
    parser.add_argument("--left", metavar="NAMESPACE", default="", help="measure the restart alone, with what is there")
    parser.add_argument("--no-keep", action="store_true", help="do not write a results file")
    given = parser.parse_args()
    if "KUBECONFIG" not in os.environ:
        parser.error("set KUBECONFIG: `make cluster` prints it")
    where = host()
    found = asyncio.run(
        measure(given.conversions, given.stages, given.qps, with_pods=not given.no_pods, left=given.left)
    )
    theme = "scale-suspended" if given.no_pods else "scale"
    document = {"theme": theme, "date": today(), "commit": commit(), "host": where} | found
    text = json.dumps(document, indent=1)
    print(text)
    if not given.no_keep:
        cpu = re.sub(r"\W+", "-", str(where["cpu"]).lower()).strip("-")
        (HERE / "results" / f"{theme}_{cpu}-{where['cpus']}cpu_{today()}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
