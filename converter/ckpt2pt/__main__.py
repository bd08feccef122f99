"""The door of our programs, and how the processes of ``ckpt2pt run`` end with it.

Nearly nothing is imported before a signal is listened to: one that comes during the imports ends the program like any other.
"""

from __future__ import annotations

import os
import signal
import sys

PARENT_VARIABLE = "CKPT2PT_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TRY_AGAIN = 75


def main() -> int:
    """``ckpt2pt``."""
    return _enter("main")


def kubectl() -> int:
    """``kubectl ckpt2pt``."""
    return _enter("kubectl")


def _enter(program: str) -> int:
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from ckpt2pt import cli  # noqa: PLC0415

        code: int = getattr(cli, program)()
    except KeyboardInterrupt:
        sys.stderr.write("ckpt2pt: stopped by a signal\n  where: at the door\n  mend:  run the same command again\n")
        code = _TRY_AGAIN
    # All is said and done, and only Python itself has still to leave.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return code


def end_with(parent: int) -> None:
    """Have this process stopped by SIGTERM, as if asked by its parent, when the parent is gone, however that ended."""
    import ctypes  # noqa: PLC0415 - these are for workers alone
    import threading  # noqa: PLC0415
    import time  # noqa: PLC0415
    from contextlib import suppress  # noqa: PLC0415

    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) == 0:
                if os.getppid() != parent:  # it was gone before the kernel was told
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    # Taken out of the environment: the processes that this one starts have another parent.
    given = os.environ.pop(PARENT_VARIABLE, "")
    if given.isdecimal():
        end_with(int(given))
    sys.exit(main())
