"""Runs without the distributed optimizer: every tensor arrives, and an optimizer of another model is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt2pt.errors import Ckpt2ptError, FormatError, MissingInputError, aside
from ckpt2pt.formats.folders import iteration_folder
from ckpt2pt.formats.megatron.headers import rank_folders, read_rank
from ckpt2pt.formats.megatron.optimizer import groups_alone
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.verification.gather import Files
from ckpt2pt.verification.leaves import leaf_of
from conversions import topology_of
from goldens import golden_sets
from imports import import_request, run_all
from torchload import megatron_names
from undistributed import without_distributed_optimizer

SETS = golden_sets()


def imported(source: Path, target: Path, golden: Path, **more: Any) -> dict[str, dict[str, bytes]]:
    """File -> entry -> bytes of an import."""
    run_all(import_request(source=source, target=target, data=topology_of(golden).data, **more))
    found: dict[str, dict[str, bytes]] = {}
    with Files() as files:
        for path in sorted(target.glob("rank_*/*")):
            leaves = {name: leaf_of(ref) for name, ref in index_file(path).items()}
            found[str(path.relative_to(target))] = {
                name: leaf.elements.block(files, 0, leaf.numel).tobytes() for name, leaf in leaves.items()
            }
    return found


@pytest.mark.parametrize("verify", ["digest", "full"])
@pytest.mark.parametrize("folder", SETS, ids=lambda folder: folder.name)
def test_the_same_run_without_the_distributed_optimizer_imports_as_the_same_tensors(
    folder: Path, verify: str, tmp_path: Path
) -> None:
    without = without_distributed_optimizer(folder, tmp_path / "pt")
    assert b"_rebuild_from_type_v2" in next(without.rglob("model_optim_rng.pt")).read_bytes()
    one = imported(folder / "A", tmp_path / "one", folder)
    other = imported(without, tmp_path / "other", folder, verify=verify)
    assert one == other
    args = sorted((tmp_path / "other" / "pt_meta").glob("args_*.pt"))
    assert args
    assert not list((tmp_path / "other" / "pt_meta").glob("param_map*"))
    # The optimizer's tensors do not travel in pt_meta.
    assert all(path.stat().st_size < 1.2 * (tmp_path / "one/pt_meta" / path.name).stat().st_size for path in args)


def test_a_run_in_float32_has_its_weights_for_copies(tmp_path: Path) -> None:
    without = without_distributed_optimizer(SETS[0], tmp_path / "pt", fp32=True)
    assert imported(SETS[0] / "A", tmp_path / "one", SETS[0]) == imported(without, tmp_path / "other", SETS[0])


def test_a_copy_that_is_not_the_weight_is_refused(tmp_path: Path) -> None:
    def change(tree: dict[str, Any]) -> None:
        copies = tree["optimizer"]["fp32_from_fp16_params"]
        same = [
            (one, other)
            for group in copies
            for one in group
            for other in group
            if one is not other and one.shape == other.shape
        ]
        one, other = same[0]
        one.copy_(other + 1)

    place = changed(tmp_path, change)
    with pytest.raises(FormatError, match="is not what the optimizer holds of it"):
        imported(place, tmp_path / "ms", SETS[0])
    assert not list((tmp_path / "ms").rglob("*.ckpt"))


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint of one rank without the distributed optimizer, with its tree changed."""
    without = without_distributed_optimizer(SETS[0], tmp_path / "pt")
    path = next(without.rglob("model_optim_rng.pt"))
    with megatron_names():
        tree = torch.load(path, weights_only=False)
        change(tree)
        torch.save(tree, path)
    return without


def inner(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["optimizer"]["optimizer"]
    return found


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no-state": (lambda tree: inner(tree)["state"].clear(), "the state of .* is not a dictionary"),
    "state-is-a-list": (lambda tree: inner(tree).update(state=[]), "the optimizer's state is not a dictionary"),
    "no-groups": (lambda tree: inner(tree).pop("param_groups"), "a list of the optimizer is missing"),
    "group-is-a-number": (lambda tree: inner(tree).update(param_groups=[1]), "a group is not a dictionary"),
    "one-group-of-two": (lambda tree: inner(tree)["param_groups"].pop(), "no group is there for"),
    "groups-of-one-kind": (
        lambda tree: inner(tree)["param_groups"][1].update(wd_mult=1.0), "several groups with weight decay"
    ),
    "one-copy-less": (lambda tree: tree["optimizer"]["fp32_from_fp16_params"][0].pop(), "holds .* parameters"),
    "one-id-less": (lambda tree: inner(tree)["param_groups"][0]["params"].pop(), "holds .* parameters"),
    "groups-of-copies-less": (lambda tree: tree["optimizer"]["fp32_from_fp16_params"].pop(), "holds .* parameters"),
    "another-shape": (
        lambda tree: inner(tree)["state"][0].update(exp_avg=torch.zeros(3)), r"exp_avg of .* is float32\[3\]"
    ),
    "another-type": (
        lambda tree: inner(tree)["state"].update({0: {k: v.half() for k, v in inner(tree)["state"][0].items()}}),
        "is float16",
    ),
    "a-moment-less": (lambda tree: inner(tree)["state"][0].pop("exp_avg_sq"), "exp_avg_sq of .* is not a tensor"),
    "optimizer-is-none": (lambda tree: tree.update(optimizer=None), "the optimizer is not a dictionary"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "what"), WRONG.values(), ids=WRONG)
def test_an_optimizer_that_does_not_fit_is_refused_and_its_weights_can_be_had(
    change: Callable[[dict[str, Any]], object], what: str, tmp_path: Path
) -> None:
    place = changed(tmp_path, change)
    with pytest.raises(FormatError, match=what):
        imported(place, tmp_path / "ms", SETS[0])
    assert imported(place, tmp_path / "ms", SETS[0], full=False)


def test_a_run_saved_without_its_optimizer_is_distinguished(tmp_path: Path) -> None:
    place = changed(tmp_path, lambda tree: tree.pop("optimizer"))
    with pytest.raises(MissingInputError, match="holds no optimizer") as caught:
        imported(place, tmp_path / "ms", SETS[0])
    assert aside("mode") in caught.value.hint


def test_a_distributed_optimizer_without_its_file_is_missed(tmp_path: Path) -> None:
    place = changed(tmp_path, lambda tree: setattr(tree["args"], "use_distributed_optimizer", True))
    with pytest.raises(MissingInputError, match=r"distrib_optim\.pt is not there"):
        imported(place, tmp_path / "ms", SETS[0])


def test_copies_are_read_only_when_they_are_asked_for(tmp_path: Path) -> None:
    place = changed(tmp_path, lambda tree: inner(tree)["state"].clear())
    (folder,) = rank_folders(iteration_folder(place)).values()
    assert read_rank(folder).copies is None
    with pytest.raises(Ckpt2ptError):
        read_rank(folder, copies=True)


def test_groups_alone_are_what_the_distributed_optimizer_saves() -> None:
    group = {"wd_mult": 1.0, "step": 2}
    distributed: Any = {"optimizer": {"param_groups": [group]}, "grad_scaler": {"scale": 1.0}}
    whole: Any = {
        "optimizer": {"state": {0: {}}, "param_groups": [group | {"params": [0]}]},
        "grad_scaler": {"scale": 1.0},
        "fp32_from_fp16_params": [[]],
    }
    assert groups_alone(distributed) is distributed
    assert groups_alone(whole) == distributed
    assert groups_alone(whole["optimizer"]) == {"optimizer": {"param_groups": [group]}}
    assert groups_alone(None) is None
