"""Log lines on their way to a terminal."""

from __future__ import annotations

import logging

from ckpt2pt.io.lines import LineFormatter


def test_control_characters_are_spelled_out_and_lines_are_kept() -> None:
    record = logging.LogRecord("ckpt2pt", logging.WARNING, __file__, 1, "a %s\n  hint: b", ("\x1b[2J",), None)
    assert LineFormatter("ckpt2pt: %(message)s").format(record) == "ckpt2pt: a \\x1b[2J\n  hint: b"
