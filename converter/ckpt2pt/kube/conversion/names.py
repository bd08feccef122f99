"""Names of Kubernetes objects: which texts are one, and how one becomes part of a request's URL.  Pure.

A name that a user writes is asked for with the rights of whoever asks, so it must not be able to become another path.
"""

from __future__ import annotations

import re
from urllib.parse import quote

from ckpt2pt.errors import UsageError

MAX_NAME = 253
_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
NAME = rf"^{_LABEL}(\.{_LABEL})*$"
"""A DNS subdomain (RFC 1123), as the names of nearly all objects are; the CRD has the same pattern."""
GROUP_VERSION = rf"^({_LABEL}(\.{_LABEL})*/)?v[0-9][a-z0-9]*$"
"""``v1``, or ``batch/v1``."""
KIND_WORD = "^[A-Za-z][A-Za-z0-9]*$"
DRIVER = NAME.replace("a-z", "a-zA-Z")
"""Of CSI; the one name in which capitals count as small letters."""
HOST = r"^[A-Za-z0-9\[:]([-A-Za-z0-9.:%_\]]*)$"
"""A host name, or an address of IPv4 or IPv6: nothing that a mount command could take for an option."""
FILE_STEM = "^[A-Za-z0-9_][-A-Za-z0-9_.]*$"

HINTS = {
    NAME:          "write the name of an object: lower-case letters, digits, dashes and dots",
    GROUP_VERSION: "write group and version, as batch/v1",
    KIND_WORD:     "write a kind, as Job",
    DRIVER:        "write the name of the CSI driver, as nfs.csi.k8s.io",
    HOST:          "write a host name or an address",
    FILE_STEM:     "write a plain file name: letters, digits, dashes, dots and underscores",
}  # fmt: skip
"""What to write instead of a text that a pattern does not fit."""


def is_name(text: str) -> bool:
    """Whether it can be the name of an object."""
    return fits(NAME, text)


def fits(pattern: str, text: str) -> bool:
    """Whether a pattern of this module fits the whole text: ``$`` alone would let a line break at the end pass."""
    return len(text) <= MAX_NAME and re.fullmatch(pattern, text) is not None


def request_path(base: str, namespace: str, plural: str, name: str | None = None, subresource: str = "") -> str:
    """The path of a collection, of an object or of its subresource: ``/apis/batch/v1/namespaces/team/jobs/demo-1``.

    Every segment is percent-encoded.  UsageError for one that an API server would not take for a single segment even so:
    it decodes the path before it parts it at the slashes, and so ``a%2Fstatus`` is the subresource of ``a``
    (kubernetes v1.36 staging/src/k8s.io/apimachinery/pkg/api/validation/path/name.go, IsValidPathSegmentName).
    """
    parts = base.split("/") + (["namespaces", namespace] if namespace else []) + ([plural] if plural else [])
    parts += ([] if name is None else [name]) + ([subresource] if subresource else [])
    return "/" + "/".join(_segment(part) for part in parts)


def _segment(text: str) -> str:
    if text in {"", ".", ".."} or "/" in text or "%" in text:
        raise UsageError(f"{text[:80]!r} is not the name of an object", where="the request", hint=HINTS[NAME])
    return quote(text, safe="")
