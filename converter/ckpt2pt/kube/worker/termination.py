"""The last word of a worker: one small JSON object in the file that the kubelet shows as the termination message.

Best effort: a conversion never fails because its message could not be written.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import unicodedata
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckpt2pt.errors import Ckpt2ptError, rendered
from ckpt2pt.kube.conversion.spelling import in_document

log = logging.getLogger("ckpt2pt")

FLAG = "--termination-log"
VARIABLE = "CKPT2PT_TERMINATION_LOG"
COMMANDS = ("convert", "plan", "watch")
MAX_BYTES = 4096
"""What the kubelet keeps of one container's message."""
MAX_MESSAGE = 1024
MAX_WARNINGS, MAX_WARNING = 4, 300
"""How many of a run's warnings are reported, and how much of each."""
_MAX_PART = 300

Json = dict[str, object]


def path_of(words: Sequence[str], environment: Mapping[str, str]) -> Path | None:
    """Where the message goes.  Read from the bare words, because wrong usage is an end as well."""
    if not words or words[0] not in COMMANDS:
        return None
    found = environment.get(VARIABLE) or None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == FLAG:
            found = following
        elif word.startswith(f"{FLAG}="):
            found = word.partition("=")[2]
    return Path(found) if found else None


def message_of(error: Ckpt2ptError) -> str:
    """What, where and hint in one line; where it is too long, what was found gives way to the hint."""
    where, hint = plain(error.where)[-_MAX_PART:], plain(error.hint)[:_MAX_PART]
    room = MAX_MESSAGE - len(where) - len(hint) - 4
    what = plain(error.what)
    return f"{what if len(what) <= room else what[: room - 3] + '...'}; {where}; {hint}"


def render(code: int, reason: str, message: str, facts: Mapping[str, object]) -> bytes:
    """The message: UTF-8 JSON without control characters, at most 4096 bytes."""
    head: Json = {"version": 1, "exitCode": code, "reason": reason}
    short = MAX_MESSAGE // 4
    for limit, left_out in ((MAX_MESSAGE, ()), (short, ()), (short, ("warnings",)), (short, ("warnings", "stages"))):
        rest = {name: value for name, value in facts.items() if name not in left_out}
        data = json.dumps({**head, "message": plain(message)[:limit], **rest}, ensure_ascii=False).encode()
        if len(data) <= MAX_BYTES:
            return data
    return json.dumps(head).encode()


def write(path: Path, data: bytes) -> None:
    """In place: the kubelet has mounted this very file.  Never waits for a reader, never raises."""
    with _undisturbed():
        try:
            fd = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644
            )
            with os.fdopen(fd, "wb") as file:
                file.write(data)
        except (OSError, ValueError) as error:
            log.warning("the termination message could not be written to %s: %s", path, error)


@contextmanager
def _undisturbed() -> Generator[None]:
    """The end has come already: a signal must not cut its message short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plain(text: str) -> str:
    """One line that any terminal may show: no control or formatting characters, no half of a surrogate pair.

    Whoever reads it has written a document, whatever the command line of the worker was.
    """
    shown = rendered(text, in_document)
    kept = (" " if unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp"} else c for c in shown)
    return " ".join("".join(kept).encode(errors="replace").decode().split())
