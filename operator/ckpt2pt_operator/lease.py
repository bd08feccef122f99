"""Hold a Lease, so that of several operators one works.  The election is that of the ``kubernetes`` client."""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from pathlib import Path

import aiohttp
from kubernetes.aio import client
from kubernetes.aio.leaderelection import electionconfig, leaderelection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from ckpt2pt_operator.api import Api

LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15, 10, 2  # whole: the Lease holds integers
_REQUEST_SECONDS = 3.0
_BROKEN = (aiohttp.ClientError, OSError)  # a TimeoutError is an OSError
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Lock(LeaseLock):
    """The client's own, but for what it does not expect of a network: no answer, a broken one, and one that never comes.

    Each of these is a failure like any other, and tried again until the lease is lost: ``limit`` is when that is.
    """

    def __init__(
        self, name: str, namespace: str, identity: str, inner: client.ApiClient, limit: asyncio.Timeout
    ) -> None:
        super().__init__(name, namespace, identity, inner)
        self._limit = limit

    def _held_from(self, began: float) -> bool:
        """The API server has it from some time after ``began`` on."""
        self._limit.reschedule(began + RENEW_SECONDS)
        return True

    async def get(
        self, name: str, namespace: str
    ) -> tuple[bool, LeaderElectionRecord] | tuple[bool, Exception] | tuple[bool, None]:
        """True and the record of the holder; False and why there is none."""
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                return await super().get(name, namespace)
        except _BROKEN as error:
            return False, client.ApiException(status=0, reason=str(error) or type(error).__name__)

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        """True if it is made; False if another was quicker.  Version 37 passes ``pretty=True`` where only text is taken."""
        body = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                await self.api_instance.create_namespaced_lease(namespace, body)
        except (client.ApiException, *_BROKEN):
            return False
        return self._held_from(began)

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        """True if it is renewed."""
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                return await super().update(name, namespace, updated_record) and self._held_from(began)
        except _BROKEN:
            return False


class LeaseLostError(Exception):
    """Another operator may work now: this one has to end."""


def own_namespace(given: str) -> str:
    """The namespace that was given, or that of this pod."""
    if given:
        return given
    return _OWN_NAMESPACE.read_text(encoding="utf-8").strip() if _OWN_NAMESPACE.is_file() else "default"


async def hold(api: Api, *, name: str, namespace: str, held: asyncio.Event) -> None:
    """Wait for the lease, set ``held``, renew it; raises LeaseLostError when it cannot be renewed in time."""
    identity = f"{os.environ.get('HOSTNAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}"

    async def lead() -> None:
        held.set()

    async def stop() -> None:
        held.clear()

    try:
        async with asyncio.timeout(None) as limit:
            configuration = electionconfig.Config(
                Lock(name, namespace, identity, api.inner, limit),
                lease_duration=LEASE_SECONDS,
                renew_deadline=RENEW_SECONDS,
                retry_period=RETRY_SECONDS,
                onstarted_leading=lead,
                onstopped_leading=stop,
            )
            # Its own deadline begins anew with each try, and so comes after the lease has run out.
            await leaderelection.LeaderElection(configuration).run()
    except TimeoutError:
        pass
    finally:
        held.clear()
    raise LeaseLostError(f"the lease {namespace}/{name} could not be renewed for {RENEW_SECONDS:.0f} s")
