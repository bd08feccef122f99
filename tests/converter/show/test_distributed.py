"""What ``inspect`` tells of a distributed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli.commands import main
from torchdist import as_bfloat16, coarse, of_layers, whole, write_folder

ROWS, COLUMNS = 8, 4


def test_inspect_tells_form_and_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = coarse(of_layers(ROWS, COLUMNS))
    key = "decoder.layers.self_attention.linear_proj.weight"
    keys = {
        key: (as_bfloat16(weight), whole(weight)),
        **{f"optimizer.state.{kind}.{key}": (weight, whole(weight)) for kind in ("param", "exp_avg", "exp_avg_sq")},
    }
    content: Any = {"content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}
    write_folder(tmp_path / "iter_0000003", keys, common=content)
    assert main(["inspect", str(tmp_path / "iter_0000003")]) == 0
    told = capsys.readouterr().out
    assert "fully_reshardable" in told
    assert "samples round to the weights" in told
    assert "decoder.layers.{0-2}.self_attention.linear_proj.weight" in told
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "samples round to the weights" in capsys.readouterr().out
