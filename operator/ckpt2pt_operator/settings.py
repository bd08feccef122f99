"""What the operator is given at its start: flags, each of which is also an environment variable."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, cast

import yaml

from ckpt2pt import __version__
from ckpt2pt.errors import FileAccessError, UsageError
from ckpt2pt.io.flags import Parser
from ckpt2pt.kube.conversion.schema import Json
from ckpt2pt_operator.rules.permissions import PERMISSIONS
from ckpt2pt_operator.rules.trainings import Kind, kinds

_PREFIX = "CKPT2PT_"
_TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``namespaces`` empty means all of them; ``qps`` and ``burst`` limit writes to the API server."""

    namespaces: tuple[str, ...]
    worker_image: str
    worker_defaults: Json
    allow: tuple[str, ...]
    training_kinds: tuple[Kind, ...]
    training_trigger: bool
    metrics_port: int
    leader_elect: bool
    lease_name: str
    lease_namespace: str
    qps: float
    burst: int
    concurrency: int
    resync_seconds: float
    check_volumes: bool
    live_progress: bool
    delete_finished: bool
    log_format: Literal["json", "text"]
    log_level: str

    def reported(self) -> dict[str, object]:
        """All of it, for the log."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def read(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Settings:
    """Flags before variables; UsageError where a value or a file is wrong."""
    environ = os.environ if environment is None else environment
    parser = _parser()
    given = parser.parse_args(arguments, _from_variables(parser, environ))
    names = cast("list[str] | None", given.namespace)
    if names is None:
        names = [name.strip() for name in environ.get(f"{_PREFIX}NAMESPACE", "").split(",") if name.strip()]
    return Settings(
        namespaces=tuple(dict.fromkeys(names)),
        worker_image=_image(given.worker_image),
        worker_defaults=cast("Json", _yaml(given.worker_defaults, dict)) or {},
        allow=given.allow,
        training_kinds=kinds(cast("list[Json]", _yaml(given.training_kinds, list)) or ()),
        training_trigger=given.training_trigger,
        metrics_port=given.metrics_port,
        leader_elect=given.leader_elect,
        lease_name=given.lease_name,
        lease_namespace=given.lease_namespace,
        qps=given.qps,
        burst=given.burst,
        concurrency=given.concurrency,
        resync_seconds=given.resync_seconds,
        check_volumes=given.check_volumes,
        live_progress=given.live_progress,
        delete_finished=given.delete_finished,
        log_format=given.log_format,
        log_level=given.log_level,
    )


def _from_variables(parser: argparse.ArgumentParser, environ: Mapping[str, str]) -> argparse.Namespace:
    """What the variables say, each of them read as its flag would be; UsageError names the one that is wrong."""
    found = argparse.Namespace()
    for action in parser._actions:
        name = _PREFIX + action.dest.upper()
        value = environ.get(name, "")
        if not value or action.dest in {"help", "version", "namespace"}:
            continue
        flag = [f"{action.option_strings[0]}={value}"]
        if isinstance(action, argparse.BooleanOptionalAction):
            truth = _TRUTH.get(value.lower())
            if truth is None:
                raise UsageError(f"{value!r} is neither true nor false", where=name, hint="set it to true or false")
            flag = [action.option_strings[0 if truth else 1]]
        try:
            parser.parse_args(flag, found)
        except UsageError as error:
            raise UsageError(error.what, where=name, hint=error.hint) from error
    return found


def _above(kind: type, least: float) -> Callable[[str], float]:
    """A number that is not less."""

    def read(value: str) -> float:
        found: float = kind(value)
        if not least <= found < float("inf"):
            raise argparse.ArgumentTypeError(f"{value} is not a number from {least:g} on")
        return found

    return read


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ckpt2pt-operator",
        description="Carry out the CheckpointConversions of a cluster.",
        epilog=f"Each flag is also a variable: --worker-image is {_PREFIX}WORKER_IMAGE.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ckpt2pt-operator {__version__}")

    def add(flag: str, default: object, kind: Callable[[str], object] = str, **more: object) -> None:
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=str(more["help"]))
        else:
            parser.add_argument(flag, default=default, type=kind, **more)  # type: ignore[arg-type]

    parser.add_argument("--namespace", action="append", metavar="NS", help="watch this namespace only; repeatable")
    add("--worker-image", "", metavar="IMAGE", help="image of the workers")
    add(
        "--worker-defaults",
        None,
        Path,
        metavar="FILE",
        help="YAML: fields of spec.workers for conversions without them",
    )
    add(
        "--allow",
        "",
        _permissions,
        metavar="WHAT",
        help=f"what conversions may ask for, by comma: {', '.join(PERMISSIONS)}",
    )
    add("--training-kinds", None, Path, metavar="FILE", help="YAML: the kinds that spec.startAfter may name")
    add("--training-trigger", False, bool, help="make a conversion for each training that is annotated to ask for one")
    add("--metrics-port", 8080, _above(int, 0), metavar="PORT", help="/metrics, /healthz and /readyz")
    add("--leader-elect", False, bool, help="hold a Lease, so that one of several operators works")
    add("--lease-name", "ckpt2pt-operator", metavar="NAME", help="name of the Lease")
    add("--lease-namespace", "", metavar="NS", help="namespace of the Lease; that of the pod by default")
    add("--qps", 20.0, _above(float, 0.01), metavar="N", help="writes to the API server per second")
    add("--burst", 40, _above(int, 1), metavar="N", help="writes at once before --qps holds")
    add("--concurrency", 4, _above(int, 1), metavar="N", help="conversions looked at at a time")
    add("--resync-seconds", 300.0, _above(float, 1), metavar="S", help="look at each conversion at least this often")
    add("--check-volumes", True, bool, help="look at PersistentVolumeClaims before a Job is made")
    add("--live-progress", True, bool, help="ask running workers how far they are, at port 8080 of their pods")
    add("--delete-finished", True, bool, help="delete finished conversions when their timeToLiveSeconds are over")
    add("--log-format", "json", choices=("json", "text"), help="one JSON object a line, or text")
    add("--log-level", "info", choices=("debug", "info", "warning", "error"), help="least that is logged")
    return parser


def _permissions(given: str) -> tuple[str, ...]:
    found = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in found if name not in PERMISSIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(PERMISSIONS)}")
    return tuple(dict.fromkeys(found))


def _image(given: str) -> str:
    if not given:
        raise UsageError(
            "no image is given for the workers", where="the command line", hint="give --worker-image, as the chart does"
        )
    return given


def _yaml(path: Path | None, kind: type) -> object:
    if path is None:
        return None
    try:
        found: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileAccessError(f"cannot be read: {error.strerror}", where=path, hint="check its ConfigMap") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not YAML: {error}", where=path, hint="correct it") from error
    if found is not None and not isinstance(found, kind):
        wanted = "a mapping of fields" if kind is dict else "a list"
        raise UsageError(f"is not {wanted}", where=path, hint="see the values of the chart")
    return found
