"""``GET /progress``, ``/metrics`` and ``/healthz`` of a running worker.  Best effort: a port in use is a warning."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ckpt2pt import __version__
from ckpt2pt.kube.worker.account import Account

log = logging.getLogger("ckpt2pt")

MAX_CONNECTIONS = 8
TIMEOUT_SECONDS = 5.0


@contextmanager
def served(account: Account, port: int) -> Generator[int]:
    """Serve the account's numbers while the block runs; gives the port, 0 if there is none to be had.

    ``port`` 0 takes any free one.
    """
    try:
        server = _Server(account, port)
    except OSError as error:
        log.warning("progress is not served on port %d: %s", port, error)
        yield 0
        return
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="progress", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    """A few short connections at a time, each answered from the account."""

    daemon_threads = True

    def __init__(self, account: Account, port: int) -> None:
        # Pods have addresses of one family or of both.
        both = socket.has_dualstack_ipv6()
        listening = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
        super().__init__(("", port), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.server_address = listening.getsockname()
        self.server_port = self.server_address[1]
        self.account = account
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Refuse what would be one connection too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        """Answer, and make room for the next."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asked has gone, or asks nonsense: none of the conversion's business."""


class _Handler(BaseHTTPRequestHandler):
    timeout = TIMEOUT_SECONDS
    server_version, sys_version = f"ckpt2pt/{__version__}", ""

    def do_GET(self) -> None:
        account = self.server.account if isinstance(self.server, _Server) else Account()
        path = self.path.partition("?")[0]
        if path == "/progress":
            self._answer(json.dumps(account.progress()), "application/json")
        elif path == "/metrics":
            self._answer(metrics(account), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/healthz":
            self._answer("ok\n", "text/plain; charset=utf-8")
        else:
            self.send_error(404)

    def _answer(self, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in http.server
        """Nothing: stderr is for the conversion."""


#   name                            of /progress     type         help
_METRICS = (
    ("bytes_total",                 "bytes",         "counter",   "Source bytes read by this try."),
    ("bytes_expected",              "bytesTotal",    "gauge",     "Source bytes that this try has to read."),
    ("throughput_bytes_per_second", "throughput",    "gauge",     "Source bytes read in a second, on average."),
    ("iteration",                   "iteration",     "gauge",     "Iteration of the checkpoint."),
)  # fmt: skip


def metrics(account: Account) -> str:
    """The same numbers in Prometheus' text format, with the stage where there is one."""
    progress = account.progress()
    stages = account.stages or ()
    stage = f'stage="{stages[0]}"' if len(stages) == 1 else ""
    lines: list[str] = []
    for name, field, kind, identity_options in _METRICS:
        if field in progress:
            full = f"ckpt2pt_worker_{name}"
            lines += [
                f"# HELP {full} {identity_options}",
                f"# TYPE {full} {kind}",
                f"{full}{f'{{{stage}}}' if stage else ''} {progress[field]}",
            ]
    name = "ckpt2pt_worker_phase"
    lines += [f"# HELP {name} 1 for what the worker is doing.", f"# TYPE {name} gauge"]
    labels = ",".join(filter(None, (f'phase="{progress["phase"]}"', stage)))
    lines.append(f"{name}{{{labels}}} 1")
    return "\n".join(lines) + "\n"
