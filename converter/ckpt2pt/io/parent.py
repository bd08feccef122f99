"""A process that ends with its parent, however the parent ended: what it would still write belongs to nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int, number: signal.Signals) -> None:
    """Have this process get a signal as soon as its parent is gone; at once if it is gone already."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number)) == 0:
                if os.getppid() != parent:  # it was gone before the kernel knew
                    os.kill(os.getpid(), number)
                return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
