"""An HTTP server that answers as it is reported: for what a client does with refusals, silence and nonsense.

What a real API server says of our objects is tested on one (tests/cluster).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, object]
"""Status, and a JSON document or text."""


class Server:
    """Remembers what it was asked: (method, path with query, body, token)."""

    def __init__(self, answer: Callable[[str, str, Any], Answer]) -> None:
        self.asked: list[tuple[str, str, Any, str]] = []
        self.headers: dict[str, str] = {}
        self.agents: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _handle(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.loads(data) if data else None
                outer.agents.add(self.headers.get("User-Agent", ""))
                outer.asked.append((self.command, self.path, body, self.headers.get("Authorization", "")))
                try:
                    status, found = answer(self.command, self.path, body)
                except ConnectionResetError:
                    self.close_connection = True
                    return
                text = (found if isinstance(found, str) else json.dumps(found)).encode()
                (self.send_response_only if "Date" in outer.headers else self.send_response)(status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 - names in http.server

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in http.server
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @contextmanager
    def running(self) -> Generator[Server]:
        """While the block runs."""
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
