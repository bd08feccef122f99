"""The ten-second proof (`make tiny`): the reference's command line, a small real checkpoint, read by real torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

SET = "megatron06/a2_tp1pp1_tied_bias"


def test_a_small_checkpoint_is_converted_and_torch_reads_what_megatron_wrote(golden: Path, tmp_path: Path) -> None:
    source, target = golden / SET, tmp_path / "megatron_pt"
    flags = (
        "--num-layers 2 --dp-size 1 --cp-size 1 --tp-size 1 --pp-size 1 --vpp-size 1 --src-model-format ckpt "
        "--multiprocess-off"
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "ckpt2pt", "convert", *flags.split(),
            "--ms-path", str(source / "ms"), "--param-map-path", str(source / "pt_meta"), "--megatron-path", str(target),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "2"
    ours = torch.load(target / "iter_0000002" / "mp_rank_00" / "distrib_optim.pt", weights_only=True)
    theirs = torch.load(source / "A" / "iter_0000002" / "mp_rank_00" / "distrib_optim.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    key = next(iter(theirs[0]))
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        assert len(ours[0][key][kind]) == len(theirs[0][key][kind])
        for mine, judge in zip(ours[0][key][kind], theirs[0][key][kind], strict=True):
            assert torch.equal(mine, judge)
