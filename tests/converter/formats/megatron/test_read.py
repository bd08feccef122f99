"""Megatron-LM's own files: real torch and the run's own param maps assemble the same tensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt2pt
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import FormatError, InputError, MissingInputError, TopologyError
from ckpt2pt.formats.registry import read
from conversions import topology_of
from handmade import EMBEDDING, Handmade, Parameter
from results import edit_tree
from torchload import megatron_names
from undistributed import without_distributed_optimizer

Arrays = dict[tuple[str, str], np.ndarray[Any, Any]]
CORE = {
    "language_model.embedding.": "embedding.", "language_model.output_layer": "output_layer",
    "language_model.encoder.final_norm": "decoder.final_layernorm", "input_norm": "input_layernorm",
    "self_attention.query_key_value": "self_attention.linear_qkv", "self_attention.dense": "self_attention.linear_proj",
    "post_attention_norm": "pre_mlp_layernorm", "mlp.dense_h_to_4h": "mlp.linear_fc1", "mlp.dense_4h_to_h": "mlp.linear_fc2",
}  # fmt: skip


def assembled(folder: Path) -> Arrays:
    """Every tensor of a golden set by torch.load, the run's own param maps, and numpy.concatenate."""
    cut = topology_of(folder)
    iteration = next(folder.glob("A/iter_*"))
    parts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for tp, pp in cut.ranks():
        place = iteration / cut.directory(tp, pp)
        with megatron_names():
            tree = torch.load(place / "model_optim_rng.pt", weights_only=False)
        optim = torch.load(place / "distrib_optim.pt")
        maps = sorted((folder / "A" / "param_map").glob(f"param_map_buffer0_dp0tp{tp}pp{pp}vpp*.json"))
        for number, (vpp, path) in enumerate(zip(cut.filled_chunks(pp), maps, strict=True)):
            (kinds,) = optim[number].values()
            flat = {kind: torch.cat(kinds[kind]) for kind in ("param", "exp_avg", "exp_avg_sq")}
            weights = dict(flattened(tree[cut.model_key(vpp)]))
            for name, (_, shape, start, stop, _) in json.loads(path.read_text()).items():
                name = name.removeprefix("module.")
                key = core_name(name, cut, pp, vpp)
                saved = "word_embeddings_for_head.weight" if name == "word_embeddings.weight" else name
                parts.setdefault(("param", key), {}).setdefault(tp, weights[saved])
                for kind, values in flat.items():
                    role = "main_param" if kind == "param" else kind
                    parts.setdefault((role, key), {}).setdefault(tp, values[start:stop].reshape(shape))
    return {key: joined(key[1], [ranks[tp] for tp in sorted(ranks)]) for key, ranks in parts.items()}


def flattened(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            found += flattened(value, name)
        elif isinstance(value, torch.Tensor):
            found.append((name, value))
    return found


def core_name(name: str, cut: Topology, pp: int, vpp: int) -> str:
    if name == "word_embeddings.weight":
        return "embedding.word_embeddings.weight"
    if layer := re.match(r"language_model\.encoder\.layers\.(\d+)\.", name):
        number = cut.slots(pp, vpp)[int(layer[1])]
        name = f"decoder.layers.{number}." + name[layer.end() :]
    for legacy, core in CORE.items():
        name = name.replace(legacy, core)
    return name


def joined(name: str, parts: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    """As Megatron's layers were cut; numpy has no bfloat16, so weights are compared as float32."""
    arrays: list[np.ndarray[Any, Any]] = [part.float().numpy() for part in parts]
    if "norm" in name or "position" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
        return arrays[0]
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return np.concatenate(arrays, 1)
    if "linear_fc1" in name:
        halves = [np.split(array, 2) for array in arrays]
        return np.concatenate([half[at] for at in (0, 1) for half in halves])
    return np.concatenate(arrays)


def test_tensors_are_what_torch_and_numpy_make_of_the_files(golden_set: Path) -> None:
    wanted = assembled(golden_set)
    with ckpt2pt.open(golden_set / "A") as checkpoint:
        cut = topology_of(golden_set)
        assert (checkpoint.tp, checkpoint.pp, checkpoint.format) == (cut.tensor, cut.pipeline, "megatron")
        assert {("param", name) for name in checkpoint} == {key for key in wanted if key[0] == "param"}
        for (role, name), array in wanted.items():
            found = checkpoint.get(name, role)  # type: ignore[arg-type]
            assert found.shape == array.shape, name
            assert found.tobytes() == array.tobytes(), (role, name)


def test_a_run_without_the_distributed_optimizer_holds_the_same(golden_set: Path, tmp_path: Path) -> None:
    with (
        ckpt2pt.open(without_distributed_optimizer(golden_set, tmp_path)) as one,
        ckpt2pt.open(golden_set / "A") as other,
    ):
        for role in ("param", "main_param", "exp_avg", "exp_avg_sq"):
            assert set(one.keys(role)) == set(other.keys(role))
            for name in one.keys(role):
                assert one.get(name, role).tobytes() == other.get(name, role).tobytes(), (role, name)


def test_a_run_in_float32_has_no_main_parameters_of_its_own(golden: Path, tmp_path: Path) -> None:
    folder = golden / "megatron06" / "a2_tp1pp1_tied_bias"
    with (
        ckpt2pt.open(without_distributed_optimizer(folder, tmp_path, fp32=True)) as one,
        ckpt2pt.open(folder / "A") as other,
    ):
        for name in other:
            assert one.info(name).dtype == "float32"
            assert one[name].tobytes() == other.get(name, "main_param").tobytes()


# ------------------------------------------------------------------------------------------------- layouts and damage

UNEVEN = {
    "uneven": Topology(num_layers=5, pipeline=3, layers_per_stage=(1, 3, 1)),
    "uneven-chunks": Topology(num_layers=7, pipeline=2, virtual=2, layers_per_stage=(1, 3, 2, 1)),
    "stage-without-layers": Topology(num_layers=2, pipeline=2, layers_per_stage=(0, 2)),
    "even-with-noop": Topology(num_layers=8, pipeline=2, virtual=2, noop=frozenset({2, 3, 6, 7})),
    "noop-in-the-middle": Topology(num_layers=12, pipeline=2, virtual=2, noop=frozenset({1, 7})),
}


@pytest.mark.parametrize("cut", UNEVEN.values(), ids=list(UNEVEN))
def test_layers_have_their_global_numbers(tmp_path: Path, cut: Topology) -> None:
    made = Handmade(topology=cut)
    outcome = made.convert(tmp_path)
    with ckpt2pt.open(outcome.target.root) as checkpoint:
        layers = {int(name.split(".")[2]) for name in checkpoint if name.startswith("decoder.layers.")}
        assert layers == set(range(cut.num_layers)) - cut.noop
        for pp in range(cut.pipeline):
            for vpp in range(cut.virtual):
                for each in made.parameters(pp, vpp):
                    name = core_name(each.megatron, cut, pp, vpp)
                    assert np.array_equal(
                        checkpoint.get(name, "exp_avg"), made.truth[0, pp, "exp_avg", f"{vpp}:{each.megatron}"]
                    )


def test_uneven_stages_with_no_op_layers_are_refused(tmp_path: Path) -> None:
    cut = Topology(num_layers=6, pipeline=2, layers_per_stage=(4, 2), noop=frozenset({5}))
    outcome = Handmade(topology=cut).convert(tmp_path)
    with pytest.raises(TopologyError, match="of 6 layers by the arguments, the 2 model chunks hold 4, 1"):
        read(outcome.target.root)


def copy(golden: Path, name: str, target: Path) -> Path:
    shutil.copytree(golden / "megatron06" / name / "A", target)
    return next(target.glob("iter_*"))


def test_an_iteration_is_chosen_by_its_number(golden: Path, tmp_path: Path) -> None:
    copy(golden, "b_tp2pp2", tmp_path / "A")
    assert read(tmp_path / "A", iteration=2).iteration == 2
    (tmp_path / "A" / "latest_checkpointed_iteration.txt").write_text("9")
    assert read(tmp_path / "A", iteration=2).iteration == 2
    with pytest.raises(MissingInputError, match="there is no iteration 9"):
        read(tmp_path / "A", iteration=9)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "error", "what"),
    [
        ("mp_rank_01_000", MissingInputError, "1 of 4 ranks are missing: tp 1 pp 0"),
        ("mp_rank_0?_001", MissingInputError, "pipeline_model_parallel_size 2, and there are folders for 1"),
        ("mp_rank_01_00?", MissingInputError, "tensor_model_parallel_size 2, and there are folders for 1"),
        (
            "mp_rank_00_001/distrib_optim.pt",
            MissingInputError,
            "distrib_optim.pt is not there, and other ranks have one",
        ),
        ("mp_rank_00_001/model_optim_rng.pt", MissingInputError, "not there"),
    ],
)
def test_what_is_missing_is_named(golden: Path, tmp_path: Path, name: str, error: type[Exception], what: str) -> None:
    folder = copy(golden, "b_tp2pp2", tmp_path / "A")
    for path in list(folder.glob(name)):
        remove(path)
    with pytest.raises(error, match=what):
        read(tmp_path / "A")


def change_iteration(tree: dict[Any, Any]) -> None:
    tree["iteration"] = 3


def set_strange_iteration(tree: dict[Any, Any]) -> None:
    tree["iteration"] = [2]


def drop_iteration(tree: dict[Any, Any]) -> None:
    del tree["iteration"]


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (change_iteration, "4 of 4 ranks state an iteration: 2, 3"),
        (drop_iteration, "3 of 4 ranks state an iteration: 2"),
        (set_strange_iteration, "3 of 4 ranks"),
    ],
)
def test_ranks_of_different_saves_are_refused(
    golden: Path, tmp_path: Path, edit: Callable[[dict[Any, Any]], None], what: str
) -> None:
    folder = copy(golden, "b_tp2pp2", tmp_path / "A")
    edit_tree(folder / "mp_rank_01_001" / "model_optim_rng.pt", edit)
    with pytest.raises(FormatError, match=what):
        read(tmp_path / "A")


def test_a_rank_of_another_model_is_refused(golden: Path, tmp_path: Path) -> None:
    folder = copy(golden, "b_tp2pp2", tmp_path / "A")
    other = copy(golden, "e_tp1pp2vpp2_noop_tail", tmp_path / "C")
    for name in ("model_optim_rng.pt", "distrib_optim.pt"):
        shutil.copy(other / "mp_rank_00_001" / name, folder / "mp_rank_01_001" / name)
    with pytest.raises(InputError, match="the rank holds 2 model chunks, and mp_rank_00_000 holds 1"):
        read(tmp_path / "A")


class Tied(Handmade):
    """Shared embeddings have a bucket of their own (Megatron-LM cac60ce4, core/distributed/param_and_grad_buffer.py)."""

    def buckets(self, pp: int, vpp: int) -> list[list[tuple[Parameter, int, int]]]:
        alone = {EMBEDDING, "word_embeddings.weight"}
        return [
            list(group)
            for bucket in super().buckets(pp, vpp)
            for _, group in groupby(bucket, key=lambda placed: placed[0].megatron in alone)
        ]


def test_tied_embeddings_of_two_stages_are_one_tensor_with_a_copy(tmp_path: Path) -> None:
    made = Tied(topology=Topology(num_layers=4, pipeline=2), tied=True)
    for role in ("", "exp_avg.", "exp_avg_sq."):
        first = made.entries[0, 0][f"{role}language_model.embedding.word_embeddings.weight"]
        made.entries[0, 1][f"{role}language_model.output_layer.weight"] = type(first)(
            f"{role}language_model.output_layer.weight", first.dtype, first.shape, first.data
        )
    with ckpt2pt.open(made.convert(tmp_path).target.root) as checkpoint:
        assert "output_layer.weight" not in checkpoint
        assert checkpoint.info("embedding.word_embeddings.weight", "exp_avg").replicas == 1
