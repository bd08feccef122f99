"""Digests without OpenSSL."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest

from ckpt2pt.io import digests


@pytest.mark.parametrize("data", [b"", b"abc", bytes(1 << 17)], ids=["nothing", "a few bytes", "many"])
def test_they_are_those_of_hashlib(data: bytes) -> None:
    assert digests.sha256(data).hexdigest() == hashlib.sha256(data).hexdigest()
    assert digests.blake2b(data, digest_size=8).digest() == hashlib.blake2b(data, digest_size=8).digest()


def test_a_module_that_is_not_there_is_passed_over() -> None:
    assert digests.constructor(("_no_such_module", "hashlib"), "sha256") is hashlib.sha256


def test_a_worker_does_not_load_openssl() -> None:
    modules = (
        "ckpt2pt.cli.commands, ckpt2pt.run.conversion, ckpt2pt.run.targets.torch_dist, ckpt2pt.run.targets.mcore, numpy"
    )
    script = f"import sys, {modules}; print(sorted({{'_hashlib', '_ssl'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
