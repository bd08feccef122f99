"""Long-running processes that outlive the one that started them: each with a pid file and a log."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.machine import ClusterError, wait_until


@dataclass(frozen=True, slots=True)
class Daemon:
    """One process of the cluster.  The pid file also holds when it began, so that a reused pid is never signalled."""

    name: str
    folder: Path
    command: tuple[str, ...]

    @property
    def log(self) -> Path:
        """Everything it says, over all its starts."""
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int | None:
        """Its process id; ``None`` when it does not run."""
        try:
            known = json.loads(self._pid_file.read_text())
        except (OSError, ValueError):
            return None
        return known["pid"] if _began(known["pid"]) == known["began"] else None

    def start(self) -> None:
        """Start it in a session of its own; one that runs is left alone."""
        if self.pid is not None:
            return
        output = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        # Not subprocess.Popen, which complains when it is forgotten while the process runs.
        pid = os.posix_spawnp(
            self.command[0],
            self.command,
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log), output, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        self._pid_file.write_text(json.dumps({"pid": pid, "began": _began(pid)}))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal: SIGKILL kills, SIGSTOP pauses, SIGCONT goes on."""
        pid = self.pid
        if pid is None:
            raise ClusterError(f"{self.name} does not run: {self.tail()}")
        os.kill(pid, number)

    def stop(self, *, kill: bool = False, seconds: float = 15) -> None:
        """End it and wait for the end: politely at first, unless reported to ``kill``."""
        for number in (signal.SIGKILL,) if kill else (signal.SIGTERM, signal.SIGKILL):
            pid = self.pid
            if pid is None:
                break
            os.kill(pid, number)
            os.kill(pid, signal.SIGCONT)  # a paused process does not hear SIGTERM
            try:
                wait_until(f"{self.name} to end", lambda: self.pid is None, seconds=seconds, every=0.05)
            except ClusterError:
                if number is signal.SIGKILL:
                    raise
        self._pid_file.unlink(missing_ok=True)

    def tail(self, nbytes: int = 2000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-nbytes:] if self.log.exists() else "(no log)"

    @property
    def _pid_file(self) -> Path:
        return self.folder / f"{self.name}.pid"


def _began(pid: int) -> str | None:
    """Clock tick at which a process began; ``None`` if it does not exist or is dead and not yet waited for."""
    try:
        # The name, in parentheses, may hold blanks.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] == "Z":
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)  # ours, if this process started it
        return None
    return fields[19]
