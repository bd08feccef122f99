"""The format of a folder is known by what is in it; what is none is refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.errors import FormatError, InputError, MissingInputError, UsageError
from ckpt2pt.formats.registry import detect, read


def touched(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["rank_0/network.ckpt"], "mindspore"),
        (["rank_0/meta.json", "rank_1/a.safetensors"], "mindspore"),
        (["iter_0000002/mp_rank_00/model_optim_rng.ckpt"], "mindspore"),
        (["mp_rank_00_001/model_optim_rng.pt"], "megatron"),
        (["iter_0000001/mp_rank_00/model_optim_rng.pt", "iter_0000002/mp_rank_00/model_optim_rng.pt"], "megatron"),
        (["release/mp_rank_00/model_optim_rng.pt"], "megatron"),
        (["__0_0.distcp"], "torch_dist"),
        (["iter_0000002/.metadata"], "torch_dist"),
    ],
)
def test_a_folder_is_known_by_its_files(tmp_path: Path, names: list[str], found: str) -> None:
    assert detect(touched(tmp_path, *names)) == found


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="neither a MindSpore training output") as caught:
        detect(touched(tmp_path, "readme.txt", "model/weights.ckpt"))
    assert caught.value.exit_code == 65


def test_nothing_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="there is no such folder") as caught:
        detect(tmp_path / "none")
    assert caught.value.where == str(tmp_path / "none")


def test_a_single_file_asks_for_its_folder(tmp_path: Path) -> None:
    file = touched(tmp_path, "rank_0/network.ckpt") / "rank_0" / "network.ckpt"
    with pytest.raises(InputError, match="a checkpoint is read with the files of all its ranks") as caught:
        read(file)
    assert "name the folder that holds the folders of the ranks" in caught.value.hint


def test_an_unknown_format_is_reported_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no format zarr") as caught:
        read(tmp_path, source_format="zarr")
    assert (
        caught.value.hint == "give auto or one of mindformers, mindspore, msadapter, megatron, torch_dist, huggingface"
    )


def test_a_format_that_is_given_is_not_detected(tmp_path: Path) -> None:
    touched(tmp_path, "rank_0/network.ckpt", "iter_0000002/mp_rank_00/model_optim_rng.pt")
    with pytest.raises(FormatError, match="the file is empty"):
        read(tmp_path, source_format="megatron")
