"""What a merge says it did."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt2pt.run.combine.outcome import Combined

FACTS: dict[str, Any] = {
    "output": "out", "when": (0, 2), "ranks": 2, "written": 2, "kept": 0, "bytes_written": 10, "seconds": 1.0,
    "source_checksums": {"verified": 0, "notChecked": 0, "none": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "epoch 0, step 2: merged 2 ranks of 2 shards each (10 B) in 1.0 s\nout"),
        ({"written": 1, "kept": 1}, "in 1.0 s, kept 1 that were there\nout"),
        ({"written": 0, "kept": 2}, "epoch 0, step 2: everything was there already\nout"),
        ({"source_checksums": {"verified": 3, "none": 1}}, "\nsource checksums: 3 verified, 1 files state none\nout"),
    ],
)
def test_a_sentence_tells_what_was_merged_kept_and_proved(changes: dict[str, Any], words: str) -> None:
    combined = Combined(**(FACTS | changes))
    assert combined.sentence().endswith(words)
    assert combined.document()["sourceChecksums"] == (FACTS | changes)["source_checksums"]
