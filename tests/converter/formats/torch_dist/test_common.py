"""What is no tensor: ``common.pt``, or the object of Megatron 0.19."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from archives import write_archive
from ckpt2pt.errors import FormatError, MissingInputError
from ckpt2pt.formats.megatron.scaler import stored_scaler
from ckpt2pt.formats.torch_dist.common import iteration_of_common, read_common, sharding_of
from ckpt2pt.formats.torch_dist.metadata import read_metadata
from ckpt2pt.formats.torchfile.pickles import write_pickle
from ckpt2pt.formats.torchfile.trees import namespace
from torchdist import of_layers, whole, write_folder

NORM = of_layers(4)
KEYS = {"decoder.layers.input_layernorm.weight": (NORM, whole(NORM))}


@pytest.mark.parametrize("as_object", [False, True])
def test_it_is_read_from_either_place(tmp_path: Path, as_object: bool) -> None:
    state: Any = {
        "args": namespace({"num_layers": 3}),
        "optimizer": {"optimizer": {"param_groups": [{"lr": 0.5}]}, "param_state_sharding_type": "fully_reshardable"},
        "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
    }
    folder = write_folder(tmp_path / "iter_0000009", KEYS, common=state, as_object=as_object)
    metadata = read_metadata(folder)
    common = read_common(metadata)
    assert common.args == {"num_layers": 3}
    assert common.groups == [{"lr": 0.5}]
    assert sharding_of(common, metadata) == "fully_reshardable"
    assert iteration_of_common(common, folder) == 3


def test_the_file_counts_where_both_are_there(tmp_path: Path) -> None:
    """As for Megatron-LM 0.19."""
    folder = write_folder(tmp_path / "x", KEYS, common={"iteration": 5}, as_object=True)
    write_archive(folder / "common.pt", "common", write_pickle({"iteration": 6}), [])
    assert iteration_of_common(read_common(read_metadata(folder)), folder) == 6


def test_the_folder_tells_the_iteration_where_nothing_else_does(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "iter_0000009", KEYS, common={"iteration": None})
    metadata = read_metadata(folder)
    common = read_common(metadata)
    assert iteration_of_common(common, folder) == 9
    assert iteration_of_common(common, tmp_path) is None
    assert sharding_of(common, metadata) is None


def test_a_missing_one_and_one_of_another_form_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", KEYS)
    write_archive(folder / "common.pt", "common", write_pickle([1]), [])
    with pytest.raises(FormatError, match="no dictionary with text keys"):
        read_common(read_metadata(folder))
    (folder / "common.pt").unlink()
    with pytest.raises(MissingInputError, match="there is no common"):
        read_common(read_metadata(folder))


def test_of_dp_reshardable_every_group_counts_once_and_one_loss_scale(tmp_path: Path) -> None:
    place = "optimizer.distributed.dp_group_idx_{}.{}/shard_0_1"
    scaler: Any = {"scale": 1024.0, "growth_tracker": 3, "hysteresis_tracker": 2}
    objects: Any = {place.format(rank, "grad_scaler"): scaler for rank in range(2)}
    objects |= {place.format(rank, "optimizer"): {"param_groups": [{"lr": 0.5}, {"lr": rank}]} for rank in range(2)}
    common = read_common(read_metadata(write_folder(tmp_path / "x", KEYS, objects=objects)))
    assert common.groups == [{"lr": 0.5}, {"lr": 0}, {"lr": 1}]
    assert stored_scaler(common) == scaler
