"""Log lines for a terminal."""

from __future__ import annotations

import logging

from ckpt2pt.errors import Ckpt2ptError, Spell, rendered, spelled


class LineFormatter(logging.Formatter):
    """Spells control characters out: names in a line come out of files that anybody may have written."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return spelled(super().format(record))


class Spelling(logging.Filter):
    """Has each record name options as the command does that was called."""

    def __init__(self, spell: Spell) -> None:
        super().__init__()
        self._spell = spell

    def filter(self, record: logging.LogRecord) -> bool:
        """Always true."""
        if isinstance(record.args, tuple):  # an error would come as text of no command otherwise
            spelt = (arg.spelled(self._spell) if isinstance(arg, Ckpt2ptError) else arg for arg in record.args)
            record.args = tuple(spelt)
        record.msg, record.args = rendered(record.getMessage(), self._spell), ()
        return True
