"""Before the first byte: wait until the training has finished saving, and say what is missing when it does not."""

from __future__ import annotations

import logging
import time
from functools import partial

from ckpt2pt.ckpt.ready import Watcher
from ckpt2pt.conversion.schema import Readiness
from ckpt2pt.errors import FileAccessError
from ckpt2pt.request import Request
from ckpt2pt.survey import when_of_iteration
from ckpt2pt.worker.account import Account

log = logging.getLogger("ckpt2pt")

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 15.0
_GROWTH = 1.5


def watcher_of(request: Request, settle: float) -> Watcher:
    """A watcher for what a request is going to read."""
    return Watcher(
        request.source,
        request.source_layout,
        wanted_format=request.source_format,
        settle_seconds=settle,
        choose=None if request.iteration is None else partial(when_of_iteration, request),
    )


def wait_until_whole(request: Request, readiness: Readiness, account: Account) -> None:
    """Look until nothing is in the way, at most as long as ``readiness`` allows; not at all, where that is 0.

    Raises what :meth:`ckpt2pt.ckpt.ready.Look.refusal` says.
    """
    timeout, settle = readiness.timeout_seconds, readiness.settle_seconds
    if not timeout:
        return
    watcher, began, pause, told = watcher_of(request, settle), time.monotonic(), FIRST_PAUSE_SECONDS, ""
    try:
        while True:
            try:
                look = watcher.look()
                if look.ready:
                    return
                refusal, sentence = look.refusal(timeout), look.sentence
            except FileAccessError as error:  # it may pass, as when a mount comes back
                refusal, sentence = error, f"checkpoint cannot be read: {error.what} ({error.where})"
            account.wait(sentence)
            left = began + timeout - time.monotonic()
            if left <= 0:
                raise refusal
            if sentence != told:
                told = sentence
                log.info("waiting for at most %.0f s: the %s", left, told)
            time.sleep(min(pause, left))
            pause = min(pause * _GROWTH, MAX_PAUSE_SECONDS)
    finally:
        account.wait()
