"""Results made by hand in a target folder, and a process that dies at any step of its work there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from ckpt2pt.publish import MEGATRON, TRACKER, Target


def path_of(target: Target, pp: int) -> Path:
    """The one file of a stage's one rank."""
    place = f"mp_rank_00_{pp:03d}/model_optim_rng.pt" if target.kind is MEGATRON else f"rank_{pp}/network.ckpt"
    return target.folder / place


def finish_rank(target: Target, pp: int, content: bytes = b"12345") -> None:
    """Write and publish the rank of a stage, as the engine does it."""
    path = path_of(target, pp)
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "path": str(path.relative_to(target.folder)),
        "nbytes": len(content),
        "crc32": f"{crc32(content):08x}",
    }
    target.ledger((0, pp)).announce([entry])
    path.write_bytes(content)
    target.publish_rank(0, pp, {"tp": 0, "pp": pp, "files": [entry], "tensors": {"a": "00000001"}})


def finish_stages(target: Target, *stages: int, content: bytes = b"12345") -> None:
    """Convert stages that were claimed."""
    for pp in stages:
        finish_rank(target, pp, content)
        target.publish_stage(pp, {"host": "h"})


def finish(target: Target, *stages: int, content: bytes = b"12345") -> None:
    """Claim the folder and convert stages."""
    target.claim({}, overwrite=False)
    finish_stages(target, *stages, content=content)


def replacing(target: Target) -> Target:
    """The same, at work beside what it is to replace."""
    target.recover()
    beside = target.check(overwrite=True)
    assert beside.beside
    beside.claim({}, overwrite=True)
    return beside


def convert(target: Target, content: bytes) -> None:
    """What a whole run with ``--overwrite`` does, whatever an earlier one has left."""
    target.recover()
    place = target.check(overwrite=True)
    place.claim({}, overwrite=True)
    for pp in range(place.stages):
        with place.stage_lock(pp):
            place.sweep([pp])
            if place.stage_manifest(pp) is None:
                finish_stages(place, pp, content=content)
    assert place.publish_iteration()


def contents(target: Target) -> set[bytes | None]:
    """What stands under the final names; None for a name that is not there."""
    paths = [path_of(target.at_home, pp) for pp in range(target.stages)]
    return {path.read_bytes() if path.exists() else None for path in paths}


def left_over(target: Target) -> list[str]:
    """Hidden or temporary things beside and below the result."""
    found = (path.relative_to(target.root) for path in target.root.rglob("*"))
    return sorted(
        str(path)
        for path in found
        if path.name.startswith((".iter", f".{TRACKER}")) or path.suffix in {".partial", ".new", ".old", ".removed"}
    )


class Killed(BaseException):
    """A process that is gone: nothing that would clean up runs any more."""


@contextmanager
def dying(at: int, *, exchange: bool = True) -> Iterator[Callable[[], int]]:
    """Changes of names work until number ``at``, which is done no more, and nothing after it; gives the number of calls.

    Without ``exchange`` the system cannot exchange two names.
    """
    calls = count()
    done = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            done[0] = next(calls)
            if done[0] >= at:
                raise Killed
            return real(*args, **more)

        return call

    from ckpt2pt.publish import swap

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(swap, "_exchanged", counted(swap._exchanged) if exchange else lambda *_: False)
        yield lambda: done[0]
