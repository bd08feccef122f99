"""Start a conversion from inside a training: nothing here may disturb it.

    training --latest file--> epoch, step --python -m ckpt2pt submit, a process of its own--> API server

The process waits until every rank has saved, submits under a name made from run, epoch and step, and is ended when it
takes too long.  Whatever goes wrong there is a line in the log.  This module needs the standard library alone.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger("ckpt2pt.hooks")

_STEP = re.compile(r"-(\d+)_(\d+)\.(?:ckpt|safetensors)$|_rank_\d+_(\d+)\.(?:ckpt|safetensors)$")
_RANKS = ("RANK_ID", "OMPI_COMM_WORLD_RANK", "RANK")


def rank_of_environment(environment: Mapping[str, str] = os.environ) -> int:
    """This process' rank as its launcher says it; 0 when nobody does."""
    found = (environment.get(name, "") for name in _RANKS)
    return next((int(text) for text in found if text.isdecimal()), 0)


def moment_of(latest: str | Path) -> tuple[int, int] | None:
    """(epoch, step) of a checkpoint's name, ``network_rank_0-2_500.ckpt``; None when it does not say."""
    found = _STEP.search(str(latest))
    return (int(found[1] or 0), int(found[2] or found[3])) if found else None


def submit_conversion(
    template: str | Path,
    *,
    latest: str | Path | None = None,
    output_dir: str | Path | None = None,
    step: int | None = None,
    run: str | None = None,
    uid: str | None = None,
    iteration: int | None = None,
    namespace: str | None = None,
    set_fields: Mapping[str, object] | None = None,
    rank: int | None = None,
    ready_seconds: float = 300.0,
    request_seconds: float = 60.0,
) -> str | None:
    """Submit the CheckpointConversion of ``template`` for the checkpoint that has just been saved; call it on every rank.

    ``latest`` is the file that this rank saved last; without it the newest of ``output_dir`` counts, the folder of
    ``rank_R``, or of MindFormers' ``iteration_*``, of which ``step`` names one.  ``run`` and ``uid`` name the training (default: the template's name), ``set_fields`` holds fields like
    ``{"spec.source.path": "run7"}``.  Waits at most ``ready_seconds`` for the other ranks' files and ``request_seconds``
    for the API server.  Returns the name, None on other ranks and after any error, which is logged and never raised.
    """
    try:
        if (rank_of_environment() if rank is None else rank) != 0:
            return None
        words = ["-f", str(template), "--output", "name", "--request-timeout", str(float(request_seconds))]
        moment = None if latest is None else moment_of(latest)
        if latest is not None and moment is None:
            log.error("no conversion is submitted: the name of %s has no epoch and step", latest)
            return None
        if moment:
            words += ["--epoch", str(moment[0]), "--step", str(moment[1])]
        elif step is not None:
            words += ["--step", str(step)]
        folder = output_dir or (Path(latest).absolute().parent.parent if latest else None)
        if folder:
            words += ["--ready-in", str(folder), "--readiness-timeout", str(float(ready_seconds))]
        given = {"--run": run, "--uid": uid, "--iteration": iteration, "--namespace": namespace}
        words += [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
        words += [word for path, value in (set_fields or {}).items() for word in ("--set", f"{path}={value}")]
        seconds = float(ready_seconds) + float(request_seconds) + 60
    except (TypeError, ValueError, AttributeError) as error:
        log.error("no conversion is submitted: an argument is wrong: %s", error)
        return None
    return _call(words, seconds)


def _call(words: list[str], seconds: float) -> str | None:
    command = [sys.executable, "-m", "ckpt2pt", "submit", *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=seconds, check=False
        )  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.error("no conversion is submitted: %s", error)
        return None
    said = done.stderr.strip()
    if done.returncode != 0:
        log.error("no conversion is submitted (exit code %d): %s", done.returncode, said)
        return None
    name = done.stdout.strip()
    log.info("conversion %s is submitted%s", name, f": {said}" if said else "")
    return name
