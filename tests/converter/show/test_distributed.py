"""What ``inspect`` tells of a distributed checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.errors import FormatError
from goldens import golden_root
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
    reported = capsys.readouterr().out
    assert "fully_reshardable" in reported
    assert "samples round to the weights" in reported
    assert "decoder.layers.{0-2}.self_attention.linear_proj.weight" in reported
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "samples round to the weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flat", "as_object", "expected"),
    [
        (False, False, {"0.8 to 0.14": "no", "0.15 to 0.19": "yes"}),
        (True, False, {"0.8 to 0.15": "yes", "0.16 to 0.19": "no: they refuse flattened tensors"}),
        (False, True, {"0.8 to 0.18": "no: they look for common.pt", "0.19": "yes"}),
    ],
)
def test_inspect_tells_who_loads_it_and_why_others_do_not(
    flat: bool, as_object: bool, expected: dict[str, str], tmp_path: Path
) -> None:
    """Releases up to 0.12 do not state how the state is sharded: flattened tensors tell."""
    weight = coarse(of_layers(ROWS, COLUMNS))
    key = "decoder.layers.self_attention.linear_proj.weight"
    states = [f"optimizer.state.{kind}.{key}" for kind in ("fp32_param", "exp_avg", "exp_avg_sq")]
    stored = weight.reshape(1, 1, 1, -1) if flat else weight
    keys = {key: (as_bfloat16(weight), whole(weight))} | {name: (stored, whole(stored)) for name in states}
    content: Any = {} if flat else {"content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"}}
    folder = write_folder(
        tmp_path / "x",
        keys,
        common=content,
        as_object=as_object,
        unflattened=dict.fromkeys(states, (3, ROWS, COLUMNS)) if flat else None,
    )
    found = ckpt2pt.inspect(folder)["releases"]
    assert isinstance(found, dict)
    assert found.keys() == expected.keys()
    assert all(str(found[name]).startswith(said) for name, said in expected.items())


def test_inspect_tells_a_save_with_a_wrong_optimizer_from_a_good_one(tmp_path: Path) -> None:
    """As Megatron-LM saves it with several buckets of which one is padded."""
    with pytest.raises(FormatError, match="main parameters of 18 of 28 tensors do not round to the weights"):
        ckpt2pt.inspect(golden_root() / "mcore" / "0.19.0" / "odd_dp2__td_full")
