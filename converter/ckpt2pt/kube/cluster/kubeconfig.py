"""The connection that a kubeconfig describes, its plugins for signing in included: the package kubernetes reads it."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from ckpt2pt.errors import UsageError
from ckpt2pt.kube.cluster.api import Connection, in_cluster


def connect(kubeconfig: Path | None, context: str | None) -> Connection:
    """In a pod its service account, unless a kubeconfig is asked for; elsewhere the kubeconfig, as kubectl finds it."""
    if kubeconfig is None and context is None:
        found = in_cluster()
        if found:
            return found
    hint = "install ckpt2pt with the extra submit ('.[submit]' in a checkout), or run it in a pod that has a service account"
    try:
        from kubernetes import client, config  # noqa: PLC0415 - an extra
    except ImportError:
        raise UsageError("the package kubernetes is not there", where="this environment", hint=hint) from None
    loader: Any = config
    settings: Any = client.Configuration()
    file = None if kubeconfig is None else str(kubeconfig)
    try:
        loader.load_kube_config(config_file=file, context=context, client_configuration=settings)
        contexts, active = loader.list_kube_config_contexts(config_file=file)
    except (config.ConfigException, OSError) as error:
        where = kubeconfig or "the kubeconfig"
        raise UsageError(f"no connection: {error}", where=where, hint="check --kubeconfig and --context") from error
    chosen = next((each for each in contexts if each["name"] == context), active)
    return Connection(
        server=str(settings.host).rstrip("/"),
        context=_context(settings) if str(settings.host).startswith("https") else None,
        token=lambda: _token(settings),
        namespace=str(chosen["context"].get("namespace") or "default"),
    )


def _context(settings: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.ssl_ca_cert)
    if not settings.verify_ssl:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if settings.cert_file:
        context.load_cert_chain(settings.cert_file, settings.key_file)
    return context


def _token(settings: Any) -> str | None:
    given = settings.get_api_key_with_prefix("authorization") or settings.get_api_key_with_prefix("BearerToken")
    return None if given is None else str(given).removeprefix("Bearer ")
