"""The older form: one file a rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ckpt2pt
from ckpt2pt.errors import MissingInputError, UnsupportedFormatError
from ckpt2pt.formats.mindformers.legacy import find_file, is_legacy
from ckpt2pt.formats.registry import detect, read
from mindformers_made import Model, write_safetensors


def save(root: Path, model: Model, *, rank: int = 0, epoch: int = 1, step: int = 2, **numbers: int) -> Path:
    folder = root / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"qwen3_rank_{rank}-{epoch}_{step}.safetensors"
    stated = {"epoch_num": epoch, "step_num": step, "global_batch_size": 8, **numbers}
    scalars = {name: np.asarray(value, "i8") for name, value in stated.items()}
    write_safetensors(
        path, scalars | {"global_step": np.asarray([numbers.get("global_step", step)], "i4")} | model.arrays
    )
    return path


def test_one_rank_is_read_with_its_moments(tmp_path: Path) -> None:
    model = Model(experts=4)
    save(tmp_path, model)
    assert is_legacy(tmp_path)
    assert detect(tmp_path) == "mindformers"
    flags = {"use_interleaved_weight_layout_mlp": True, "use_contiguous_weight_layout_attention": False}
    with ckpt2pt.open(tmp_path, **flags) as checkpoint:  # type: ignore[arg-type]
        for (role, name), wanted in model.expected.items():
            assert np.array_equal(checkpoint.get(name, role), wanted)  # type: ignore[arg-type]


def test_the_newest_counts_unless_another_is_asked_for(tmp_path: Path) -> None:
    model = Model(pynative=True)
    for step in (9, 10):
        save(tmp_path, model, step=step)
    newest = save(tmp_path, model, epoch=2, step=1, global_step=21)
    assert find_file(tmp_path, None)[0] == newest
    assert (read(tmp_path).iteration, read(tmp_path).samples) == (21, 168)
    assert read(tmp_path, iteration=9).iteration == 9
    with pytest.raises(MissingInputError, match="there is no iteration 7"):
        read(tmp_path, iteration=7)


def test_a_step_counts_in_its_epoch(tmp_path: Path) -> None:
    save(tmp_path, Model(pynative=True), epoch=2, step=1, global_step=0)
    assert read(tmp_path).iteration is None


def test_weights_alone_leave_the_optimizer(tmp_path: Path) -> None:
    save(tmp_path, Model(pynative=True))
    assert {key.role for key in read(tmp_path, weights_alone=True).index} == {"param"}


def test_files_of_several_ranks_are_refused_with_the_next_step(tmp_path: Path) -> None:
    for rank in (0, 1):
        save(tmp_path, Model(pynative=True), rank=rank)
    with pytest.raises(UnsupportedFormatError, match="strategy files") as caught:
        read(tmp_path)
    assert "use_legacy_format: False" in caught.value.hint


def test_other_folders_are_not_of_this_form(tmp_path: Path) -> None:
    assert not is_legacy(tmp_path)
    (tmp_path / "rank_0").mkdir()
    (tmp_path / "rank_0" / "network.safetensors").touch()
    assert not is_legacy(tmp_path)
