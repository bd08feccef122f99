"""The edge: options in, exit codes out.  Nothing heavy is imported before a command asks for it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, cast

from ckpt2pt.cli.options import MINDFORMERS
from ckpt2pt.cli.parsers import PROGRAMS, Command, parser_of_all, parser_of_one
from ckpt2pt.errors import (
    Ckpt2ptError,
    FileAccessError,
    InterruptedRunError,
    UsageError,
    aside,
    printable,
    rendered,
)
from ckpt2pt.io.files import raise_file_limit
from ckpt2pt.io.lines import LineFormatter, Spelling
from ckpt2pt.kube.conversion.spelling import of_call, spelled_document
from ckpt2pt.kube.worker import termination
from ckpt2pt.kube.worker.account import Account, Both

if TYPE_CHECKING:
    from ckpt2pt.core.progress import Reporter
    from ckpt2pt.io.text import Document
    from ckpt2pt.kube.conversion.schema import Spec
    from ckpt2pt.run.targets.request import AnyRequest
    from ckpt2pt.verification.compare import Comparison
    from ckpt2pt.verification.report import Report

log = logging.getLogger("ckpt2pt")


def build_parser() -> argparse.ArgumentParser:
    """Every command and option."""
    return parser_of_all(_commands())


def build_alone(command: str, program: str) -> argparse.ArgumentParser:
    """One command as a program of its own, with all its options."""
    return parser_of_one(_commands(), command, program)


def on_the_cluster(name: str) -> Command:
    """A command that speaks to an API server."""

    def command(options: argparse.Namespace) -> int:
        from ckpt2pt.kube.cluster import commands  # noqa: PLC0415

        found = {
            "submit": commands.submit_command,
            "watch": commands.watch_command,
            "retry": commands.retry_command,
            "cancel": commands.cancel_command,
            "logs": commands.logs_command,
        }
        return found[name](options, _say)

    return command


def main(argv: Sequence[str] | None = None, build: Callable[[], argparse.ArgumentParser] | None = None) -> int:
    """Run one command; a bug keeps its traceback and exits 70.  A worker's end is reported in its termination message."""
    account = Account()
    signal.signal(signal.SIGTERM, partial(_interrupt, account))
    raise_file_limit()
    words = list(sys.argv[1:] if argv is None else argv)
    code = _attempt(words, account, build or build_parser)
    signal.signal(signal.SIGTERM, _too_late)
    path = termination.path_of(words, os.environ)
    if path:
        from ckpt2pt.kube.conversion.report import CONVERTED, PLANNED, UID_VARIABLE  # noqa: PLC0415 - a worker's alone
        from ckpt2pt.kube.conversion.status import REASONS  # noqa: PLC0415 - a worker's alone

        account.conversion = os.environ.get(UID_VARIABLE)
        reason = account.failure or REASONS.get(code) or (PLANNED if words[:1] == ["plan"] else CONVERTED)
        termination.write(path, termination.render(code, reason, account.message, account.facts()))
    return code


def _attempt(words: Sequence[str], account: Account, build: Callable[[], argparse.ArgumentParser]) -> int:
    # Wrong usage is found before the flags are known, and a machine that reads JSON needs that error as well.
    as_json = re.search(r"--log-format[ =]json\b", " ".join(words))
    options = argparse.Namespace(log_format="json" if as_json else "text", account=account)
    try:
        parser = build()
        if "_ARGCOMPLETE" in os.environ:
            import argcomplete  # noqa: PLC0415 - only when a shell asks

            argcomplete.autocomplete(parser)
        options = parser.parse_args(words, argparse.Namespace(account=account))
        _set_up_logging(options)
        command: Command = options.run
        return command(options)
    except Ckpt2ptError as error:
        return _fail(error, options)
    except KeyboardInterrupt:
        return _fail(
            InterruptedRunError("stopped by SIGINT", where="this run", hint="run the same command again"), options
        )
    except BrokenPipeError:
        account.message = "stdout was closed"
        _close_stdout()
        return 74
    except MemoryError:
        return _fail(
            InterruptedRunError(
                "out of memory", where="this process", hint=f"give it more memory{aside('workers.resources')}"
            ),
            options,
        )
    except Exception as bug:
        if isinstance(bug, OSError) and bug.filename:  # a system call that nobody has put into words
            from ckpt2pt.io.access import access_error  # noqa: PLC0415

            return _fail(
                access_error(bug, os.fsdecode(bug.filename), "a system call", option="the paths that were given"),
                options,
            )
        account.message = f"{type(bug).__name__}: {bug}; this is a bug, please report it with the log"
        if options.log_format == "json":
            _tell(error=type(bug).__name__, what=account.message, traceback=traceback.format_exc(), exitCode=70)
        else:
            traceback.print_exc()
            print("ckpt2pt: this is a bug; please report it with the lines above", file=sys.stderr)
        return 70


def _tell(**error: object) -> None:
    print(json.dumps({"level": "error", **error}), file=sys.stderr)


def _interrupt(account: Account, number: int, _: FrameType | None) -> None:
    if account.over:  # an error would deny what is done
        return
    raise InterruptedRunError(
        f"stopped by {signal.Signals(number).name}", where="before the first byte", hint="run the same command again"
    )


def _too_late(_: int, __: FrameType | None) -> None:
    """It has ended, and is about to say how."""


def _fail(error: Ckpt2ptError, options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _too_late)
    options.account.message, options.account.failure = termination.message_of(error), error.reason
    if getattr(options, "debug", False):
        traceback.print_exc()
    _report(error, options)
    return error.exit_code


def _report(error: Ckpt2ptError, options: argparse.Namespace, **about: int) -> None:
    """On stderr; ``about`` is what it is of, as ``stage=1``."""
    error = error.spelled(of_call(options))
    if getattr(options, "log_format", "text") == "json":
        parts = {"what": error.what, "where": error.where, "hint": error.hint}
        field = {"field": error.field} if error.field else {}
        _tell(**about, error=type(error).__name__, **parts, **field, exitCode=error.exit_code)
    else:
        of = "".join(f"{name} {value}: " for name, value in about.items())
        print(f"ckpt2pt: {of}{error}", file=sys.stderr)


def _set_up_logging(options: argparse.Namespace) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if options.log_format == "json":
        from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415 - only when asked for

        handler.setFormatter(
            JsonFormatter("%(asctime)s %(levelname)s %(message)s", rename_fields={"levelname": "level"})
        )
    else:
        handler.setFormatter(LineFormatter("ckpt2pt: %(message)s"))
    handler.addFilter(Spelling(of_call(options)))
    logging.getLogger().handlers[:] = [handler]
    log.setLevel(logging.INFO)


def _show(document: object, text: str, options: argparse.Namespace) -> None:
    spell = of_call(options)
    _say(json.dumps(spelled_document(document, spell), indent=1) if options.output == "json" else rendered(text, spell))


def _say(text: str) -> None:
    """At once: whoever follows a watch through a pipe or a file sees each checkpoint when it is done."""
    try:
        print(printable(text, lines=True), flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _close_stdout()
        raise FileAccessError(
            f"the result could not be written: {error.strerror}",
            where="standard output",
            hint="see that it can be written to, and run the same command again: what is finished is kept",
        ) from error


def _close_stdout() -> None:
    """Nothing of what could not be written is tried again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _convert(options: argparse.Namespace) -> int:
    from ckpt2pt.kube.asked import spec_of, stages_of  # noqa: PLC0415
    from ckpt2pt.run.conversion import run  # noqa: PLC0415
    from ckpt2pt.show.progress import reporter  # noqa: PLC0415

    if getattr(options, "debug", False):
        log.setLevel(logging.DEBUG)
    account: Account = options.account
    spec = spec_of(options)
    with _served(account, options.progress_port):
        request = _complete(spec, account, in_process=options.multiprocess_off)
        # A level that is only the default does not have each resumed run read again what is there.
        request = replace(request, reread=options.verify in {"digest", "full"} or spec.verify == "Full")
        account.stages = stages = stages_of(options, request)
        outcome = run(request, stages, Both(account, reporter(options.progress)))
    account.converted(outcome)
    for remark in outcome.remarks:
        log.warning("%s", remark)
    _show(outcome.document(), outcome.sentence(), options)
    return 0


def _complete(spec: Spec, account: Account, *, in_process: bool = False) -> AnyRequest:
    """What is asked for, once its source is complete."""
    if spec.readiness.timeout_seconds:
        from ckpt2pt.kube.worker.waiting import request_when_complete  # noqa: PLC0415 - only when asked for

        return request_when_complete(spec, account, in_process=in_process)
    from ckpt2pt.kube.resolve import resolve_any  # noqa: PLC0415

    return resolve_any(spec, in_process=in_process)


def _watch(options: argparse.Namespace) -> int:
    from ckpt2pt.kube.follow.command import watch_command  # noqa: PLC0415

    return watch_command(options, _show)


def _served(account: Account, port: int) -> AbstractContextManager[int]:
    if not port:
        return nullcontext(0)
    from ckpt2pt.kube.worker.endpoint import served  # noqa: PLC0415 - a server of HTTP, only when asked for

    return served(account, port)


def _plan(options: argparse.Namespace) -> int:
    from ckpt2pt.kube.asked import spec_of, stages_of  # noqa: PLC0415
    from ckpt2pt.show.preview import planned, render  # noqa: PLC0415

    account: Account = options.account
    spec = spec_of(options)
    with _served(account, options.progress_port):
        request = _complete(spec, account)
        account.stages = stages = stages_of(options, request)
        plan = planned(request, stages, names=options.names == "list")
    account.planned(plan.document)
    _show(plan.document, render(plan.document, details=options.details), options)
    plan.check()
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from ckpt2pt.io.text import render  # noqa: PLC0415
    from ckpt2pt.show.checkpoint import inspect  # noqa: PLC0415
    from ckpt2pt.show.folding import folded  # noqa: PLC0415

    document = cast("Document", spelled_document(inspect(options.path, details=options.details), of_call(options)))
    _show(document, render(document if options.details else folded(document)), options)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ckpt2pt.kube.asked import spec_of, stages_of  # noqa: PLC0415
    from ckpt2pt.kube.resolve import resolve_any  # noqa: PLC0415
    from ckpt2pt.run.verify import verify_result  # noqa: PLC0415
    from ckpt2pt.show.progress import reporter  # noqa: PLC0415
    from ckpt2pt.verification.prove import verify_records  # noqa: PLC0415

    _check_verify_options(options)
    report: Comparison | Report
    with closing(reporter(options.progress, "compared" if len(options.paths) > 1 else "stage {}")) as progress:
        if len(options.paths) > 1:
            report = _comparison(options, progress)
        elif options.paths:
            report = verify_records(options.paths[0], reporter=progress)
        else:
            request = resolve_any(spec_of(options))
            stages = stages_of(options, request)
            report = verify_result(request, stages, level=options.level, reader=options.reader, reporter=progress)
    _show(report.document(), report.render(), options)
    report.raise_differences(of_call(options))
    return 0


_OF_PATHS: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"level"}),
    frozenset({"tp_size", "pp_size", "rules", "ignore", "ignore_padding", *MINDFORMERS}),
)
"""What ``verify`` takes besides output and paths, by how many of these there are; without any, all but two."""


def _check_verify_options(options: argparse.Namespace) -> None:
    """Refuse options that are about another of the three ways to verify."""
    count = min(len(options.paths), 2)
    every = _OF_PATHS[count] | {"paths", "progress", "output", "log_format"}
    for name, default in vars(build_parser().parse_args(["verify"])).items():
        known = name in every if count else name not in {"ignore", "ignore_padding"}
        if not known and getattr(options, name) != default:
            flag = f"--{name.replace('_', '-')}"
            ways = (
                "a result is compared with its source",
                "a result is verified by its own records",
                "two are compared",
            )
            raise UsageError(
                f"{flag} is given, and decides nothing where {ways[count]}",
                where="the command line",
                hint="leave it out, or see ckpt2pt verify --help for the three ways to verify",
            )


def _comparison(options: argparse.Namespace, progress: Reporter) -> Comparison:
    from ckpt2pt.discover.request import rules_of  # noqa: PLC0415
    from ckpt2pt.formats.mindformers.flags import Flags  # noqa: PLC0415
    from ckpt2pt.verification.across import compare_any  # noqa: PLC0415

    sizes, rules = (options.tp_size, options.pp_size), rules_of(options.rules)
    how = {"ignore": options.ignore, "ignore_padding": options.ignore_padding}
    flags = Flags(**{field: getattr(options, name) for name, field in MINDFORMERS.items()})
    return compare_any(options.paths, sizes, rules, **how, mindformers=flags, reporter=progress)


def _combine(options: argparse.Namespace) -> int:
    from ckpt2pt.cli.combine import request_of  # noqa: PLC0415
    from ckpt2pt.kube.asked import stages_of  # noqa: PLC0415
    from ckpt2pt.run.combine import combine  # noqa: PLC0415
    from ckpt2pt.show.progress import reporter  # noqa: PLC0415

    request, section = request_of(options)
    if section and options.stage is not None:
        raise UsageError(
            "--rank-section and --stage are both given", where="the command line", hint="choose groups by one of them"
        )
    stages = None if section else stages_of(options, request)
    outcome = combine(request, section, reporter(options.progress), stages=stages)
    _show(outcome.document(), outcome.sentence(), options)
    return 0


def _pt_meta(options: argparse.Namespace) -> int:
    from ckpt2pt.cli.ptmeta import make_pt_meta  # noqa: PLC0415
    from ckpt2pt.show.progress import reporter  # noqa: PLC0415

    with closing(reporter(options.progress)) as progress:
        made = make_pt_meta(options, progress)
    _show(made.document(), made.sentence(details=options.details), options)
    made.confirm()
    return 0


def _run(options: argparse.Namespace) -> int:
    from ckpt2pt.kube.local.runner import run_document  # noqa: PLC0415

    return run_document(options, _show, lambda stage, error: _report(error, options, stage=stage))


def _completion(options: argparse.Namespace) -> int:
    from argcomplete.shell_integration import shellcode  # noqa: PLC0415 - only when asked for

    _say(shellcode(PROGRAMS, shell=options.shell).strip())
    return 0


def _commands() -> dict[str, Command]:
    return {
        "convert": _convert,
        "plan": _plan,
        "watch": _watch,
        "inspect": _inspect,
        "verify": _verify,
        "import": _convert,
        "combine": _combine,
        "pt-meta": _pt_meta,
        "run": _run,
        "submit": on_the_cluster("submit"),
        "completion": _completion,
    }
