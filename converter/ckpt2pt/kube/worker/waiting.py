"""Before the first byte: wait until the training has finished saving, and say what is missing when it does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from msgspec.structs import replace

from ckpt2pt.discover.request import Request
from ckpt2pt.discover.training import when_of_iteration
from ckpt2pt.errors import (
    Ckpt2ptError,
    FileAccessError,
    FormatError,
    MissingInputError,
    TimedOutError,
    TopologyError,
    UnsupportedFormatError,
    ref,
)
from ckpt2pt.formats.mindformers.ready import Iterations
from ckpt2pt.formats.mindspore.ready import Watcher
from ckpt2pt.kube.conversion.schema import Readiness, Spec
from ckpt2pt.kube.sources import iterations_of
from ckpt2pt.kube.worker.account import Account
from ckpt2pt.run.targets.request import AnyRequest, RepairRequest

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


Blocker = tuple[Ckpt2ptError, str]
"""The error where waiting was in vain, and a sentence while it may not be."""


def _obstacle_of_training(watcher: Watcher | Iterations, timeout: float) -> Blocker | None:
    look = watcher.look()
    return None if look.ready else (look.to_error(timeout), look.sentence)


def _obstacle_of_save(ask: Callable[[], AnyRequest], readiness: Readiness) -> Blocker | None:
    """Megatron-LM writes its tracker when every rank has saved; a copy of a checkpoint may come file by file."""
    from ckpt2pt.discover import discover  # noqa: PLC0415 - only when asked for
    from ckpt2pt.run.targets.repair import find as find_repair  # noqa: PLC0415 - as above
    from ckpt2pt.run.targets.source import located, read_source  # noqa: PLC0415 - as above

    try:
        request = ask()
        if isinstance(request, Request):
            inputs = discover(request).inputs
            times = [int(str(one.get("mtime_ns", 0))) for each in inputs.values() for one in each]
        else:
            if isinstance(request, RepairRequest):
                stats = find_repair(request).stats
            else:  # of all ranks: other workers need those that this one does not read
                stats = located(read_source(request), None).stats
            times = [int(str(one["mtime_ns"])) for one in stats.values()]
    except UnsupportedFormatError:  # no file that is still to come changes what it is
        raise
    except (MissingInputError, FormatError, TopologyError) as error:  # more folders may come
        return error, f"checkpoint is not complete: {error.what} ({error.where})"
    stable_for = time.time() - max(times) / 1e9
    if stable_for >= readiness.settle_seconds:
        return None
    sentence = f"checkpoint was written to {max(stable_for, 0):.0f} s ago"
    hint = f"wait longer with {ref('readiness.timeoutSeconds')}"
    return TimedOutError(f"the {sentence}", where=request.source, hint=hint, field="readiness.timeoutSeconds"), sentence


def request_when_complete(spec: Spec, account: Account, *, in_process: bool = False) -> AnyRequest:
    """The request of a spec, when its source is complete, for which its ``readiness`` says how long to wait.

    A Megatron source tells its layout itself, so that there is no request before it is there.
    """
    from ckpt2pt.kube.resolve import is_megatron, resolve, resolve_any  # noqa: PLC0415 - only when asked for
    from ckpt2pt.kube.tensors import BY_TENSORS  # noqa: PLC0415 - as above

    readiness, ask_any = spec.readiness, partial(resolve_any, spec, in_process=in_process)
    if spec.target.format in BY_TENSORS:
        iterations = iterations_of(spec) if readiness.timeout_seconds else None
        if iterations:
            wait_for(iterations, readiness, account)
            # What is newest is complete, whether or not the tracker names it yet, and stays what is asked for.
            number = (iterations.look().wanted or (0, None))[1]
            return resolve_any(replace(spec, source=replace(spec.source, iteration=number)), in_process=in_process)
        if readiness.timeout_seconds:
            _wait(partial(_obstacle_of_save, ask_any, readiness), readiness.timeout_seconds, account)
        return ask_any()
    ask = partial(resolve, spec, in_process=in_process)
    if readiness.timeout_seconds and is_megatron(spec):
        _wait(partial(_obstacle_of_save, ask_any, readiness), readiness.timeout_seconds, account)
        return ask()
    request = ask()
    wait_until_whole(request, readiness, account)
    if not request.files:
        return request
    return resolve(replace(spec, readiness=Readiness(timeout_seconds=0)), in_process=in_process)  # of what is there now


def wait_until_whole(request: Request, readiness: Readiness, account: Account) -> None:
    """Look until nothing is in the way, at most as long as ``readiness`` allows; not at all, where that is 0.

    Raises what :meth:`ckpt2pt.formats.mindspore.ready.Observation.to_error` says, and for a Megatron checkpoint what reading it raises.
    """
    timeout, settle = readiness.timeout_seconds, readiness.settle_seconds
    if timeout and request.from_megatron:
        _wait(partial(_obstacle_of_save, lambda: request, readiness), timeout, account)
    else:
        wait_for(watcher_of(request, settle), readiness, account)


def wait_for(watcher: Watcher | Iterations, readiness: Readiness, account: Account) -> None:
    """The same with what looks at a training output."""
    timeout = readiness.timeout_seconds
    if timeout:
        _wait(partial(_obstacle_of_training, watcher, timeout), timeout, account)


def _wait(blocker: Callable[[], Blocker | None], timeout: float, account: Account) -> None:
    began, pause, reported = time.monotonic(), FIRST_PAUSE_SECONDS, ""
    try:
        while True:
            try:
                found = blocker()
                if found is None:
                    return
                to_error, sentence = found
            except FileAccessError as error:  # it may pass, as when a mount comes back
                to_error, sentence = error, f"checkpoint cannot be read: {error.what} ({error.where})"
            account.wait(sentence)
            left = began + timeout - time.monotonic()
            if left <= 0:
                raise to_error
            if sentence != reported:
                reported = sentence
                log.info("waiting for at most %.0f s: the %s", left, reported)
            time.sleep(min(pause, left))
            pause = min(pause * _GROWTH, MAX_PAUSE_SECONDS)
    finally:
        account.wait()
