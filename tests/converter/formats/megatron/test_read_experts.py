"""Mixtures of experts as Megatron-LM 0.8 to 0.19 save them: every expert under its global number; no conversion takes them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.tensor import ROLES
from ckpt2pt.errors import CoverageError, FormatError, InputError, MissingInputError
from coremade import HEAD, Tensors, global_tensors, save_experts, tied
from coresets import core_sets, set_name
from mcore import expected


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return global_tensors()


def holds(path: Path, tensors: Tensors) -> None:
    with ckpt2pt.open(path) as checkpoint:
        for role in ROLES:
            assert set(checkpoint.keys(role)) == {name for one, name in tensors if one == role}
        for (kind, name), values in tensors.items():
            found = checkpoint.get(name, kind)  # type: ignore[arg-type]
            assert found.shape == tuple(values.shape)
            assert found.tobytes() == values.float().numpy().tobytes(), (kind, name)


if SETS := core_sets(experts=True):

    @pytest.mark.parametrize("folder", SETS, ids=set_name)
    def test_tensors_are_those_that_megatron_held(folder: Path) -> None:
        wanted = expected(folder / "expected")
        with ckpt2pt.open(folder) as checkpoint:
            for role in ROLES:
                assert set(checkpoint.keys(role)) == {key.name for key in wanted}
            for key, array in wanted.items():
                assert checkpoint.get(key.name, key.role).tobytes() == array.tobytes(), key


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
@pytest.mark.parametrize(("experts", "stages", "chunks"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_experts_have_global_numbers(
    experts: int, stages: int, chunks: int, grouped: bool, tensors: Tensors, tmp_path: Path
) -> None:
    holds(save_experts(tmp_path, tensors, experts=experts, stages=stages, chunks=chunks, grouped=grouped), tensors)


def test_the_head_of_the_last_stage_is_a_copy_of_the_tied_embedding(tensors: Tensors, tmp_path: Path) -> None:
    same = tied(tensors)
    folder = save_experts(tmp_path, same, experts=2, stages=2, untied=False)
    holds(folder, {(role, name): values for (role, name), values in same.items() if name != HEAD})
    with ckpt2pt.open(folder) as checkpoint:
        assert (
            checkpoint.info("embedding.word_embeddings.weight").replicas == 3
        )  # of experts, of the last stage, and both


def test_two_layouts_are_compared_tensor_by_tensor(tensors: Tensors, tmp_path: Path) -> None:
    one = save_experts(tmp_path / "one", tensors, experts=1)
    other = save_experts(tmp_path / "other", tensors, experts=4, grouped=True)
    assert main(["verify", str(one), str(other)]) == 0
    changed = {key: value.clone() for key, value in tensors.items()}
    changed["exp_avg", "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"][5, 7] += 1
    assert main(["verify", str(one), str(save_experts(tmp_path / "changed", changed, experts=2))]) == 76


def test_copies_of_dense_parameters_are_compared(tensors: Tensors, tmp_path: Path) -> None:
    one = save_experts(tmp_path / "one", tensors, experts=1)
    other = save_experts(tmp_path / "other", tensors, experts=2)
    path = other / "iter_0000002" / "mp_rank_00_001" / "model_optim_rng.pt"
    tree = torch.load(path, weights_only=False)
    tree["model"]["decoder.layers.0.mlp.router.weight"] += 1
    torch.save(tree, path)
    assert main(["verify", str(one), str(other)]) == 76


@pytest.mark.parametrize("command", ["convert", "import", "plan", "pt-meta"])
@pytest.mark.parametrize("experts", [1, 2])
def test_mindspore_and_megatron_06_cannot_hold_them(
    command: str, experts: int, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = save_experts(tmp_path / "source", tensors, experts=experts), tmp_path / "target"
    flags = {
        "import": ["--megatron-path", str(source), "--ms-path", str(target)],
        "pt-meta": ["--megatron-path", str(source), "--param-map-path", str(target)],
    }.get(command, ["--source", str(source), "--source-format", "megatron", "--target", str(target)])
    assert main([command, *flags]) == 65
    assert "mixture of experts, which no result for MindSpore or Megatron-LM 0.6 holds" in capsys.readouterr().err
    assert not list(target.rglob("*.pt"))


def test_inspect_shows_expert_parallel_ranks(
    tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_experts(tmp_path, tensors, experts=2)
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"name +tp +pp +ep", shown)
    assert re.search(r"iter_0000002 +1 +1 +2", shown)


# ---------------------------------------------------------------------------------------------------------------- damage


def edit(path: Path, change: Any) -> None:
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)


def test_a_rank_of_experts_that_is_missing_is_named(tensors: Tensors, tmp_path: Path) -> None:
    folder = save_experts(tmp_path, tensors, experts=4)
    shutil.rmtree(folder / "iter_0000002" / "mp_rank_00_003")
    with pytest.raises(MissingInputError, match="tp 0 pp 0 ep 3 is missing"):
        ckpt2pt.open(folder)


def test_experts_of_one_rank_twice_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    """Both ranks hold the first two experts: their optimizers are those of other experts."""
    folder = save_experts(tmp_path, tensors, experts=2)
    shutil.copy(*(folder / "iter_0000002" / f"mp_rank_00_00{ep}" / "model_optim_rng.pt" for ep in (0, 1)))
    with pytest.raises(FormatError, match="not what the optimizer holds of it"):
        ckpt2pt.open(folder)


def test_ranks_with_different_numbers_of_experts_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    folder = save_experts(tmp_path, tensors, experts=2)
    shutil.rmtree(folder / "iter_0000002" / "mp_rank_00_001")
    shutil.copytree(
        save_experts(tmp_path / "other", tensors, experts=4) / "iter_0000002" / "mp_rank_00_003",
        folder / "iter_0000002" / "mp_rank_00_001",
    )
    with pytest.raises(InputError):
        ckpt2pt.open(folder)


def test_a_missing_state_of_experts_is_found(tensors: Tensors, tmp_path: Path) -> None:
    folder = save_experts(tmp_path, tensors, experts=2)
    (folder / "iter_0000002" / "mp_rank_00_001" / "distrib_optim.pt").unlink()
    with pytest.raises(CoverageError):
        ckpt2pt.open(folder)


def test_exchanged_experts_are_found(tensors: Tensors, tmp_path: Path) -> None:
    folder = save_experts(tmp_path, tensors, experts=2)

    def exchange(state: list[Any]) -> None:
        (kinds,) = state[1][0].values()
        kinds["param"] = kinds["param"].flip(0)

    edit(folder / "iter_0000002" / "mp_rank_00_000" / "distrib_optim.pt", exchange)
    with pytest.raises(FormatError, match="not what the optimizer holds of it"):
        ckpt2pt.open(folder)


@pytest.mark.parametrize(
    "name", ["decoder.layers.0.mlp.experts.weight1", "decoder.layers.0.mlp.local_experts.0.dense_h_to_4h.weight"]
)
def test_experts_in_forms_that_are_not_read_are_refused(name: str, tensors: Tensors, tmp_path: Path) -> None:
    folder = save_experts(tmp_path, tensors, experts=1)
    edit(
        folder / "iter_0000002" / "mp_rank_00" / "model_optim_rng.pt",
        lambda tree: tree["model"].update({name: torch.zeros(4, 4)}),
    )
    with pytest.raises(FormatError, match="in a form that ckpt2pt does not read"):
        ckpt2pt.open(folder)


def test_a_bias_that_balances_experts_has_no_optimizer(tensors: Tensors, tmp_path: Path) -> None:
    folder = save_experts(tmp_path, tensors, experts=2)
    for ep in (0, 1):
        edit(
            folder / "iter_0000002" / f"mp_rank_00_00{ep}" / "model_optim_rng.pt",
            lambda tree: tree["model"].update({"decoder.layers.0.mlp.router.expert_bias": torch.arange(4.0)}),
        )
    with ckpt2pt.open(folder) as checkpoint:
        assert checkpoint["decoder.layers.0.mlp.router.expert_bias"].tolist() == [0, 1, 2, 3]
        assert "decoder.layers.0.mlp.router.expert_bias" not in checkpoint.keys("exp_avg")
