"""The process: what ends it, and with which code.  The whole of it runs in tests/cluster."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from apiserver import Answer, Server
from ckpt2pt import __version__
from ckpt2pt_operator import main as module
from ckpt2pt_operator.api import ApiError
from ckpt2pt_operator.main import Operator, main, set_up_logging
from ckpt2pt_operator.settings import read

IMAGE = ["--worker-image", "i:1", "--metrics-port", "0"]


@contextmanager
def started(tmp_path: Path, answer: Any, *flags: str) -> Generator[subprocess.Popen[str]]:
    """The operator as a process against a server."""
    server = Server(answer)
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": server.url}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        "users": [{"name": "c", "user": {"token": "t"}}],
    }  # fmt: skip
    file = tmp_path / "kubeconfig"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "ckpt2pt_operator.main", *IMAGE, *flags]
    environ = {**os.environ, "KUBECONFIG": str(file)}
    with (
        server.running(),
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def run(tmp_path: Path, answer: Any, *flags: str) -> tuple[int, list[dict[str, Any]]]:
    """Its exit code, when it ends by itself, and what it logged."""
    with started(tmp_path, answer, *flags) as process:
        _, said = process.communicate(timeout=60)
    return process.returncode, [json.loads(line) for line in said.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_it_also_while_another_holds_the_lease(number: signal.Signals, tmp_path: Path) -> None:
    asked = threading.Event()

    def answer(_: str, path: str, __: Any) -> Answer:
        if "selfsubjectaccessreviews" in path:
            return 201, {"status": {"allowed": True}}
        assert path.endswith("/leases/ours"), path
        asked.set()
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": "other", "leaseDurationSeconds": 15, "acquireTime": now, "renewTime": now}
        return 200, {"metadata": {"name": "ours"}, "spec": spec}

    flags = ("--leader-elect", "--lease-name", "ours", "--lease-namespace", "ops")
    with started(tmp_path, answer, *flags) as process:
        assert asked.wait(60)
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "asked to stop before it had begun" in said
    assert "Traceback" not in said


def test_a_right_that_is_missing_ends_it_and_is_named(tmp_path: Path) -> None:
    def answer(_: str, path: str, body: Any) -> Answer:
        if "selfsubjectaccessreviews" in path:
            attributes = body["spec"]["resourceAttributes"]
            return 201, {"status": {"allowed": (attributes["verb"], attributes["resource"]) != ("delete", "jobs")}}
        return 200, {"gitVersion": "v1.36.3", "items": [], "metadata": {}}

    code, logged = run(tmp_path, answer)
    assert code == 1
    assert logged[-1]["level"] == "CRITICAL"
    assert datetime.fromisoformat(logged[-1]["time"]).tzinfo is not None
    assert "delete jobs.batch in all namespaces: see the RBAC of the chart" in logged[-1]["message"]


def test_a_lease_that_may_not_be_held_is_not_waited_for(tmp_path: Path) -> None:
    def answer(_: str, path: str, __: Any) -> Answer:
        assert "selfsubjectaccessreviews" in path, path
        return 201, {"status": {"allowed": False}}

    code, logged = run(tmp_path, answer, "--leader-elect", "--lease-namespace", "ops")
    assert code == 1
    assert "create leases.coordination.k8s.io in namespace ops" in logged[-1]["message"]


def test_a_cluster_without_the_kind_is_waited_for_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CRD_SECONDS", 0.0)

    class Nothing:
        async def version(self) -> str:
            return "v1"

        async def list(self, *_: object, **__: object) -> object:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")

    async def prove() -> None:
        operator = Operator(read(IMAGE, {}))
        await asyncio.sleep(0.01)
        await operator._prove(Nothing())  # type: ignore[arg-type]

    with pytest.raises(module.CannotServeError, match=r"apply crds/ of this version"):
        asyncio.run(prove())


def test_what_follows_a_training_has_a_phase_of_its_own_among_the_metrics() -> None:
    """It is Running for weeks, and an alert asks whether what is Running gets on."""

    async def phases() -> dict[str, float]:
        operator = Operator(read(IMAGE, {}))
        for name, phase, reason in (
            ("a", "Running", "InProgress"),
            ("b", "Running", "Following"),
            ("c", "Suspended", "Following"),
            ("d", "", ""),
        ):
            status = {"phase": phase, "conditions": [{"type": "Complete", "reason": reason}]}
            meta = {"namespace": "n", "name": name, "uid": name, "resourceVersion": "1"}
            operator._store.put_conversion({"metadata": meta, "status": status})
        operator._refresh_metrics()
        [family] = [f for f in operator._metrics.registry.collect() if f.name == "ckpt2pt_operator_conversions"]
        return {sample.labels["phase"]: sample.value for sample in family.samples if sample.value}

    assert asyncio.run(phases()) == {"Pending": 1, "Running": 1, "Following": 1, "Suspended": 1}


def test_a_wrong_flag_is_reported_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 64
    assert "no image is given for the workers" in capsys.readouterr().err
    assert main(["--worker-image=i:1", "--concurrency=none"]) == 64
    assert "argument --concurrency" in capsys.readouterr().err


def test_it_tells_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ckpt2pt_operator.main", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["ckpt2pt-operator", __version__]


def test_a_line_of_text_tells_what_json_tells(capsys: pytest.CaptureFixture[str]) -> None:
    """It said that it tries again, and neither of what nor why."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        set_up_logging(read(["--worker-image=i:1", "--log-format=text"], {}))
        logging.getLogger("ckpt2pt_operator").warning(
            "again in %.1f s", 2.0, extra={"conversion": "a/b", "error": "no"}
        )
        logging.getLogger("kopf").warning("other", extra={"k8s_ref": {}})
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("WARNING ckpt2pt_operator: again in 2.0 s; conversion=a/b; error=no")
    assert second.endswith("kopf: other")


def test_settings_are_logged_at_the_start(tmp_path: Path) -> None:
    code, logged = run(tmp_path, lambda *_: (201, {"items": [], "metadata": {}, "status": {"allowed": False}}))
    assert code == 1
    assert logged[0]["settings"]["worker_image"] == "i:1"
