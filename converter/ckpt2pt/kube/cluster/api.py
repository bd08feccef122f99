"""Requests to the API server with the standard library alone, and what its answers mean to a user."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlencode

from ckpt2pt.errors import Ckpt2ptError, MissingInputError, TryAgainError, UsageError
from ckpt2pt.kube.conversion.spec import API_VERSION

Json = dict[str, object]

CONVERSIONS = f"apis/{API_VERSION}", "checkpointconversions"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ACCOUNT_VARIABLE = "CKPT2PT_SERVICE_ACCOUNT"
MAX_ANSWER_BYTES = 64 << 20
_ONE_TRY_SECONDS = 15.0
_PASSING = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where the API server is, and who asks.  ``token`` is asked for each request: a pod's is renewed while it runs."""

    server: str
    context: ssl.SSLContext | None
    token: Callable[[], str | None]
    namespace: str
    direct: bool = False


class ApiError(Exception):
    """The API server answered, and refused."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(status, message)
        self.status, self.message, self.retry_after = status, message, retry_after


def in_cluster(environment: Mapping[str, str] = os.environ) -> Connection | None:
    """The connection of a pod with a service account; None elsewhere.

    ``$CKPT2PT_SERVICE_ACCOUNT`` names the folder of token, ca.crt and namespace where it is not mounted as usual.
    """
    account = Path(environment.get(ACCOUNT_VARIABLE) or ACCOUNT)
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (account / "token").is_file():
        return None
    try:
        context = ssl.create_default_context(cafile=str(account / "ca.crt"))
        namespace = (account / "namespace").read_text().strip()
    except OSError as error:
        hint = "mount the service account's token into this pod (automountServiceAccountToken: true)"
        raise MissingInputError(f"cannot be read: {error}", where=account, hint=hint) from error
    return Connection(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        context=context,
        token=lambda: (account / "token").read_text().strip(),
        namespace=namespace,
        direct=True,
    )


class Api:
    """Requests within ``seconds`` altogether for each call; what may pass is tried again in that time."""

    def __init__(self, connection: Connection, *, seconds: float = 60.0) -> None:
        self.connection = connection
        self._seconds = seconds
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=connection.context)]
        if connection.direct:
            handlers.append(
                urllib.request.ProxyHandler({})
            )  # a pod reaches the API server without the proxy of its users
        self._opener = urllib.request.build_opener(*handlers)

    def json(self, method: str, path: str, body: Json | None = None, **query: str) -> Json:
        """One request of a JSON document.  Raises :class:`ApiError`, or what :func:`explained` makes of it."""
        found: object = json.loads(self.text(method, path, body, **query))
        return cast("Json", found) if isinstance(found, dict) else {}

    def text(self, method: str, path: str, body: Json | None = None, **query: str) -> str:
        """One request of any text."""
        url = self.connection.server + path + (f"?{urlencode(query)}" if query else "")
        end, pause = time.monotonic() + self._seconds, 1.0
        while True:
            left = end - time.monotonic()
            try:
                return self._once(method, url, body, min(max(left, 1.0), _ONE_TRY_SECONDS))
            except ApiError as error:
                if error.status not in _PASSING or left <= pause:
                    raise
                pause = max(pause, error.retry_after or 0.0)
            except (OSError, http.client.HTTPException) as error:
                if left <= pause:
                    reason = getattr(error, "reason", None) or error
                    hint = "try again; check the network and --kubeconfig"
                    what = f"the API server cannot be reached: {reason}"
                    raise TryAgainError(what, where=self.connection.server, hint=hint) from error
            time.sleep(min(pause, max(end - time.monotonic(), 0.0)))
            pause *= 2

    def _once(self, method: str, url: str, body: Json | None, timeout: float) -> str:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json, */*", "Content-Type": kind, "User-Agent": "ckpt2pt"}
        token = self.connection.token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=headers, method=method)
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return cast("bytes", answer.read(MAX_ANSWER_BYTES)).decode(errors="replace")
        except urllib.error.HTTPError as error:
            with error:
                raise ApiError(error.code, _message(error), _seconds(error.headers.get("Retry-After"))) from None


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read(1 << 16).decode(errors="replace")
    try:
        document: object = json.loads(text)
    except ValueError:
        return text.strip()[:500] or error.reason
    message = cast("Json", document).get("message") if isinstance(document, dict) else None
    return str(message or error.reason)


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdecimal() else None


def explained(error: ApiError, what: str, where: str) -> Ckpt2ptError:
    """A refusal in the user's words."""
    text = f"{what} was refused ({error.status}): {error.message}"
    if error.status in {400, 422}:
        return UsageError(text, where=where, hint="correct the document")
    if error.status in {401, 403}:
        hint = (
            "give this account the right by a Role (docs/automation.md), or choose another with --kubeconfig, --context"
        )
        return UsageError(text, where=where, hint=hint)
    if error.status == 404:
        hint = "check the name and --namespace; the CRD comes with the chart, or by kubectl apply -f crds/"
        return MissingInputError(text, where=where, hint=hint)
    return TryAgainError(text, where=where, hint="try again later")
