"""Distributed checkpoints of Megatron-LM: every tensor element for element as the real optimizer held it, in any form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.tensor import ROLES
from ckpt2pt.errors import CoverageError, InputError, MissingInputError
from ckpt2pt.formats.checkpoint import Selection
from ckpt2pt.formats.registry import detect
from ckpt2pt.formats.torch_dist.items import Located, locate
from ckpt2pt.formats.torch_dist.metadata import Chunk
from ckpt2pt.formats.torch_dist.read import open_torch_dist
from ckpt2pt.formats.torchfile.trees import namespace
from goldens import golden_root
from mcore import expected
from torchdist import Piece, as_bfloat16, coarse, of_layers, whole, write_folder

MCORE = golden_root() / "mcore"
WRONG = "odd_dp2__td_full"

SETS = [one for one in sorted(MCORE.glob("*/*__*td_*")) if one.name != WRONG]
SAME = {"td_base": "llama_tp2pp2", "td_sup_llama": "llama_tp2pp2", "td_sup_moe": "moe_ep2"}
"""What the checkpoints that were written by hand were made from."""

LAYERS, ROWS, COLUMNS = 3, 8, 4


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: "-".join(folder.parts[-2:]))
def test_every_tensor_is_what_the_real_optimizer_held(folder: Path) -> None:
    truth = expected(folder / "expected")
    with ckpt2pt.open(folder) as checkpoint:
        assert (checkpoint.format, checkpoint.iteration) == ("torch_dist", 2)
        assert {(role, name) for role in ROLES for name in checkpoint.keys(role)} == set(truth)
        for (role, name), array in truth.items():
            found = checkpoint.get(name, role)
            assert found.shape == array.shape, name
            assert found.tobytes() == array.tobytes(), f"{role} {name}"


@pytest.mark.parametrize("folder", SETS, ids=lambda folder: "-".join(folder.parts[-2:]))
def test_what_is_described_reads_the_items_of_those_parameters_alone_that_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(folder: Path, chunks: Iterable[tuple[str, Chunk]]) -> Iterator[tuple[Chunk, Located]]:
        for chunk, found in locate(folder, chunks):
            read.append(chunk.item.file)
            yield chunk, found

    monkeypatch.setattr("ckpt2pt.formats.torch_dist.read.locate", counted)
    complete = open_torch_dist(folder, Selection())
    every = len(read)
    read.clear()
    described = open_torch_dist(folder, Selection(described=True))
    assert described.files == complete.files
    if described.locate is None:  # where parameters lie in buckets is proved by all of them
        assert folder.name.endswith("td_dp")
        assert described.index == complete.index
        return
    assert read == []
    bare = {key: tensor._replace(views=(), replicas=()) for key, tensor in complete.index.items()}
    assert list(described.index.items()) == list(bare.items())
    name = "decoder.layers.1.self_attention.linear_proj.weight"
    found = described.locate(described.index, {name})
    assert 0 < len(read) < every / 4
    assert found == {key: complete.index[key] if key.name == name else tensor for key, tensor in bare.items()}
    assert described.locate(described.index, None) == complete.index


@pytest.mark.parametrize("folder", sorted(MCORE.glob("handwritten/td_*")), ids=lambda folder: folder.name)
def test_what_was_written_by_hand_is_what_it_was_made_from(folder: Path) -> None:
    """One of them has each norm before experts under both of its names."""
    assert main(["verify", str(folder), str(MCORE / "0.19.0" / f"{SAME[folder.name]}__td_full")]) == 0


CUTS = {
    "all layers in one chunk": [Piece((0, 0, 0), (LAYERS, ROWS, COLUMNS))],
    "a chunk for each layer": [Piece((layer, 0, 0), (1, ROWS, COLUMNS)) for layer in range(LAYERS)],
    "columns in two files": [Piece((0, 0, column), (LAYERS, ROWS, 2), f"__{column}_0.distcp") for column in (0, 2)],
    "rows, unevenly, over gate and up": [
        Piece((layer, start, 0), (1, stop - start, COLUMNS))
        for layer in range(LAYERS)
        for start, stop in ((0, 3), (3, 7), (7, 8))
    ],
    "axes turned round": [Piece((0, 0, 0), (LAYERS, ROWS, COLUMNS), turned=True)],
}


@pytest.mark.parametrize("pieces", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("as_object", [False, True])
def test_chunks_of_any_shape_are_the_same_tensors(tmp_path: Path, pieces: list[Piece], as_object: bool) -> None:
    fc1, fc2 = of_layers(ROWS, COLUMNS), of_layers(COLUMNS, ROWS // 2, seed=1)
    keys = {
        "decoder.layers.mlp.linear_fc1.weight": (fc1, pieces),
        "decoder.layers.mlp.linear_fc2.weight": (fc2, whole(fc2)),
    }
    with ckpt2pt.open(write_folder(tmp_path / "iter_0000003", keys, as_object=as_object)) as checkpoint:
        assert checkpoint.info("decoder.layers.0.mlp.linear_fc1.weight").axes == (2, ROWS // 2, COLUMNS)
        for layer in range(LAYERS):
            name = f"decoder.layers.{layer}.mlp.linear_fc1.weight"
            np.testing.assert_array_equal(checkpoint[name], fc1[layer])
            np.testing.assert_array_equal(checkpoint.get(name, slice=np.s_[2:5, 1:3]), fc1[layer, 2:5, 1:3])


def test_flattened_states_are_what_they_were_before(tmp_path: Path) -> None:
    """Megatron 0.8 to 0.14: a cell of the grid is a rank's part, and a data-parallel rank holds a stretch of it."""
    shape, grid = (LAYERS, ROWS, COLUMNS), (LAYERS, 2, 2)
    weight = coarse(of_layers(ROWS, COLUMNS))
    cells = weight.reshape(LAYERS, 2, ROWS // 2, 2, COLUMNS // 2).transpose(0, 1, 3, 2, 4).reshape(*grid, -1)
    pieces = [
        Piece((*place, start), (1, 1, 1, stop - start), f"__{start}_0.distcp")
        for place in np.ndindex(*grid)
        for start, stop in ((0, 3), (3, cells.shape[-1]))
    ]
    key = "decoder.layers.self_attention.linear_proj.weight"
    states = {f"optimizer.state.{kind}.{key}": (cells, pieces) for kind in ("fp32_param", "exp_avg", "exp_avg_sq")}
    keys = {key: (as_bfloat16(weight), whole(weight)), **states}
    with ckpt2pt.open(write_folder(tmp_path / "x", keys, unflattened=dict.fromkeys(states, shape))) as checkpoint:
        for layer in range(LAYERS):
            for role in ROLES:
                name = f"decoder.layers.{layer}.self_attention.linear_proj.weight"
                np.testing.assert_array_equal(checkpoint.get(name, role), weight[layer])


@pytest.mark.parametrize("shape", [(LAYERS, ROWS, 5), (LAYERS, ROWS), (LAYERS, 7, COLUMNS)])
def test_a_flattened_state_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = of_layers(2, 1, 16)
    folder = write_folder(
        tmp_path / "x",
        {"decoder.layers.a.weight": (array, whole(array))},
        unflattened={"decoder.layers.a.weight": shape},
    )
    with pytest.raises(InputError, match="cannot be a flattened"):
        ckpt2pt.open(folder)


def test_layers_and_experts_of_their_own_keys_are_read(tmp_path: Path) -> None:
    experts = of_layers(4, ROWS, COLUMNS, layers=2)
    dense = of_layers(ROWS, COLUMNS)[0]
    keys = {
        "decoder.layers.mlp.experts.experts.linear_fc2.weight": (
            experts,
            [Piece((0, expert, 0, 0), (2, 2, ROWS, COLUMNS), f"__{expert}_0.distcp") for expert in (0, 2)],
        ),
        "decoder.layers.5.self_attention.linear_proj.weight": (dense, whole(dense)),
    }
    with ckpt2pt.open(write_folder(tmp_path / "x", keys)) as checkpoint:
        assert len(checkpoint) == 9
        np.testing.assert_array_equal(checkpoint["decoder.layers.5.self_attention.linear_proj.weight"], dense)
        found = checkpoint["decoder.layers.1.mlp.experts.local_experts.2.linear_fc2.weight"]
        np.testing.assert_array_equal(found, experts[1, 2])


def test_two_keys_of_one_parameter_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    norm = of_layers(COLUMNS)
    other = norm.copy()
    other[1, 2] += 1
    key, second = "decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    good = write_folder(tmp_path / "good", {key: (norm, whole(norm)), second: (norm, whole(norm))})
    bad = write_folder(tmp_path / "bad", {key: (norm, whole(norm)), second: (other, whole(other))})
    assert main(["verify", str(good), str(good)]) == 0
    assert main(["verify", str(good), str(bad)]) == 76
    assert "copy of param/decoder.layers.1.pre_mlp_layernorm.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([Piece((0, 0), (1, COLUMNS)), Piece((2, 0), (1, COLUMNS))], "hold 0 of 4 elements"),
        ([Piece((0, 0), (2, COLUMNS)), Piece((1, 0), (2, COLUMNS))], "hold 8 of 4 elements"),
        ([Piece((0, 0), (LAYERS, 2)), Piece((0, 1), (LAYERS, 2))], "hold 4 of 4 elements, some of them twice"),
        ([Piece((0, 0), (LAYERS, COLUMNS)), Piece((0, 0), (LAYERS, COLUMNS))], "claimed twice"),
    ],
)
def test_chunks_that_do_not_cover_a_tensor_once_are_refused(tmp_path: Path, pieces: list[Piece], error: str) -> None:
    norm = of_layers(COLUMNS)
    folder = write_folder(tmp_path / "x", {"decoder.layers.input_layernorm.weight": (norm, pieces)})
    with pytest.raises(CoverageError, match=error):
        ckpt2pt.open(folder)


def test_state_in_whole_objects_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    norm = of_layers(COLUMNS)
    keys = {"decoder.layers.input_layernorm.weight": (norm, whole(norm))}
    state: dict[str, Any] = {"optimizer.distributed.dp_group_idx_0.param_state/shard_0_1": {"buckets_coalesced": True}}
    folder = write_folder(tmp_path / "x", keys, objects=state)
    [warning] = ckpt2pt.open(folder).warnings
    assert "dp_zero_gather_scatter" in warning
    with pytest.raises(MissingInputError, match="dp_zero_gather_scatter"):
        ckpt2pt.convert(source=folder, target=tmp_path / "y")


def test_an_iteration_is_found_by_the_tracker_or_by_its_number(tmp_path: Path) -> None:
    norm = of_layers(COLUMNS)
    keys = {"decoder.layers.input_layernorm.weight": (norm, whole(norm))}
    for step in (2, 3):
        write_folder(tmp_path / f"iter_{step:07d}", keys, common={"iteration": step})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    assert detect(tmp_path) == "torch_dist"
    assert ckpt2pt.open(tmp_path).iteration == 2
    assert ckpt2pt.open(tmp_path, iteration=3).iteration == 3


def test_parallel_sizes_are_those_of_its_arguments(tmp_path: Path) -> None:
    norm = of_layers(COLUMNS)
    args: dict[str, Any] = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}
    keys = {"decoder.layers.input_layernorm.weight": (norm, whole(norm))}
    folder = write_folder(tmp_path / "x", keys, common={"args": namespace(args)})
    found = ckpt2pt.open(folder)
    assert (found.tp, found.pp) == (4, 2)
    with pytest.raises(InputError, match="the tensor parallel size is 4, not 2"):
        ckpt2pt.open(folder, tp=2)
