"""Checkpoints that Megatron-LM 0.8 to 0.19 wrote: ckpt2pt reads what the real models and optimizers held, and converts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.buckets import Buffer
from ckpt2pt.core.tensor import ROLES
from ckpt2pt.errors import Ckpt2ptError, InputError
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.megatron.headers import read_rank
from ckpt2pt.formats.megatron.release import optimizer_form, written_by
from ckpt2pt.formats.ptmeta.capture import lay_out_rank
from coresets import core_sets, set_name
from mcore import expected
from results import edit_tree
from torchload import megatron_names

SETS = core_sets()
CARRIED = [folder for folder in SETS if not folder.name.startswith("qwen")]  # legacy models have no q and k layernorm
every_set = pytest.mark.parametrize("folder", SETS, ids=set_name)
every_legacy_set = pytest.mark.parametrize("folder", CARRIED, ids=set_name)
ODD = next(folder for folder in SETS if folder.name == "odd_dp2")
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


def test_a_result_of_06_does_not_name_classes_of_a_newer_megatron(tmp_path: Path) -> None:
    assert main(["convert", "--source", str(ODD), "--source-format", "megatron", "--target", str(tmp_path / "06")]) == 0
    content = next(tmp_path.rglob("model_optim_rng.pt")).read_bytes()
    assert b"AttnBackend" not in content
    assert b"numpy._core" not in content


def test_a_model_with_q_and_k_layernorm_has_no_legacy_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, lambda name: name.replace("pre_mlp_layernorm", "self_attention.q_layernorm"))
    target = tmp_path / "target"
    assert main(["convert", "--source", str(folder), "--source-format", "megatron", "--target", str(target)]) == 65
    assert "Megatron-LM 0.6 has no decoder.layers.0.self_attention.q_layernorm.weight" in capsys.readouterr().err
    assert not list(target.rglob("*.pt"))


# ---------------------------------------------------------------------------------------------------------- other spellings


def checkpoint(folder: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a set with other names of parameters."""
    copied = folder / "copied"
    shutil.copytree(ODD, copied)

    def change(tree: Any) -> None:
        tree["model"].pairs = [(rename(name), value) for name, value in tree["model"].pairs]

    edit_tree(next(copied.rglob("model_optim_rng.pt")), change)
    return copied


def test_names_of_the_layer_spec_of_transformer_engine_mean_the_same(tmp_path: Path) -> None:
    def fused(name: str) -> str:
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")

    holds_what_megatron_held(checkpoint(tmp_path, fused), ODD)


def test_legacy_names_of_a_coalesced_checkpoint_mean_the_same(tmp_path: Path) -> None:
    def legacy(name: str) -> str:
        from ckpt2pt.core.params import legacy_name

        return name if name.endswith("_extra_state") else legacy_name(name)

    holds_what_megatron_held(checkpoint(tmp_path, legacy), ODD)


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


def test_the_release_is_told_by_the_arguments(tmp_path: Path) -> None:
    told = {folder.parent.name: written_by(read_rank(next(folder.glob("iter_*/mp_rank_00*")))) for folder in SETS}
    wanted = {
        "0.8.0": "0.7 to 0.8, by its arguments",
        "0.12.3": "0.12, by its arguments",
        "0.19.0": "0.19 or newer, by its arguments",
    }
    assert told == {release: wanted[release] for release in told}
    rank = read_rank(next(ODD.glob("iter_*/mp_rank_00")))
    assert optimizer_form(rank) == "coalesced buffers, as since 0.7"


def test_inspect_tells_release_and_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ODD)]) == 0
    shown = capsys.readouterr().out
    assert "Megatron-LM 0.19 or newer, by its arguments" in shown
    assert "coalesced buffers, as since 0.7" in shown
    assert "not by Megatron-LM 0.6" in shown


# ---------------------------------------------------------------------------------------------------------------- damage


def damaged(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a set with its buffer changed."""
    copied = folder / "copied"
    shutil.copytree(ODD, copied)
    path = next(copied.rglob("distrib_optim.pt"))
    state = torch.load(path)
    (kinds,) = state[0].values()
    change(kinds)
    torch.save(state, path)
    return copied


def swapped(tensor: torch.Tensor, one: int, other: int, numel: int) -> torch.Tensor:
    made = tensor.clone()
    made[one : one + numel], made[other : other + numel] = tensor[other : other + numel], tensor[one : one + numel]
    return made


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda kinds: kinds.update(numel_unpadded=10336), "exp_avg|param is float32 with 10400 elements"),
        (lambda kinds: kinds.pop("numel_unpadded"), "neither numel_unpadded"),
        (lambda kinds: kinds.update(numel_unpadded=torch.tensor(3.0)), "neither numel_unpadded"),
        (lambda kinds: kinds.pop("exp_avg"), "exp_avg is not a tensor"),
        (lambda kinds: kinds.update(param=kinds["param"].half()), "param is float16"),
        (lambda kinds: kinds.update({kind: kinds[kind][:10336] for kind in ("param", "exp_avg", "exp_avg_sq")}, numel_unpadded=10336), "holds 10336 elements, and the parameters of the model file make 10400"),
        (lambda kinds: kinds.update(param=swapped(kinds["param"], 0, 2048, 512)), "is not what the optimizer holds of it"),
        (lambda kinds: kinds.update(param=kinds["exp_avg"]), "is not what the optimizer holds of it"),
    ],
)  # fmt: skip
def test_a_damaged_optimizer_is_refused(change: Callable[[dict[str, Any]], object], what: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=what):
        ckpt2pt.open(damaged(tmp_path, change))


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"buckets_coalesced": True},
        [],
        [None],
        [{"buckets_coalesced": True}, None],
        "text",
        {0: 1},
        {0: {}},
        {1: {}},
        {0: {(1, 2): {}}},
        [[{}]],
    ],
)
def test_a_file_that_is_no_optimizer_is_refused(tree: Any, tmp_path: Path) -> None:
    copied = damaged(tmp_path, lambda _: None)
    torch.save(tree, next(copied.rglob("distrib_optim.pt")))
    with pytest.raises(InputError):
        ckpt2pt.open(copied)


@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_a_cut_or_changed_file_never_gives_a_wrong_tensor(name: str, tmp_path: Path) -> None:
    """Cut anywhere, or with any bytes of its directory or pickle changed: refused by an error of ours, or read as it was."""
    copied = damaged(tmp_path, lambda _: None)
    shutil.copy(next(ODD.rglob(name)), path := next(copied.rglob(name)))
    content, draw = path.read_bytes(), np.random.default_rng(5)
    pickled = content.index(b"data.pkl")
    for trial in range(60):
        made = bytearray(content)
        if trial % 3 == 0:
            made = made[: int(draw.integers(len(content)))]
        else:
            for place in (
                draw.integers(pickled, pickled + 4096, 3)
                if trial % 3 == 1
                else draw.integers(len(made) - 2048, len(made), 3)
            ):
                made[int(place)] = int(draw.integers(256))
        path.write_bytes(made)
        try:
            with ckpt2pt.open(copied) as checkpoint:
                for role in ROLES:
                    for key in checkpoint.keys(role):
                        checkpoint.get(key, role)
        except Ckpt2ptError:
            continue
