"""Main parameters that are not those of the weights are found by samples, and every one of them by a full comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.registry import read
from ckpt2pt.formats.rounding import SAMPLE_NUMEL, check_rounding
from ckpt2pt.formats.torch_dist.common import read_common
from ckpt2pt.formats.torch_dist.metadata import read_metadata
from ckpt2pt.formats.torch_dist.read import read_index
from ckpt2pt.library import checkpoint as library
from goldens import golden_root
from mcore import expected
from torchdist import Array, as_bfloat16, of_layers, whole, write_folder

KEY = "decoder.layers.self_attention.linear_proj.weight"
SIDE = 64


@pytest.mark.parametrize("folder", sorted((golden_root() / "mcore").glob("*/odd_dp2__td_full")), ids=str)
def test_main_parameters_that_do_not_round_to_the_weights_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FormatError, match=r"main parameters of 18 of 28 tensors do not round to the weights"):
        read(folder)
    metadata = read_metadata(next(folder.glob("iter_*")))
    weights = Checkpoint(
        path=folder,
        format="torch_dist",
        iteration=2,
        tensor=1,
        pipeline=1,
        index=read_index(metadata, read_common(metadata)),
    )
    for (role, name), array in expected(folder / "expected").items():
        if role == "param":
            assert library.Checkpoint(weights)[name].tobytes() == array.tobytes(), name
    assert main(["inspect", str(folder)]) == 65
    assert "several buckets of which one is padded" in capsys.readouterr().err


def folder_of(path: Path, weight: Array, main: Array) -> Path:
    states = {f"optimizer.state.{kind}.{KEY}": (main, whole(main)) for kind in ("param", "exp_avg", "exp_avg_sq")}
    return write_folder(path, {KEY: (weight, whole(weight)), **states})


def nearest(array: Array) -> Array:
    """float32 as the nearest bfloat16; no value of these tests is half way between two."""
    return ((array.view("<u4") + 0x8000) >> 16).astype("<u2")


@pytest.mark.parametrize("at", [0, 17, SAMPLE_NUMEL - 1, SIDE * SIDE // 2, SIDE * SIDE - 1])
def test_one_element_of_a_sample_is_enough(tmp_path: Path, at: int) -> None:
    main = of_layers(SIDE, SIDE)
    weight = nearest(main)
    assert read(folder_of(tmp_path / "good", weight, main)).index
    weight[1].reshape(-1)[at] ^= 1
    with pytest.raises(
        FormatError, match=r"of 1 of 3 tensors do not round to the weights, such as those of decoder\.layers\.1\."
    ):
        read(folder_of(tmp_path / "bad", weight, main))


def test_every_element_is_compared_on_request(tmp_path: Path) -> None:
    main = of_layers(SIDE, SIDE)
    weight = nearest(main)
    weight[2].reshape(-1)[SIDE * SIDE // 4] ^= 1
    index = read(folder_of(tmp_path / "x", weight, main)).index
    assert check_rounding(index, "x") == 3 * 3 * SAMPLE_NUMEL
    with pytest.raises(FormatError, match=r"of 1 of 3 tensors"):
        check_rounding(index, "x", every=True)


def test_a_nan_is_a_nan_whatever_its_bits(tmp_path: Path) -> None:
    main = of_layers(SIDE, SIDE)
    main[0, 0, 0] = np.nan
    weight = nearest(main)
    weight[0, 0, 0] = 0xFFC1
    assert read(folder_of(tmp_path / "x", weight, main)).index


def test_float32_weights_are_their_own(tmp_path: Path) -> None:
    array = of_layers(SIDE, SIDE)
    assert check_rounding(read(folder_of(tmp_path / "x", array, array + 1)).index, "x") == 0


def test_weights_without_an_optimizer_have_nothing_to_compare(tmp_path: Path) -> None:
    weight = as_bfloat16(of_layers(SIDE, SIDE))
    assert check_rounding(read(write_folder(tmp_path / "x", {KEY: (weight, whole(weight))})).index, "x") == 0
