"""``ckpt2pt watch``: from options, or from a document, to a training that is followed, and what is said of it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from msgspec import structs

from ckpt2pt.errors import Ckpt2ptError, InterruptedRunError, MissingInputError, UsageError, ref
from ckpt2pt.formats.mindformers.ready import Iterations
from ckpt2pt.formats.mindspore.filenames import CheckpointId
from ckpt2pt.io.flags import check_numbers
from ckpt2pt.kube.asked import TARGET_FORMATS, spec_of
from ckpt2pt.kube.conversion.schema import Follow, Readiness, Spec
from ckpt2pt.kube.follow.keep import verified_as
from ckpt2pt.kube.follow.watch import Following, Training, training_of, watch
from ckpt2pt.kube.local.runner import spec_of_document
from ckpt2pt.kube.resolve import resolve, resolve_any
from ckpt2pt.kube.sources import may_follow
from ckpt2pt.kube.worker.account import Account, Both
from ckpt2pt.kube.worker.endpoint import served
from ckpt2pt.kube.worker.waiting import wait_for
from ckpt2pt.publish import tracked
from ckpt2pt.run.conversion import Outcome
from ckpt2pt.run.targets.request import AnyRequest
from ckpt2pt.show.progress import reporter

log = logging.getLogger("ckpt2pt")

Show = Callable[[object, str, argparse.Namespace], None]


def watch_command(options: argparse.Namespace, show: Show) -> int:
    """Flags that are given decide, then spec.follow of the document, then the defaults."""
    spec = spec_of_document(options.filename, options.volume) if options.filename else spec_of(options)
    follow, readiness = spec.follow or Follow(), spec.readiness
    settle = readiness.settle_seconds if options.settle is None else options.settle
    account = options.account
    training, request = _training(spec, settle, account, in_process=options.multiprocess_off)
    account.following, account.stages = True, range(request.topology.pipeline) if request else None
    account.iteration = tracked(training.target)  # what a worker before this one has converted
    if request and account.iteration is not None:
        account.verified = verified_as(request, account.iteration)

    def hear(outcome: Outcome, removed: list[int]) -> None:
        account.converted(outcome)
        for remark in outcome.remarks:
            log.warning("%s", remark)
        text = outcome.sentence() + (f"\nremoved the results of iterations {removed}" if removed else "")
        show({**outcome.document(), "removed": removed}, text, options)

    how = Following(
        keep=follow.keep if options.keep is None else options.keep,
        interval=follow.interval_seconds if options.interval is None else options.interval,
        settle=settle,
        once=options.once,
        stop_on_error=options.stop_on_error,
        allow_incomplete=options.allow_incomplete,
    )
    check_numbers({"--interval": how.interval})
    patience = readiness.timeout_seconds if options.spec else options.readiness_timeout
    wait = Readiness(
        timeout_seconds=patience if how.once and not how.allow_incomplete else 0, settle_seconds=how.settle
    )
    with served(account, options.progress_port) if options.progress_port else nullcontext(0):
        late = _late(training, wait, account)
        code = watch(
            training,
            how,
            reporter=lambda: Both(account, reporter(options.progress)),
            hear=hear,
            on_failure=account.on_failure,
            wait=account.wait,
        )
    if late is not None and not code:
        raise late
    return code


def _training(spec: Spec, settle: float, account: Account, *, in_process: bool) -> tuple[Training, AnyRequest | None]:
    """What is followed, and what is asked for of any checkpoint of it, as far as that is known before there is one."""
    target = Path(spec.target.path)
    if spec.target.format == "Megatron06":
        request = resolve(spec, in_process=in_process)
        if request.from_megatron:
            raise UsageError(
                "the source is a Megatron checkpoint, and trainings of MindSpore alone are followed",
                where=request.source,
                hint="convert it once: ckpt2pt convert",
            )
        return training_of(request, settle), request
    if not may_follow(spec):
        given = next(word for word, target in TARGET_FORMATS.items() if target == spec.target.format)
        raise UsageError(
            f"{ref('target.format')} is {given}, and a training is followed on its way to Megatron",
            where=ref("spec"),
            hint="follow a training of MindFormers to torch_dist or megatron, of MindSpeed-Core-MS to megatron06; or convert one "
            "iteration with ckpt2pt convert, or with ckpt2pt run",
            field="target.format",
        )

    def ask(when: CheckpointId) -> AnyRequest:
        one = structs.replace(spec, source=structs.replace(spec.source, iteration=when[1]))
        found = resolve_any(one, in_process=in_process)
        account.stages = range(found.topology.pipeline)
        return found

    watcher = Iterations(Path(spec.source.path), weights_alone=spec.mode == "ParamsOnly", settle_seconds=settle)
    known: AnyRequest | None = None
    with suppress(MissingInputError):
        known = resolve_any(spec, in_process=in_process)
    return Training(watcher, target, ask), known


def _late(training: Training, readiness: Readiness, account: Account) -> Ckpt2ptError | None:
    """Why the newest checkpoint has not become whole in time; what is whole is converted nevertheless."""
    try:
        wait_for(training.watcher, readiness, account)
    except InterruptedRunError:
        raise
    except Ckpt2ptError as error:
        return error
    return None
