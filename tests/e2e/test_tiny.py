"""Ten seconds: one small checkpoint through the installed program, read by torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversions import flags_for

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("full", [True, False], ids=["full", "params-only"])
def test_a_checkpoint_converts_and_torch_loads_it(golden: Path, tmp_path: Path, full: bool) -> None:
    folder = golden / "megatron06" / "j_tp1pp2dp2"
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "ckpt2pt",
            "convert",
            *flags_for(folder, tmp_path, full=full),
            "--output",
            "json",
            "--progress",
            "json",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(result.stdout)["published"] is True
    assert (
        json.loads(result.stderr.splitlines()[-1])["bytesDone"]
        == json.loads(result.stderr.splitlines()[-1])["bytesTotal"]
    )
    optimizer = tmp_path / "iter_0000002" / "mp_rank_00_001" / "distrib_optim.pt"
    assert optimizer.exists() == full
    if full:
        assert torch.load(optimizer, weights_only=True)["per_bucket_numel"]
