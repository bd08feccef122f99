"""Prove at the start that the operator may do what it will have to do, and say what is missing by name.

An API server that refuses is tried again for ever by every client, kopf included, and that looks like a hang.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ckpt2pt.conversion.spec import Json
from ckpt2pt_operator.api import Api, patiently
from ckpt2pt_operator.handlers import GROUP, PLURAL
from ckpt2pt_operator.rules.views import child

#   group    resource    subresource    verbs
NEEDED: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (GROUP,   PLURAL,   "",       ("get", "list", "watch")),
    (GROUP,   PLURAL,   "status", ("update",)),
    ("batch", "jobs",   "",       ("get", "list", "watch", "create", "patch", "delete")),
    ("",      "pods",   "",       ("list", "watch")),
    ("",      "events", "",       ("create", "patch", "list")),
)  # fmt: skip
CLAIMS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (("", "persistentvolumeclaims", "", ("get",)),)


async def missing(api: Api, namespaces: Sequence[str], *, check_volumes: bool) -> list[str]:
    """What is not allowed, as ``patch jobs.batch in namespace training``; empty where all is well."""
    wanted = [
        (verb, group, resource, sub, namespace)
        for group, resource, sub, verbs in (*NEEDED, *(CLAIMS if check_volumes else ()))
        for verb in verbs
        for namespace in (namespaces or ("",))
    ]
    allowed = await asyncio.gather(*(_allowed(api, *one) for one in wanted))
    return [_words(*one) for one, yes in zip(wanted, allowed, strict=True) if not yes]


async def _allowed(api: Api, verb: str, group: str, resource: str, sub: str, namespace: str) -> bool:
    attributes: Json = {"verb": verb, "group": group, "resource": resource, "subresource": sub, "namespace": namespace}
    given = {name: value for name, value in attributes.items() if value}
    review = await patiently(lambda: api.review_access(given))
    return child(review, "status").get("allowed") is True


def _words(verb: str, group: str, resource: str, sub: str, namespace: str) -> str:
    kind = f"{resource}.{group}" if group else resource
    where = f"in namespace {namespace}" if namespace else "in all namespaces"
    return f"{verb} {kind}{f'/{sub}' if sub else ''} {where}"
