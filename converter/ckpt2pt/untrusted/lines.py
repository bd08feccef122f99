"""Log lines for a terminal."""

from __future__ import annotations

import logging

from ckpt2pt.errors import spelled


class LineFormatter(logging.Formatter):
    """Spells control characters out: names in a line come out of files that anybody may have written."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return spelled(super().format(record))
