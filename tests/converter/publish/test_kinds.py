"""Names of records."""

from __future__ import annotations

import pytest

from ckpt2pt.publish.kinds import is_record, rank_name, stage_name, writing_name


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (rank_name(1, 3), True),
        (writing_name(1, 3), True),
        (stage_name(3), True),
        ("claim.json", True),
        ("stage-003.lock", True),
        (".claim.json.12-0a1b2c3d.partial", True),
        ("notes.json", False),
        ("claim.json.bak", False),
    ],
)
def test_a_record_is_known_by_its_name(name: str, ours: bool) -> None:
    assert is_record(name) is ours
