"""``python -m ckpt2pt``: the command without its script."""

from __future__ import annotations

import sys

from ckpt2pt.cli import main

if __name__ == "__main__":
    sys.exit(main())
