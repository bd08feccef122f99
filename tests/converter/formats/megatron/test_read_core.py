"""Checkpoints that Megatron-LM 0.8 to 0.19 wrote: ckpt2pt reads what the real models and optimizers held, and converts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.tensor import ROLES
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.megatron.headers import read_rank
from ckpt2pt.formats.ptmeta.capture import lay_out_rank
from ckpt2pt.formats.torchfile.trees import namespace, namespace_attrs
from coresets import ODD, core_sets, renamed, set_name
from mcore import expected
from results import edit_tree
from torchload import megatron_names

SETS = core_sets()
CARRIED = [folder for folder in SETS if not folder.name.startswith("qwen")]  # legacy models have no q and k layernorm
every_set = pytest.mark.parametrize("folder", SETS, ids=set_name)
every_legacy_set = pytest.mark.parametrize("folder", CARRIED, ids=set_name)
MOMENTS = ("--dist-opt-content", "param", "exp_avg", "exp_avg_sq")


def holds_what_megatron_held(path: Path, folder: Path, *roles: str) -> None:
    with ckpt2pt.open(path) as checkpoint:
        for key, array in expected(folder / "expected").items():
            if key.role in (roles or ROLES):
                found = checkpoint.get(key.name, key.role)
                assert found.shape == array.shape, key
                assert found.tobytes() == array.tobytes(), key


@every_set
def test_tensors_are_those_that_megatron_held(folder: Path) -> None:
    with ckpt2pt.open(folder) as checkpoint:
        names = {key.name for key in expected(folder / "expected")}
        for role in ROLES:
            assert set(checkpoint.keys(role)) == names
    holds_what_megatron_held(folder, folder)


@every_legacy_set
def test_an_import_holds_the_same(folder: Path, tmp_path: Path) -> None:
    uneven = ("--stage-list", "1", "3") if "uneven" in folder.name else ()
    assert main(["import", "--megatron-path", str(folder), "--ms-path", str(tmp_path / "ms"), *MOMENTS, *uneven]) == 0
    holds_what_megatron_held(tmp_path / "ms", folder, "main_param", "exp_avg", "exp_avg_sq")
    if (folder / "ms").is_dir():  # what MindSpeed-Core-MS would hold
        with ckpt2pt.open(tmp_path / "ms") as one, ckpt2pt.open(folder / "ms") as other:
            for role in ROLES:
                assert set(one.keys(role)) == set(other.keys(role))
                for name in one.keys(role):
                    assert one.get(name, role).tobytes() == other.get(name, role).tobytes()


@pytest.mark.parametrize("sizes", [(), ("--target-tp-size", "2"), ("--target-pp-size", "2", "--target-tp-size", "1")])
@every_legacy_set
def test_a_conversion_to_06_holds_the_same(folder: Path, sizes: tuple[str, ...], tmp_path: Path) -> None:
    target = tmp_path / "06"
    flags = ("--source", str(folder), "--source-format", "megatron", "--target", str(target), *sizes)
    assert main(["convert", *flags]) == 0
    holds_what_megatron_held(target, folder)
    (_, first), *_ = sorted((path.name, path) for path in target.glob("iter_*/mp_rank_*"))
    with megatron_names():
        tree = torch.load(first / "model_optim_rng.pt", weights_only=False)
    assert "language_model" in tree.get("model", tree.get("model0"))
    assert tree["optimizer"]["optimizer"]["param_groups"][0]["step"] == 2
    assert (
        tree["args"].consumed_train_samples
        == json.loads(next(folder.glob("expected/layout*")).read_text())["consumed_train_samples"]
    )
    assert "per_bucket_numel_unpadded" in torch.load(first / "distrib_optim.pt")


# ---------------------------------------------------------------------------------------------------------- other spellings


def test_names_of_the_layer_spec_of_transformer_engine_mean_the_same(tmp_path: Path) -> None:
    def fused(name: str) -> str:
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")

    holds_what_megatron_held(renamed(ODD, tmp_path / "copied", fused), ODD)


def test_legacy_names_of_a_coalesced_checkpoint_mean_the_same(tmp_path: Path) -> None:
    def legacy(name: str) -> str:
        from ckpt2pt.core.params import legacy_name

        return name if name.endswith("_extra_state") else legacy_name(name)

    holds_what_megatron_held(renamed(ODD, tmp_path / "copied", legacy), ODD)


# ----------------------------------------------------------------------------------------------------------- the buffers


def flat(buffers: Sequence[Sequence[Buffer]]) -> list[Buffer]:
    return [buffer for chunk in buffers for buffer in chunk]


@every_set
def test_buffers_are_those_of_the_run(folder: Path) -> None:
    for path in sorted(folder.glob("expected/layout_*.json")):
        described = json.loads(path.read_text())
        tp, pp, _ = described["tp_pp_ep"]
        place = next(
            place
            for name in (f"mp_rank_{tp:02d}", f"mp_rank_{tp:02d}_{pp:03d}")
            if (place := iteration_folder(folder) / name).is_dir()
        )
        rank = read_rank(place)
        layout = lay_out_rank(rank, pp, at_most=4)
        assert "offsets equal those of the weights" in layout.evidence
        for stored, made, buffer in zip(rank.buffers or (), flat(layout.buffers), described["buffers"], strict=True):
            assert stored[0].numel == made.numel == buffer["numel_unpadded"]
            before = {
                number: start - sum(row[2] for row in buffer["buckets"][:number])
                for number, (start, _, _) in enumerate(buffer["buckets"])
            }
            wanted = [(start - before[bucket], stop - before[bucket]) for _, start, stop, bucket in buffer["params"]]
            assert [(placed.start, placed.stop) for placed in made.placements] == wanted


def test_arguments_that_a_converter_left_out_are_not_needed(tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(ODD, copied)
    sizes = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
    )
    buckets = ("overlap_grad_reduce", "ddp_bucket_size", "data_parallel_size")  # where gaps are depends on these

    def change(tree: Any) -> None:
        args = namespace_attrs(tree["args"])
        tree["args"] = namespace({name: args[name] for name in (*sizes, *buckets, "consumed_train_samples")})

    edit_tree(next(copied.rglob("model_optim_rng.pt")), change)
    holds_what_megatron_held(copied, ODD)
    assert main(["import", "--megatron-path", str(copied), "--ms-path", str(tmp_path / "ms"), *MOMENTS]) == 0
    holds_what_megatron_held(tmp_path / "ms", ODD, "main_param", "exp_avg", "exp_avg_sq")
