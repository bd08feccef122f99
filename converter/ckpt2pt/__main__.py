"""``python -m ckpt2pt``: the command without its script, and how the processes of ``ckpt2pt run`` end with it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from ckpt2pt.cli import main

PARENT_VARIABLE = "CKPT2PT_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Have this process stopped by SIGTERM, as if asked by its parent, when the parent is gone, however that ended."""
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
