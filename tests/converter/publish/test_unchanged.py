"""Files of finished ranks that are no longer as they were written are found before a result is shown, in every format."""

from __future__ import annotations

import os
from pathlib import Path
from zlib import crc32

import pytest

from ckpt2pt.errors import TryAgainError, VerificationError
from ckpt2pt.publish import MEGATRON, MINDSPORE, TRACKER, Kind, Target
from ckpt2pt.publish.unchanged import changed_file, prove_unchanged, refuse_lost

NAMES = {"MindSpore": "rank_{}/network.ckpt", "Megatron": "mp_rank_00_00{}/model_optim_rng.pt"}


@pytest.fixture(params=[MEGATRON, MINDSPORE], ids=lambda kind: kind.reader)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    kind: Kind = request.param
    ranks = {(0, 0): "me", (0, 1): "me"}
    found = Target(root=tmp_path / "out", iteration=5, identity="me", stages=2, tensor=1, kind=kind, ranks=ranks)
    found.claim({}, overwrite=False)
    for pp in range(2):
        path, content = place(found, pp), b"stage %d" % pp
        entry = {"path": str(path.relative_to(found.folder)), "nbytes": 7, "crc32": f"{crc32(content):08x}"}
        found.ledger((0, pp)).announce([entry])
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        entry |= {"mtimeNs": path.stat().st_mtime_ns}
        found.publish_rank(0, pp, {"tp": 0, "pp": pp, "files": [entry]})
        found.publish_stage(pp, {})
    return found


def place(target: Target, pp: int) -> Path:
    return target.folder / NAMES[target.kind.reader].format(pp)


def test_a_file_that_was_only_touched_is_read_and_right(target: Target) -> None:
    os.utime(place(target, 1), ns=(1, 1))
    prove_unchanged(target)
    assert not changed_file(target, target.manifest_of((0, 1)) or {})
    assert target.publish_iteration()


def test_other_bytes_of_the_same_size_keep_a_result_from_being_shown(target: Target) -> None:
    place(target, 1).write_bytes(b"STAGE 1")
    os.utime(place(target, 1), ns=(1, 1))
    assert changed_file(target, target.manifest_of((0, 1)) or {}) == str(place(target, 1).relative_to(target.folder))
    with pytest.raises(VerificationError, match="not as it was written") as caught:
        target.publish_iteration()
    assert str(place(target, 1)) in str(caught.value.where)
    assert not (target.root / TRACKER).exists()
    refuse_lost(target)


@pytest.mark.parametrize("content", [None, b"stage"], ids=["lost", "cut"])
def test_a_file_that_is_gone_or_cut_is_reported_to_whoever_would_wait_for_it(
    content: bytes | None, target: Target
) -> None:
    place(target, 1).unlink()
    if content:
        place(target, 1).write_bytes(content)
    assert not target.publish_iteration()
    with pytest.raises(TryAgainError, match="tp 0 pp 1") as caught:
        refuse_lost(target)
    assert "stage 1" in caught.value.hint
