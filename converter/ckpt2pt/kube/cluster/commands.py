"""``ckpt2pt submit`` and ``kubectl ckpt2pt``: from options to requests, and what is said of them."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

from ckpt2pt.errors import UsageError
from ckpt2pt.formats.mindformers.ready import Iterations
from ckpt2pt.formats.mindspore.filenames import UNNAMED, CheckpointId
from ckpt2pt.formats.mindspore.ready import Watcher
from ckpt2pt.kube.cluster.api import Api, Json
from ckpt2pt.kube.cluster.control import cancel, log_of_stage, retry
from ckpt2pt.kube.cluster.kubeconfig import connect
from ckpt2pt.kube.cluster.submit import Submitted, code_of, follow, sentence, submit
from ckpt2pt.kube.conversion.spec import parse
from ckpt2pt.kube.conversion.template import named, set_fields

log = logging.getLogger("ckpt2pt")

POLL_SECONDS = 1.0

Say = Callable[[str], None]


def submit_command(options: argparse.Namespace, say: Say) -> int:
    """Fill the template, wait for the ranks, create the object, follow it: as far as was asked for."""
    template = set_fields(load(options.filename), options.set)
    moment = _moment(options, template) if options.ready_in else None
    document = named(template, _fields(options, template, moment), options.name)
    if options.namespace:
        cast("Json", document["metadata"])["namespace"] = options.namespace
    parse(document)
    if options.print:
        from ckpt2pt.kube.conversion.document import validate  # noqa: PLC0415 - what is sent the API server checks itself

        validate(document, where=str(options.filename))
        say(json.dumps(document, indent=1))
        return 0
    api = _api(options)
    there = submit(api, document)
    if options.output == "name":
        say(there.name)
    elif options.output == "json" and not options.wait:
        say(json.dumps(there.document()))
    else:
        log.info(
            "CheckpointConversion %s/%s %s", there.namespace, there.name, "is made" if there.created else "was there"
        )
    return _follow(api, there, options, say) if options.wait else 0


def watch_command(options: argparse.Namespace, say: Say) -> int:
    """Follow one that is there."""
    api = _api(options)
    return _follow(api, _there(api, options), options, say)


def retry_command(options: argparse.Namespace, say: Say) -> int:
    """Have its failed stages tried again."""
    api = _api(options)
    retry(api, _there(api, options))
    say(f"the failed stages of {options.name} are tried again")
    return 0


def cancel_command(options: argparse.Namespace, say: Say) -> int:
    """Stop it."""
    api = _api(options)
    cancel(api, _there(api, options))
    say(f"{options.name} is cancelled; what is finished stays")
    return 0


def logs_command(options: argparse.Namespace, say: Say) -> int:
    """Print what the newest worker of a stage has written."""
    api = _api(options)
    say(log_of_stage(api, _there(api, options), options.stage).rstrip("\n"))
    return 0


def load(path: Path) -> Json:
    """A template from a file.  JSON is read without YAML, which a training may not have."""
    if path.suffix == ".json":
        try:
            found: object = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot be read: {error}", where=path, hint="give a JSON document with -f") from error
        if not isinstance(found, dict):
            raise UsageError("the document is not a mapping of fields", where=path, hint="give a CheckpointConversion")
        return cast("Json", found)
    from ckpt2pt.kube.conversion.document import load_mapping  # noqa: PLC0415 - YAML and a schema, only when needed

    return load_mapping(path)


def _api(options: argparse.Namespace) -> Api:
    return Api(connect(options.kubeconfig, options.context), seconds=options.request_timeout)


def _there(api: Api, options: argparse.Namespace) -> Submitted:
    return Submitted(namespace=options.namespace or api.connection.namespace, name=options.name, created=False)


def _fields(options: argparse.Namespace, template: Json, moment: CheckpointId | None) -> dict[str, str | int]:
    metadata = cast("Json", template.get("metadata") or {})
    epoch, step = moment or (options.epoch, options.step)
    iteration = options.iteration
    if epoch is not None and epoch < 0:  # of MindFormers
        epoch, iteration = 0, step if iteration is None else iteration
    known: dict[str, str | int | None] = {
        "name": options.training,
        "uid": options.uid,
        "epoch": epoch,
        "step": step,
        "iteration": iteration,
        "namespace": options.namespace or cast("str | None", metadata.get("namespace")),
    }
    return {name: value for name, value in known.items() if value is not None}


def _moment(options: argparse.Namespace, template: Json) -> CheckpointId:
    """(epoch, step) of the checkpoint, once every rank has saved it; of MindFormers (-1, iteration)."""
    given = None if options.step is None else (options.epoch or 0, options.step)
    blank: dict[str, str | int] = {"namespace": "x", "name": "x", "uid": "x", "epoch": 0, "step": 1, "iteration": 1}
    conversion = parse(named(template, blank, "x"))
    watcher: Watcher | Iterations = Watcher(options.ready_in, conversion.topology)
    if conversion.spec.source.format == "MindFormers":
        settle = conversion.spec.readiness.settle_seconds
        watcher = Iterations(options.ready_in, settle_seconds=settle)
        given = given and (-1, given[1])
    began = time.monotonic()
    while not (look := watcher.look(given)).ready:
        if time.monotonic() - began > options.readiness_timeout:
            raise look.to_error(options.readiness_timeout)
        time.sleep(POLL_SECONDS)
    if look.wanted is None or look.wanted == UNNAMED:
        hint = "give --name instead of --ready-in"
        raise UsageError("the files tell no epoch and step by their names", where=options.ready_in, hint=hint)
    return look.wanted


def _follow(api: Api, there: Submitted, options: argparse.Namespace, say: Say) -> int:
    as_json = options.output == "json"

    def tell(status: Json) -> None:
        log.info("%s: %s", there.name, sentence(status))

    seen = follow(api, there, tell, seconds=options.wait_timeout)
    status = cast("Json", seen.get("status") or {})
    if as_json:
        shown = {"metadata": {"namespace": there.namespace, "name": there.name}, "status": status}
        say(json.dumps(shown, indent=1))
    elif options.output != "name":
        say(f"{there.name}: {sentence(status)}")
    return code_of(status)
