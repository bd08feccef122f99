"""Prove at the start that the operator may do what it will have to do, and say what is missing by name.

An API server that refuses is tried again for ever by every client, kopf included, and that looks like a hang.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from ckpt2pt.kube.conversion.report import child
from ckpt2pt_operator.api import Api, patiently
from ckpt2pt_operator.handlers import GROUP, PLURAL
from ckpt2pt_operator.rules.trainings import Kind

#   group    resource    subresource    verbs
NEEDED: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (GROUP,   PLURAL,   "",       ("get", "list", "watch")),
    (GROUP,   PLURAL,   "status", ("update",)),
    ("batch", "jobs",   "",       ("get", "list", "watch", "create", "patch", "delete")),
    ("",      "pods",   "",       ("list", "watch")),
    ("",      "events", "",       ("create", "patch", "list")),
)  # fmt: skip
CLAIMS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (("", "persistentvolumeclaims", "", ("get",)),)


TRIGGER: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("",    "configmaps", "", ("get",)),
    (GROUP, PLURAL,       "", ("create",)),
)  # fmt: skip
DELETES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = ((GROUP, PLURAL, "", ("delete",)),)
LEASE = "coordination.k8s.io", "leases"


async def missing(
    api: Api,
    namespaces: Sequence[str],
    *,
    check_volumes: bool,
    kinds: Sequence[Kind] = (),
    trigger: bool = False,
    deletes: bool = False,
) -> list[str]:
    """What is not allowed, as ``patch jobs.batch in namespace training``; empty where all is well."""
    watched = [(kind.api_version.rpartition("/")[0], kind.plural, "", ("list", "watch")) for kind in kinds]
    wanted = [
        Right(verb, group, resource, sub, namespace)
        for group, resource, sub, verbs in (
            *NEEDED, *(CLAIMS if check_volumes else ()), *watched, *(TRIGGER if trigger else ()), *(DELETES if deletes else ()),
        )
        for verb in verbs
        for namespace in (namespaces or ("",))
    ]  # fmt: skip
    return await _missing(api, list(dict.fromkeys(wanted)))


async def missing_of_lease(api: Api, namespace: str, name: str) -> list[str]:
    """What is not allowed of what it takes to hold a Lease: without it the operator would wait for ever."""
    rights = [Right("create", *LEASE, "", namespace)]
    rights += [Right(verb, *LEASE, "", namespace, name) for verb in ("get", "update")]
    return await _missing(api, rights)


class Right(NamedTuple):
    """One question: an empty namespace is all of them, an empty name every one."""

    verb: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str = ""

    def __str__(self) -> str:
        kind = f"{self.resource}.{self.group}" if self.group else self.resource
        where = f"in namespace {self.namespace}" if self.namespace else "in all namespaces"
        which = f"{f'/{self.subresource}' if self.subresource else ''}{f' {self.name}' if self.name else ''}"
        return f"{self.verb} {kind}{which} {where}"


async def _missing(api: Api, wanted: Sequence[Right]) -> list[str]:
    allowed = await asyncio.gather(*(_allowed(api, right) for right in wanted))
    return [str(right) for right, yes in zip(wanted, allowed, strict=True) if not yes]


async def _allowed(api: Api, right: Right) -> bool:
    given = {name: value for name, value in right._asdict().items() if value}
    review = await patiently(lambda: api.review_access(given))
    return child(review, "status").get("allowed") is True
