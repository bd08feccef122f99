"""Follow a running training: convert each checkpoint that has become whole and is newer than the tracker's.

    rank_R/*, iteration_*/*  --ready--> whole?  --run--> iter_0000500  --keep--> the last N results

The tracker is all that is remembered: a restarted watch goes on where it stood, and never back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt2pt.core.progress import Reporter
from ckpt2pt.discover import discover
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import RETRIED, Ckpt2ptError, InterruptedRunError, MissingInputError, SetupError
from ckpt2pt.formats.mindformers.ready import Iterations
from ckpt2pt.formats.mindspore.filenames import UNNAMED, CheckpointId, shown
from ckpt2pt.formats.mindspore.ready import Observation, Watcher
from ckpt2pt.kube.follow.keep import prune
from ckpt2pt.publish import tracked
from ckpt2pt.run.conversion import Outcome, run
from ckpt2pt.run.targets.request import AnyRequest

log = logging.getLogger("ckpt2pt")


@dataclass(frozen=True, slots=True)
class Training:
    """What is followed, where its results go, and what is asked for of one checkpoint of it."""

    watcher: Watcher | Iterations
    target: Path
    ask: Callable[[CheckpointId], AnyRequest]


def training_of(request: Request, settle: float) -> Training:
    """A training of MindSpore, of whose checkpoints ``request`` asks the same; ``settle`` is :attr:`Following.settle`."""
    watcher = Watcher(request.source, request.source_layout, wanted_format=request.source_format, settle_seconds=settle)
    return Training(watcher, request.target, lambda when: replace(request, when=when, iteration=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """How a training is followed; times in seconds.  ``keep`` 0 keeps every result.

    ``allow_incomplete`` is for a training that was killed: that its last save is incomplete is reported, and no error.
    """

    keep: int = 0
    interval: float = 30.0
    settle: float = 10.0
    once: bool = False
    stop_on_error: bool = False
    allow_incomplete: bool = False


@dataclass(slots=True)
class _Memory:
    """What this process knows of checkpoints: those that are done with, and what was said of the others."""

    on_failure: Callable[[Ckpt2ptError], None]
    wait: Callable[[str], None]
    idle: str = ""
    converted: int = 0
    done: set[CheckpointId] = field(default_factory=set[CheckpointId])
    reported: dict[CheckpointId, str] = field(default_factory=dict[CheckpointId, str])
    errors: list[Ckpt2ptError] = field(default_factory=list[Ckpt2ptError])


def watch(
    training: Training,
    how: Following,
    *,
    reporter: Callable[[], Reporter],
    hear: Callable[[Outcome, list[int]], None],
    on_failure: Callable[[Ckpt2ptError], None] = lambda _: None,
    wait: Callable[[str], None] = lambda _: None,
) -> int:
    """Until a signal comes, or for one round; ``hear`` is called with each result and the iterations removed after it,
    ``on_failure`` why a checkpoint is not converted, ``wait`` that there is none yet.

    A source folder that is not there may appear later, and is waited for; one round ends with :class:`MissingInputError`.

    Returns 0, or the exit code of the last error of a single round.  Raises what ends it.
    """
    watcher, memory = training.watcher, _Memory(on_failure, wait)
    while True:
        memory.errors.clear()
        if how.once and not watcher.is_there():
            raise watcher.look().to_error()
        whole, lacking, writing = _look(watcher, how, memory)
        if whole:
            memory.wait("")
        for when in whole[-how.keep :]:  # all of them when keep is 0
            _convert(training, when, how, memory, reporter=reporter, hear=hear)
        _tell(lacking, max(whole, default=None), how, memory)
        if not (memory.converted or memory.errors or lacking):
            _tell_idle(watcher, bool(whole), writing, how, memory)
        if how.once:
            return memory.errors[-1].exit_code if memory.errors else 0
        time.sleep(how.interval)


def _look(
    watcher: Watcher | Iterations, how: Following, memory: _Memory
) -> tuple[list[CheckpointId], dict[CheckpointId, Observation], list[Observation]]:
    """Whole checkpoints to convert, what the others lack, and those that are being written, each oldest first.

    A file that changed just now may be followed by those of other ranks.
    """
    whole, lacking, unsettled = list[CheckpointId](), dict[CheckpointId, Observation](), list[Observation]()
    try:
        steps, begun = watcher.steps(), watcher.begun()
        for when in sorted({*steps, *begun} - memory.done):
            seen = watcher.look(when)
            writing = any(blocker.kind == "unfinished" for blocker in seen.blockers)
            if seen.ready:
                whole.append(when)
            elif seen.stable_for >= how.settle or not (writing or when in begun):
                lacking[when] = seen
            else:
                unsettled.append(seen)
    except InterruptedRunError:
        raise
    except Ckpt2ptError as error:
        _note(error, (-1, -1), how, memory)
        return [], {}, []
    return whole, lacking, unsettled


def _tell_idle(
    watcher: Watcher | Iterations, whole: bool, writing: list[Observation], how: Following, memory: _Memory
) -> None:
    """Say why nothing was converted: of one round always, of a watch while there is no checkpoint at all."""
    idle = ""
    if not (whole or writing or memory.done):
        idle = watcher.look().sentence
    elif how.once:
        idle = writing[-1].sentence if writing else "every checkpoint that is there was converted before"
    memory.wait(idle)
    if idle and idle != memory.idle:
        log.info("nothing is converted: %s" if how.once else "waiting: %s", idle)
    memory.idle = idle


def _tell(
    lacking: dict[CheckpointId, Observation], whole: CheckpointId | None, how: Following, memory: _Memory
) -> None:
    """Say what keeps checkpoints from being converted; it is an error of the newest alone."""
    newest = max([*lacking, *memory.done, *([whole] if whole else [])], default=None)
    for when, seen in lacking.items():
        error = seen.to_error()
        if when == newest and not how.allow_incomplete:
            # What is only incomplete may still be completed, and ends no watch that goes on.
            _note(error, when, how if how.once or seen.broken else replace(how, stop_on_error=False), memory, "%s")
        else:
            _say("%s", error, when, memory)


def _convert(
    training: Training,
    when: CheckpointId,
    how: Following,
    memory: _Memory,
    *,
    reporter: Callable[[], Reporter],
    hear: Callable[[Outcome, list[int]], None],
) -> None:
    try:
        request = training.ask(when)
        if not _is_newer(request):
            memory.done.add(when)
            return
        outcome = run(request, range(request.topology.pipeline), reporter())
        memory.done.add(when)
        memory.converted += 1
        hear(outcome, prune(request, how.keep))
        if outcome.asked_to_stop:
            raise outcome.asked_to_stop
    except InterruptedRunError:
        raise
    except Ckpt2ptError as error:
        # What a later look may find corrected is tried again, until a newer checkpoint is converted.
        if error.exit_code not in RETRIED and not isinstance(error, MissingInputError | SetupError):
            memory.done.add(when)
        _note(error, when, how, memory)


def _is_newer(request: AnyRequest) -> bool:
    named = tracked(request.target)
    if named is None:
        return True
    found = discover(request).training_step if isinstance(request, Request) else request.read()
    iteration = found.iteration if found.iteration is not None else request.iteration or 0
    if iteration < named:
        log.info("iteration %d is passed over: the tracker names %d", iteration, named)
    return iteration > named


def _note(error: Ckpt2ptError, when: CheckpointId, how: Following, memory: _Memory, form: str = "") -> None:
    memory.errors.append(error)
    memory.on_failure(error)
    if how.stop_on_error:
        raise error
    which = "nothing" if when == UNNAMED else f"checkpoint {shown(when)}"
    _say(form or f"{which} is {'' if when == UNNAMED else 'not '}converted: %s", error, when, memory)


def _say(form: str, error: Ckpt2ptError, when: CheckpointId, memory: _Memory) -> None:
    """Once, until it changes."""
    if memory.reported.get(when) != str(error):
        memory.reported[when] = str(error)
        log.error(form, error)
