"""The operator's client against a server that answers as it is reported."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from kubernetes.aio import client

from apiserver import Answer, Server
from ckpt2pt_operator.api import Api, Bucket
from ckpt2pt_operator.metrics import Metrics

Found = TypeVar("Found")


def api_of(url: str, metrics: Metrics | None = None) -> Api:
    """A client of the server at ``url``, not held back; to be made where an event loop runs."""
    configuration: Any = client.Configuration()
    configuration.host = url
    return Api(client.ApiClient(configuration), metrics or Metrics("0"), Bucket(1000.0, 1000))


def talk(
    answer: Callable[[str, str, Any], Answer], use: Callable[[Api], Awaitable[Found]], **headers: str
) -> tuple[Found, list[tuple[str, str, Any, str]]]:
    """What ``use`` gives, and what the server was asked: (method, path, body, token)."""
    server = Server(answer)
    server.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    async def run() -> Found:
        api = api_of(server.url)
        try:
            return await use(api)
        finally:
            await api.close()

    with server.running():
        return asyncio.run(run()), server.asked
