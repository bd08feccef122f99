"""The dialect of archives that MSAdapter writes: torch's names for modules of its own, and MindSpore's types."""

from __future__ import annotations

import re

_FOREIGN = re.compile(
    rb"c(?:mindspore\.common\.tensor\nTensor|mindspore\._c_expression\.typing\n\w+|(?:mindtorch\.torch|msadapter)(?:\.\w+)*\n\w+)\n"
)


def is_msadapter(pickle: bytes) -> bool:
    """Whether the pickle of an archive names what only MSAdapter or MindSpore have."""
    return _FOREIGN.search(pickle) is not None
