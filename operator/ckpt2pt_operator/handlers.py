"""What kopf hands over: changes of conversions.  They are put into the store, and nothing else.

An ``on.event`` handler is never tried again and its errors are swallowed, so nothing that can fail is done here; and
it writes nothing: no annotation, no finalizer.
"""

from __future__ import annotations

import os
from dataclasses import replace

import kopf

from ckpt2pt.kube.conversion.spec import API_VERSION
from ckpt2pt_operator.api import SILENCE
from ckpt2pt_operator.store import Store
from ckpt2pt_operator.transport import Conversions

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "checkpointconversions"


def registry(store: Store, watched: Conversions) -> kopf.OperatorRegistry:
    """The handlers, for a store of ours."""
    found = kopf.OperatorRegistry()

    async def on_conversion(event: kopf.RawEvent, **_: object) -> None:
        raw = dict(event["object"])
        if event["type"] == "DELETED":
            store.drop_conversion(raw)
        else:
            store.put_conversion(raw)

    async def login(settings: kopf.OperatorSettings, **_: object) -> kopf.AiohttpSession | None:
        info = in_pod(settings) or kopf.login_with_kubeconfig(settings=settings)
        return await watched.session(info) if info else None

    kopf.on.login(registry=found)(login)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=found)(on_conversion)
    return found


def in_pod(given: kopf.OperatorSettings) -> kopf.ConnectionInfo | None:
    """The service account of a pod, by the address that the kubelet names: kopf's own way would need DNS."""
    found = kopf.login_with_service_account(settings=given)
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
    if found is None or not host or not port:
        return found
    return replace(found, server=f"https://{f'[{host}]' if ':' in host else host}:{port}")


def settings(*, namespaced: bool) -> kopf.OperatorSettings:
    """kopf as a transport: every default that writes, waits or scans is off."""
    found = kopf.OperatorSettings()
    found.peering.standalone = True
    found.posting.enabled = False
    found.scanning.disabled = namespaced
    found.watching.field_selectors["apiextensions.k8s.io", "customresourcedefinitions"] = (
        f"metadata.name={PLURAL}.{GROUP}"
    )
    found.watching.chunk_size = 100
    found.watching.server_timeout = 300
    found.watching.client_timeout = 330
    found.watching.connect_timeout = 10
    found.watching.inactivity_timeout = SILENCE
    found.watching.reconnect_backoff = 2.0  # it is a list of all that follows
    found.networking.request_timeout = 90  # for a page of 100 objects of a megabyte, too
    found.networking.error_backoffs = (1, 2, 4, 8, 16)
    found.networking.enforce_retry_after = True
    found.queueing.idle_timeout = 0.05  # an object is held as long after it was handled
    found.queueing.worker_limit = None
    found.execution.max_workers = 4
    return found
