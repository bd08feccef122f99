"""The plan of a repair, as a user reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.cli.commands import main


def test_the_plan_names_ranks_files_and_generators(
    golden: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--source",
        str(golden / "msadapter/moe_ep2"),
        "--target",
        str(tmp_path / "out"),
        "--target-format",
        "torch",
    ]
    assert main(["plan", *words]) == 0
    said = capfd.readouterr().out
    assert "files of torch in place of those of MSAdapter; tp 1, pp 1, vpp 1, ep 2" in said
    assert "mp_rank_00_001/distrib_optim.pt" in said
    assert "as at the start of a run with seed 1234" in said
