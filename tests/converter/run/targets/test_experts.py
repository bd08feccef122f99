"""Mixtures of experts at other layouts: every rank's files are those that a run of that layout would have written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.tensor import Key
from ckpt2pt.core.topology import Topology
from ckpt2pt.formats.registry import read
from ckpt2pt.run.targets.mcore import conversion_of
from ckpt2pt.run.targets.request import McoreRequest
from ckpt2pt.verification.across import compare_any
from ckpt2pt.verification.gather import Files, gathered
from coremade import Tensors, global_tensors, save_experts
from coresets import core_sets, set_name
from mcore import expected

QUIET = ("--progress", "none", "--multiprocess-off")
BIAS = "mlp.router.expert_bias"


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return global_tensors()


def convert(source: Path, target: Path, form: str, *words: object) -> int:
    flags = ["--source", source, "--target", target, "--target-format", form, *words, *QUIET]
    return main(["convert", *map(str, flags)])


def files(target: Path) -> dict[str, Any]:
    """Every file of every rank, as torch loads it."""
    [iteration] = target.glob("iter_*")
    return {
        str(path.relative_to(iteration)): torch.load(path, weights_only=False)
        for path in sorted(iteration.glob("mp_rank_*/*.pt"))
    }


def alike(one: Any, other: Any) -> bool:
    """The same keys in the same order, and the same elements."""
    if isinstance(one, torch.Tensor):
        return bool(one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


SIZES = [(1, 1, 1, 1), (1, 1, 1, 2), (2, 1, 1, 1), (4, 1, 1, 2), (2, 2, 1, 4), (4, 2, 1, 2), (2, 1, 2, 1)]


@pytest.mark.parametrize(("experts", "stages", "chunks", "saved"), SIZES)
def test_files_are_those_of_a_run_of_that_layout(
    experts: int, stages: int, chunks: int, saved: int, tensors: Tensors, tmp_path: Path
) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=saved)
    wanted = files(save_experts(tmp_path / "wanted", tensors, experts=experts, stages=stages, chunks=chunks))
    sizes = ("--target-ep-size", experts, "--target-pp-size", stages, "--target-vpp-size", chunks)
    assert convert(source, tmp_path / "out", "megatron", *sizes, "--verify", "full") == 0
    made = files(tmp_path / "out")
    assert made.keys() == wanted.keys()
    for name, tree in wanted.items():
        if name.endswith("distrib_optim.pt"):
            assert alike(made[name], tree), name
            continue
        assert all(alike(made[name][key], tree[key]) for key in tree if key.startswith("model")), name
        optimizers = made[name]["optimizer"] if experts > 1 else [made[name]["optimizer"]]
        own = tree["optimizer"] if experts > 1 else [tree["optimizer"]]
        for one, other in zip(optimizers, own, strict=True):
            pairs = zip(
                sorted(one["optimizer"]["param_groups"], key=lambda group: -group["wd_mult"]),
                other["optimizer"]["param_groups"],
                strict=True,
            )
            assert all(alike(known[key], value) for known, group in pairs for key, value in group.items()), name


@pytest.mark.parametrize("experts", [1, 4])
def test_torch_dist_says_how_many_optimizers_its_run_has(experts: int, tensors: Tensors, tmp_path: Path) -> None:
    source, out = save_experts(tmp_path / "source", tensors, experts=2), tmp_path / "out"
    assert convert(source, out, "torch_dist", "--target-ep-size", experts, "--verify", "full") == 0
    assert compare_any([source, out]).same
    common: Any = torch.load(out / "iter_0000002" / "common.pt", weights_only=False)
    states = [*common["optimizer"].values()] if experts > 1 else [common["optimizer"]]
    flags = [{group["is_expert_parallel"] for group in one["optimizer"]["param_groups"]} for one in states]
    assert flags == [{False}, {True}][: len(states)]
    assert len(states) == (2 if experts > 1 else 1)
    assert main(["verify", str(out)]) == 0


def test_there_and_back_by_torch_dist(tensors: Tensors, tmp_path: Path) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=2, stages=2)
    assert convert(source, tmp_path / "dist", "torch_dist") == 0
    assert convert(tmp_path / "dist", tmp_path / "out", "megatron") == 0
    wanted, made = files(source), files(tmp_path / "out")
    for name in wanted:
        whole = name.endswith("distrib_optim.pt")
        assert alike(made[name] if whole else made[name]["model"], wanted[name] if whole else wanted[name]["model"])


@pytest.mark.parametrize("form", ["megatron", "torch_dist"])
def test_the_bias_of_a_router_stays_float32_and_has_no_moments(form: str, tensors: Tensors, tmp_path: Path) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=2)
    for path in source.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        tree = torch.load(path, weights_only=False)
        model = dict(tree["model"])
        for layer in range(2):
            model[f"decoder.layers.{layer}.{BIAS}"] = torch.arange(4.0) / 3
        torch.save(tree | {"model": model}, path)
    out = tmp_path / "out"
    assert convert(source, out, form, "--target-ep-size", 4, "--verify", "full") == 0
    with ckpt2pt.open(out) as checkpoint:
        name = f"decoder.layers.1.{BIAS}"
        assert checkpoint.info(name).dtype == "float32"
        assert np.array_equal(checkpoint[name], np.arange(4, dtype="<f4") / np.float32(3))
        assert name not in checkpoint.keys("exp_avg")
    assert compare_any([source, out]).same


def test_a_stage_without_experts_has_an_optimizer_less_up_to_0_12(tensors: Tensors, tmp_path: Path) -> None:
    source = dense_first(save_experts(tmp_path / "source", tensors, experts=1))
    sizes = ("--target-ep-size", 2, "--target-pp-size", 2, "--verify", "full")
    assert convert(source, tmp_path / "new", "megatron", *sizes) == 0
    assert convert(source, tmp_path / "old", "megatron", *sizes, "--megatron-version", "0.12") == 0
    new, old = files(tmp_path / "new"), files(tmp_path / "old")
    assert new["mp_rank_00_000_001/distrib_optim.pt"] == [None, {"buckets_coalesced": True}]
    assert "mp_rank_00_000_001/distrib_optim.pt" not in old
    assert isinstance(old["mp_rank_00_000_000/distrib_optim.pt"], dict)
    assert isinstance(old["mp_rank_00_000_000/model_optim_rng.pt"]["optimizer"], dict)
    assert alike(old["mp_rank_00_001_001/distrib_optim.pt"], new["mp_rank_00_001_001/distrib_optim.pt"])
    for name in ("new", "old"):
        assert compare_any([source, tmp_path / name]).same
        assert main(["verify", str(tmp_path / name)]) == 0
    assert convert(tmp_path / "old", tmp_path / "again", "megatron", "--target-ep-size", 1, "--target-pp-size", 1) == 0
    assert compare_any([tmp_path / "old", tmp_path / "again"]).same


def dense_first(source: Path) -> Path:
    """The same with a single MLP, that of its shared experts, in the first layer."""
    [folder] = source.glob("iter_*/mp_rank_00")
    tree = torch.load(folder / "model_optim_rng.pt", weights_only=False)
    kept: dict[str, torch.Tensor] = {}
    for name, value in tree["model"].items():
        first = name.startswith("decoder.layers.0.mlp.")
        if not first or ".shared_experts." in name:
            kept[name.replace(".shared_experts.", ".") if first else name] = value
    torch.save(tree | {"model": kept}, folder / "model_optim_rng.pt")
    flat = {
        kind: torch.cat([value.float().flatten() for value in reversed(kept.values())])
        for kind in ("param", "exp_avg", "exp_avg_sq")
    }
    state = {(torch.bfloat16, torch.float32): {**flat, "numel_unpadded": flat["param"].numel()}}
    torch.save({"buckets_coalesced": True, 0: state}, folder / "distrib_optim.pt")
    return source


@pytest.mark.parametrize(
    ("form", "words", "code", "said"),
    [
        pytest.param("megatron", ("--target-ep-size", 3), 65, "4 experts are in a layer", id="indivisible"),
        pytest.param("torch_dist", ("--target-ep-size", 8), 65, "4 experts are in a layer", id="more than experts"),
        pytest.param("megatron", ("--target-ep-size", 2, "--target-dp-size", 3), 64, "does not divide", id="data"),
        pytest.param("megatron", ("--names", "legacy"), 64, "legacy models", id="legacy"),
        pytest.param("megatron06", ("--target-ep-size", 2), 64, "decides nothing of a result", id="0.6"),
        pytest.param("mindspore", ("--target-ep-size", 2), 64, "decides nothing of a result", id="mindspore"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    form: str, words: tuple[object, ...], code: int, said: str, tensors: Tensors, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = save_experts(tmp_path / "source", tensors, experts=2)
    assert convert(source, tmp_path / "out", form, *words) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.pt"))


def cut_otherwise(path: Path, tensor: int, own: int) -> None:
    """Have the arguments of a file say that experts are cut over ``own`` ranks, and the rest over ``tensor``."""
    tree = torch.load(path, weights_only=False)
    tree["args"].tensor_model_parallel_size, tree["args"].expert_tensor_parallel_size = tensor, own
    torch.save(tree, path)


@pytest.mark.parametrize("weights_alone", [False, True])
def test_experts_that_are_cut_otherwise_are_not_read_as_if_they_were_not(
    weights_alone: bool, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=2)
    for path in source.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        cut_otherwise(path, 1, 2)
        if weights_alone:
            (path.parent / "distrib_optim.pt").unlink()
    words = ["--convert-param-only"] if weights_alone else []
    assert convert(source, tmp_path / "out", "torch_dist", *words) == 65
    assert "experts are cut over 2 tensor-parallel ranks, and the dense parameters over 1" in capsys.readouterr().err


def test_a_source_whose_experts_are_cut_otherwise_becomes_one_where_they_are_not(
    tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=2)
    assert convert(source, tmp_path / "dist", "torch_dist") == 0
    [common] = (tmp_path / "dist").glob("iter_*/common.pt")
    cut_otherwise(common, 2, 1)
    assert convert(tmp_path / "dist", tmp_path / "out", "megatron", "--target-tp-size", 4) == 65
    assert "expert_tensor_parallel_size is 1 and the tensor parallel size of the result 4" in capsys.readouterr().err
    assert convert(tmp_path / "dist", tmp_path / "out", "megatron", "--target-tp-size", 1) == 0
    assert compare_any([tmp_path / "dist", tmp_path / "out"]).same


def test_a_plan_says_where_experts_go(tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=1)
    flags = ("--source", source, "--target", tmp_path / "out", "--target-format", "megatron", "--target-ep-size", 2)
    assert main(["plan", *map(str, flags), "--details"]) == 0
    shown = capsys.readouterr().out
    assert "mp_rank_00_000/model_optim_rng.pt" in shown
    assert "mp_rank_00_001/distrib_optim.pt" in shown
    assert "ep 2" in shown
    assert not (tmp_path / "out").exists()


def test_a_killed_run_goes_on(tensors: Tensors, tmp_path: Path) -> None:
    source, out = save_experts(tmp_path / "source", tensors, experts=1), tmp_path / "out"
    assert convert(source, out, "megatron", "--target-ep-size", 2, "--target-pp-size", 2, "--stage", 1) == 0
    assert not (out / "latest_checkpointed_iteration.txt").exists()
    assert convert(source, out, "megatron", "--target-ep-size", 2, "--target-pp-size", 2) == 0
    assert compare_any([source, out]).same


def inputs_of_stage(target: Path) -> list[str]:
    [stage] = target.glob("iter_*/.ckpt2pt/stage-000.json")
    return [str(one["source"]) for one in json.loads(stage.read_text())["inputs"]]


def test_a_stage_lists_each_file_of_the_source_once_however_many_ranks_it_has(tensors: Tensors, tmp_path: Path) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=4)
    assert convert(source, tmp_path / "out", "megatron", "--target-ep-size", 4) == 0
    listed = inputs_of_stage(tmp_path / "out")
    assert sorted(listed) == sorted(
        path.relative_to(source / "iter_0000002").as_posix() for path in source.glob("iter_*/*/*.pt")
    )


def test_a_rank_reads_the_files_of_its_own_experts_and_one_of_them_compares_the_others(
    tensors: Tensors, tmp_path: Path
) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=4)
    request = McoreRequest(
        topology=Topology(num_layers=1), source=source, target=tmp_path / "out", source_format="megatron"
    )
    inputs = conversion_of(request, [0]).inputs
    folders = {rank: {str(one["source"]).partition("/")[0] for one in held} for rank, held in inputs.items()}
    assert folders[0, 0] == {f"mp_rank_00_{ep:03d}" for ep in range(4)}
    # Dense parameters are those of the first experts' rank.
    assert all(folders[ep, 0] == {"mp_rank_00_000", f"mp_rank_00_{ep:03d}"} for ep in range(1, 4))


@pytest.mark.parametrize("form", ["megatron", "torch_dist"])
def test_a_worker_reads_the_headers_of_its_own_stages_alone(form: str, tensors: Tensors, tmp_path: Path) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=2, stages=2)
    (source / "iter_0000002/mp_rank_00_001_001/model_optim_rng.pt").write_bytes(b"nothing")
    assert convert(source, tmp_path / "out", form, "--target-pp-size", 2, "--stage", 0) == 0
    assert convert(source, tmp_path / "out", form, "--target-pp-size", 2, "--stage", 1) == 65
    assert convert(source, tmp_path / "all", form, "--target-pp-size", 2) == 65


def test_results_of_workers_are_those_of_one_that_does_all_stages(tensors: Tensors, tmp_path: Path) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=2, stages=2)
    sizes = ("--target-pp-size", 2, "--target-ep-size", 4)
    assert convert(source, tmp_path / "one", "megatron", *sizes) == 0
    for stage in range(2):
        assert convert(source, tmp_path / "each", "megatron", *sizes, "--stage", stage) == 0
    one, each = (
        {path.name + path.parent.name: path.read_bytes() for path in (tmp_path / name).rglob("*.pt")}
        for name in ("one", "each")
    )
    assert one == each
    assert len(one) == 16


def test_a_rank_of_other_experts_that_holds_fewer_is_refused(
    tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=2)
    fewer = {name: value for name, value in tensors.items() if ".local_experts.3." not in str(name)}
    save_experts(tmp_path / "other", fewer, experts=2)
    for name in ("model_optim_rng.pt", "distrib_optim.pt"):
        (tmp_path / f"other/iter_0000002/mp_rank_00_001/{name}").replace(source / f"iter_0000002/mp_rank_00_001/{name}")
    assert convert(source, tmp_path / "out", "megatron") == 65
    assert "is missing, as the ranks of experts differ from the first one" in capsys.readouterr().err


KILLING = """
import os, signal
from pathlib import Path
FLAG, NAME = Path({flag!r}), {name!r}

def killing(published):
    def publish(source, target, **more):
        if str(target).endswith(NAME) and not FLAG.exists():
            FLAG.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return published(source, target, **more)
    return publish

os.rename, os.replace, os.link = map(killing, (os.rename, os.replace, os.link))
"""
"""``sitecustomize``: whichever process is about to give a file of this name its name is killed, once."""


def killed_once(tmp_path: Path, name: str) -> dict[str, str]:
    """The environment in which a process is killed before it publishes the file ``name``."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(KILLING.format(flag=str(tmp_path / "killed"), name=name))
    return {**os.environ, "PYTHONPATH": str(site)}


def bytes_below(target: Path) -> dict[str, bytes]:
    """Every file that Megatron-LM reads."""
    found = sorted(path for path in target.rglob("*") if path.is_file() and ".ckpt2pt" not in path.parts)
    return {str(path.relative_to(target)): path.read_bytes() for path in found}


LAST = {"megatron": "mp_rank_00_001_001/distrib_optim.pt", "torch_dist": "__1_0.distcp"}


@pytest.mark.parametrize("form", LAST)
def test_a_run_that_is_killed_while_it_publishes_experts_goes_on(form: str, tensors: Tensors, tmp_path: Path) -> None:
    source, out = save_experts(tmp_path / "source", tensors, experts=1), tmp_path / "out"
    sizes = ("--target-ep-size", 2, "--target-pp-size", 2)
    assert convert(source, tmp_path / "whole", form, *sizes) == 0
    words = ["convert", "--source", source, "--target", out, "--target-format", form, *sizes, *QUIET]
    program = [sys.executable, "-m", "ckpt2pt", *map(str, words)]
    done = subprocess.run(program, env=killed_once(tmp_path, LAST[form]), capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "latest_checkpointed_iteration.txt").exists()
    assert convert(source, out, form, *sizes) == 0
    assert bytes_below(out) == bytes_below(tmp_path / "whole")


@pytest.mark.parametrize("form", LAST)
def test_a_worker_of_a_document_that_is_killed_with_experts_is_tried_again(
    form: str, tensors: Tensors, tmp_path: Path
) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=2)
    sizes = ("--target-ep-size", 4, "--target-pp-size", 2)
    assert convert(source, tmp_path / "whole", form, *sizes) == 0
    kinds = {"megatron": "Megatron", "torch_dist": "TorchDist"}
    target = {"path": "out", "format": kinds[form], "parallelism": {"expert": 4, "pipeline": 2}}
    claim = {"persistentVolumeClaim": {"claimName": "training"}}
    document = {
        "apiVersion": "ckpt2pt.dev/v1alpha1",
        "kind": "CheckpointConversion",
        "metadata": {"name": "experts"},
        "spec": {
            "model": {"numLayers": 2},
            "parallelism": {"tensor": 1, "pipeline": 1},
            "source": {"path": "source", "volume": claim},
            "target": {**target, "volume": claim},
            "readiness": {"timeoutSeconds": 0},
        },
    }
    path = tmp_path / "conversion.yaml"
    path.write_text(yaml.safe_dump(document))
    words = ["run", "-f", path, "--volume", f"training={tmp_path}", "--output", "json", "--progress", "none"]
    program = [sys.executable, "-m", "ckpt2pt", *map(str, words)]
    environment = killed_once(tmp_path, LAST[form])
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["status"]["stageStatuses"]
    assert [stage["attempts"] for stage in stages] == [1, 2]
    assert bytes_below(tmp_path / "out") == bytes_below(tmp_path / "whole")


if SETS := core_sets(experts=True):

    @pytest.mark.parametrize("form", ["megatron", "torch_dist"])
    @pytest.mark.parametrize("folder", SETS, ids=set_name)
    def test_every_set_arrives_at_another_size(folder: Path, form: str, tmp_path: Path) -> None:
        wanted = expected(folder / "expected")
        for number, size in enumerate((1, 2, 4)):
            out = tmp_path / str(number)
            assert convert(folder, out, form, "--target-ep-size", size, "--target-tp-size", 1 + number % 2) == 0
            found = read(out).index
            assert found.keys() == wanted.keys()
            with Files() as opened:
                for key, values in wanted.items():
                    data = np.array(gathered(found[key]).block(opened, 0, found[key].numel))
                    bits = as_bits(key, values)
                    assert data.tobytes() == bits.tobytes(), key


def as_bits(key: Key, values: Any) -> Any:
    """As a file has them: weights are bfloat16."""
    return (values.view("<u4") >> 16).astype("<u2") if key.role == "param" else values


def test_a_worker_waits_until_ranks_that_it_does_not_read_are_whole(
    tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_experts(tmp_path / "source", tensors, experts=2, stages=2)
    damaged = source / "iter_0000002/mp_rank_00_001_001/model_optim_rng.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    words = ("--target-pp-size", 2, "--stage", 0, "--readiness-timeout", 1)
    assert convert(source, tmp_path / "out", "megatron", *words) != 0
    assert "mp_rank_00_001_001" in capsys.readouterr().err
