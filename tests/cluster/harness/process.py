"""The operator as a process of this machine: it can be killed between any two requests, and come through a proxy."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from harness.machine import ClusterError, wait_until
from harness.release import ALLOWED


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@dataclass(slots=True)
class Process:
    """One operator, of one namespace; it may be started again and again."""

    kubeconfig: Path
    namespace: str
    image: str
    log: Path
    flags: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    child: subprocess.Popen[bytes] | None = None

    def start(self, *, ready: bool = True) -> None:
        """Start it, and wait until it watches, unless stated otherwise."""
        words = [
            sys.executable, "-m", "ckpt2pt_operator.main", "--namespace", self.namespace, "--worker-image", self.image,
            "--metrics-port", str(self.port), "--log-format", "text", "--allow", ",".join(ALLOWED), *self.flags,
        ]  # fmt: skip
        with self.log.open("ab") as log:
            environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
            self.child = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        if ready:
            wait_until(f"the operator to be ready; its log is {self.log}", self.is_ready, seconds=60)

    def kill(self) -> None:
        """As a crash does."""
        if self.child is not None:
            self.child.send_signal(signal.SIGKILL)
            self.child.wait(10)

    def stop(self) -> int:
        """As a kubelet does; its exit code."""
        if self.child is None:
            return 0
        self.child.terminate()
        try:
            return self.child.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return None if self.child is None else self.child.poll()

    def is_ready(self) -> bool:
        """Whether it says so."""
        if self.ended() is not None:
            raise ClusterError(f"the operator ended with {self.ended()}\n{self.log.read_text()[-3000:]}")
        return self._get("readyz") == "ok"

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        found = re.findall(rf"^ckpt2pt_operator_{name}(?:{{[^}}]*}})? (\S+)$", self._get("metrics"), re.MULTILINE)
        return sum(map(float, found))

    def _get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=10) as answer:
                text: str = answer.read().decode()
        except OSError:
            return ""
        return text
