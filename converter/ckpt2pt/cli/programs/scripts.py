"""The reference's three scripts by their names.

convert_ckpt2pt.py         ckpt2pt convert
convert_pt2ckpt.py         ckpt2pt import
combine_ckpt_dp_zero.py    ckpt2pt combine

Flags and defaults of the scripts are those of MindSpeed-Core-MS feature-0.1 (mindspeed_ms/tools/converter); what they
require and ``pt_meta`` or the checkpoint says may be left out.  A failure has our exit code, where theirs is 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ckpt2pt.cli.commands import build_alone, main


def convert_ckpt2pt(argv: Sequence[str] | None = None) -> int:
    """``convert_ckpt2pt.py``: of two formats in one folder the reference takes ``.ckpt``, unless stated otherwise."""

    def build() -> argparse.ArgumentParser:
        parser = build_alone("convert", "convert_ckpt2pt.py")
        parser.set_defaults(source_format="ckpt")
        return parser

    return main(argv, build)


def convert_pt2ckpt(argv: Sequence[str] | None = None) -> int:
    """``convert_pt2ckpt.py``."""
    return main(argv, lambda: build_alone("import", "convert_pt2ckpt.py"))


def combine_ckpt_dp_zero(argv: Sequence[str] | None = None) -> int:
    """``combine_ckpt_dp_zero.py``."""
    return main(argv, lambda: build_alone("combine", "combine_ckpt_dp_zero.py"))
