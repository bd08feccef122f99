"""SHA-256 and BLAKE2 by CPython's own code: ``hashlib`` would load OpenSSL into each worker, 4 MiB for a few small digests."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__all__ = ["blake2b", "sha256"]


def constructor(modules: tuple[str, ...], name: str) -> object:
    """A constructor of ``hashlib``, from the first module that this CPython has (``--with-builtin-hashlib-hashes``)."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            continue
    raise AssertionError(name)


if TYPE_CHECKING:
    from hashlib import blake2b, sha256
else:
    sha256 = constructor(("_sha2", "_sha256", "hashlib"), "sha256")  # 3.12 has both SHA-2 modules in one
    blake2b = constructor(("_blake2", "hashlib"), "blake2b")
