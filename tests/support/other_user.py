"""Files that this process does not own."""

from __future__ import annotations

import os


def become_another_user() -> None:
    """Only root can become somebody else; anybody else closes the file to himself."""
    if os.getuid() == 0:
        os.seteuid(65534)
