"""MindSpore to MindSpore: whole files of shards, the other format, another layout, weights alone; and what cannot be."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checked import checked
from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.discover import discover
from ckpt2pt.discover.request import Request
from ckpt2pt.errors import Ckpt2ptError, CoverageError, UsageError, VerificationError
from ckpt2pt.formats.mindspore import index_file
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.imported import prove_import
from ckptfiles import Tensor, ckpt
from conversions import Quiet
from documents import ABSENT, changed, claim, write
from goldens import golden_root
from handmade import Handmade
from imports import import_request, run_all
from layouts import topology
from relaid import Relaid, check_mindspore
from results import edit_tree
from sharding import Sharding

J = golden_root() / "megatron06" / "j_tp1pp2dp2"
SHARDS = J / "ms_zero_src"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("rank_*/*")}


def payloads(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = path.read_bytes()
    return {
        name: (ref.dtype, ref.shape, b"".join(data[e.offset :][: e.nbytes] for e in ref.extents))
        for name, ref in index_file(path).items()
    }


@pytest.mark.parametrize(("suffix", "merged"), [("ckpt", "ms_zero_merged"), ("safetensors", "ms_zero_merged_st")])
def test_shards_become_the_files_that_the_reference_merges(suffix: str, merged: str, tmp_path: Path) -> None:
    request = import_request(SHARDS, tmp_path, format=suffix, pipeline=2, tensor=1, verify="full")
    assert run_all(request).published
    for number in (0, 2):
        [expected] = (J / merged / f"rank_{number}").iterdir()
        assert (tmp_path / f"rank_{number}" / f"network.{suffix}").read_bytes() == expected.read_bytes()


def test_the_other_format_and_back_is_the_same_file(tmp_path: Path) -> None:
    for source, target, suffix in (("", "st", "safetensors"), ("st", "back", "ckpt")):
        request = import_request(tmp_path / source if source else J / "ms", tmp_path / target, format=suffix,
                                 pipeline=2, tensor=1, verify="full")  # fmt: skip
        assert run_all(request).published
    assert sorted(files_of(tmp_path / "back")) == sorted(files_of(J / "ms"))
    for name in files_of(tmp_path / "back"):
        assert payloads(tmp_path / "back" / name) == payloads(J / "ms" / name)
        assert checked(tmp_path / "back" / name)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "tp2-tp1": ({"tensor": 2}, {}, {}),
    "tp2-tp4": ({"tensor": 2}, {"tensor": 4}, {"bias": True}),
    "pp4-pp1-tied": ({"pipeline": 4}, {}, {"tied": True}),
    "pp1-tp2pp4": ({}, {"tensor": 2, "pipeline": 4}, {}),
    "noop": ({"pipeline": 4, "noop": frozenset({3})}, {"pipeline": 2, "noop": frozenset({3})}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_rank_of_another_layout_holds_what_numpy_cuts(case: str, tmp_path: Path) -> None:
    source, target, kind = CASES[case]
    one, other = (Relaid(topology=topology(**cut), **kind) for cut in (source, target))
    assert run_all(relaid(one, other, tmp_path)).published
    check_mindspore(other, tmp_path / "out")


def relaid(one: Relaid, other: Relaid, folder: Path, **more: Any) -> Request:
    one.write_source(folder / "ms")
    one.write_meta(folder / "pt_meta")
    sizes = {"tensor": one.topology.tensor, "pipeline": one.topology.pipeline}
    wanted = {"target_tensor": other.topology.tensor, "target_pipeline": other.topology.pipeline}
    return import_request(
        folder / "ms", folder / "out", maps=folder / "pt_meta", verify="full", **sizes, **wanted, **more
    )


def test_shards_are_cut_anew(tmp_path: Path) -> None:
    """A training of two data-parallel ranks with the distributed optimizer, for another number of tensor-parallel ranks."""
    one, other = Relaid(topology=topology(tensor=2, data=2)), Relaid(topology=topology(tensor=4, data=2))
    Sharding().write(one, tmp_path / "ms")
    one.write_meta(tmp_path / "pt_meta")
    request = import_request(
        tmp_path / "ms", tmp_path / "out", maps=tmp_path / "pt_meta", tensor=2, target_tensor=4, verify="full"
    )
    assert (request.topology.data, request.topology.tensor) == (2, 4)
    assert run_all(request).published
    check_mindspore(other, tmp_path / "out")


def _number(name: str, value: float) -> Tensor:
    return Tensor(name, "float32", (), struct.pack("<f", value))


def test_parameter_groups_follow_the_parameters_of_each_rank(tmp_path: Path) -> None:
    """Megatron numbers groups by their first parameters: a stage without the embedding begins with a norm."""
    one, other = Relaid(topology=topology()), Relaid(topology=topology(pipeline=2))
    reported = {
        "wd_mult_group_0": 1.0,
        "learning_rate_group_0": 0.5,
        "wd_mult_group_1": 0.0,
        "learning_rate_group_1": 0.25,
    }
    one.entries[0, 0] |= {name: _number(name, value) for name, value in reported.items()}
    one.entries[0, 0]["rng"] = Tensor("default_generator", "uint8", (16,), bytes(16))
    outcome = run_all(relaid(one, other, tmp_path))
    assert any("default_generator" in warning for warning in outcome.warnings)
    found = [payloads(tmp_path / "out" / f"rank_{rank}" / "network.ckpt") for rank in (0, 1)]
    assert not any("default_generator" in each for each in found)
    for group in ("0", "1"):
        assert found[0][f"learning_rate_group_{group}"][2] == _number("", reported[f"learning_rate_group_{group}"]).data
        assert (
            found[1][f"learning_rate_group_{group}"][2]
            == _number("", reported[f"learning_rate_group_{1 - int(group)}"]).data
        )


def test_a_group_with_a_learning_rate_of_its_own_goes_where_its_parameters_go(tmp_path: Path) -> None:
    """Of Megatron's ``--decoupled-lr``: embedding and output layer are the first group of a first stage, the last of a last."""
    one = Relaid(topology=topology())
    outcome = run(one.write(tmp_path / "made"), range(1), Quiet())

    def decouple(tree: Any) -> None:
        groups = tree["optimizer"]["optimizer"]["param_groups"]
        rates = [{**group, "lr": lr} for group, lr in zip(groups, (0.5, 0.25), strict=True)]
        tree["optimizer"]["optimizer"]["param_groups"] = [{**rates[0], "is_decoupled_lr": True, "lr": 0.125}, *rates]

    edit_tree(outcome.target.folder / "mp_rank_00" / "model_optim_rng.pt", decouple)
    more = {"source_format": "Megatron", "target_pipeline": 4}
    assert run_all(import_request(tmp_path / "made" / "out", tmp_path / "ms", **more)).published
    rates: list[list[float]] = []
    for rank in (0, 1, 3):
        found = payloads(tmp_path / "ms" / f"rank_{rank}" / "network.ckpt")
        names = sorted(name for name in found if name.startswith("learning_rate_group_"))
        rates.append([struct.unpack("<f", found[name][2])[0] for name in names])
    assert rates == [[0.125, 0.25, 0.5], [0.25, 0.5], [0.25, 0.5, 0.125]]


def test_weights_alone(tmp_path: Path) -> None:
    assert run_all(import_request(SHARDS, tmp_path, pipeline=2, tensor=1, full=False, verify="full")).published
    whole = payloads(next((J / "ms_zero_merged" / "rank_0").iterdir()))
    some = payloads(tmp_path / "rank_0" / "network.ckpt")
    assert some.items() <= whole.items()
    assert {name for name in whole if name.startswith("exp_avg")} <= whole.keys() - some.keys()
    assert {name for name in whole if name.startswith("language_model")} <= some.keys()


def test_weights_alone_for_another_layout_are_proved_by_what_is_left(tmp_path: Path) -> None:
    """Numbers of the optimizer and of the time are left out; others have to be the source's."""
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(tensor=4))
    for number, decay in ((0, 1.0), (1, 0.0)):
        one.entries[0, 0] |= {
            name: _number(name, value)
            for name, value in {f"wd_mult_group_{number}": decay, f"learning_rate_group_{number}": 0.5}.items()
        }
    request = relaid(one, other, tmp_path, full=False)
    assert run_all(request).published
    path = tmp_path / "out" / "rank_0" / "network.ckpt"
    found = payloads(path)
    assert "wd_mult_group_0" in found
    assert not {"step_num", "learning_rate_group_0"} & found.keys()
    tensors = {name: Tensor(name, *one) for name, one in found.items()} | {
        "wd_mult_group_0": _number("wd_mult_group_0", 0.75)
    }
    os.chmod(path, 0o600)
    path.write_bytes(ckpt(tensors.values()))
    with pytest.raises(VerificationError, match="group 0: is no parameter group of the source"):
        prove_import(request, discover(request), (0, 0), {"network.ckpt": path}, heed=lambda: None)


def test_a_source_without_moments_is_proved_for_another_layout(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology(tensor=2)), Relaid(topology=topology(tensor=4))
    for entries in one.entries.values():
        for name in [name for name in entries if name.startswith("exp_avg")]:
            del entries[name]
    request = relaid(one, other, tmp_path)
    assert run_all(request).published
    path = tmp_path / "out" / "rank_0" / "network.ckpt"
    tensors = {name: Tensor(name, *one) for name, one in payloads(path).items()}
    name = next(name for name in tensors if name.endswith("mapping.weight"))
    tensors["exp_avg." + name] = replace(tensors[name], name="exp_avg." + name)
    os.chmod(path, 0o600)
    path.write_bytes(ckpt(tensors.values()))
    with pytest.raises(VerificationError, match=r"exp_avg of .*: is not in the source"):
        prove_import(request, discover(request), (0, 0), {"network.ckpt": path}, heed=lambda: None)


def test_a_file_for_every_data_parallel_rank(tmp_path: Path) -> None:
    assert run_all(import_request(SHARDS, tmp_path, pipeline=2, tensor=1, copies=True)).published
    found = files_of(tmp_path)
    assert sorted(found) == [f"rank_{number}/network.ckpt" for number in range(4)]
    assert found["rank_0/network.ckpt"] == found["rank_1/network.ckpt"] != found["rank_2/network.ckpt"]


WORDS = ["--source", str(SHARDS), "--target-format", "mindspore", "--tp-size", "1", "--pp-size", "2"]


def test_the_command_plans_converts_stage_by_stage_and_verifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--target", str(tmp_path / "out")]
    assert main(["plan", *words, "--names", "--output", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert [len(rank["shards"]) for rank in plan["ranks"]] == [2, 2]
    for stage in ("1", "0"):
        assert main(["convert", *words, "--stage", stage, "--multiprocess-off", "--progress", "none"]) == 0
    capsys.readouterr()
    there = {
        path.relative_to(tmp_path / "out").as_posix(): path.stat().st_size
        for path in (tmp_path / "out").glob("rank_*/*")
    }
    planned = {
        f"{rank['directory']}/{file['name']}": file["nbytes"] for rank in plan["ranks"] for file in rank["files"]
    }
    assert planned == there
    assert main(["convert", *words, "--progress", "none", "--output", "json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["ranksConverted"], again["ranksKept"], again["published"]) == (0, 2, True)
    for more in (["--level", "digest"], ["--level", "full"]):
        assert main(["verify", *words, *more, "--progress", "none"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--progress", "none"]) == 0


def test_a_document_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = changed(
        ("spec.model", {"numLayers": 4}),
        ("spec.parallelism", {"pipeline": 2, "data": 2}),
        ("spec.source", {"path": "ms_zero_src", "format": "Ckpt", "volume": claim("training")}),
        ("spec.metadata", ABSENT),
        ("spec.verify", "Full"),
        ("spec.target", {"volume": claim("out"), "path": "ms", "format": "MindSpore"}),
    )
    words = ["--volume", f"training={J}", "--volume", f"out={tmp_path}", "--output", "json"]
    assert main(["run", "-f", str(write(tmp_path / "merge.yaml", document)), *words]) == 0
    status = json.loads(capsys.readouterr().out)["status"]
    assert (status["phase"], status["stageSummary"], status["outputPath"]) == ("Succeeded", "2/2", "ms")
    merged = {path.parent.name: path.read_bytes() for path in (J / "ms_zero_merged").glob("rank_*/*")}
    assert {path.parent.name: path.read_bytes() for path in (tmp_path / "ms").glob("rank_*/*")} == merged


REFUSED: dict[str, tuple[dict[str, Any], type[Ckpt2ptError], str]] = {
    "no-metadata": ({"tensor": 1, "target_tensor": 2}, UsageError, "which says where layers and heads"),
    "its-own-place": ({"target": SHARDS}, UsageError, "would take the place of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    more, error, what = REFUSED[case]
    options: dict[str, Any] = {"source": SHARDS, "target": tmp_path / "out", "pipeline": 2, "tensor": 1}
    with pytest.raises(error, match=what):
        run_all(import_request(**(options | more)))
    assert not (tmp_path / "out").exists()


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "lost": (
        lambda found: found.pop(next(name for name in found if name.startswith("exp_avg."))),
        "is in the source, and not",
    ),
    "more": (lambda found: found.update(mine=Tensor("mine", "float32", (), bytes(4))), "mine: is not in the source"),
    "a-number": (
        lambda found: found.update(step_num=replace(found["step_num"], data=bytes(8))),
        "step_num: 1 of 1 elements",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_the_full_proof_finds_what_is_wrong(case: str, tmp_path: Path) -> None:
    edit, what = DAMAGE[case]
    request = import_request(SHARDS, tmp_path, pipeline=2, tensor=1)
    run_all(request)
    path = tmp_path / "rank_0" / "network.ckpt"
    tensors = {name: Tensor(name, dtype, shape, data) for name, (dtype, shape, data) in payloads(path).items()}
    edit(tensors)
    os.chmod(path, 0o600)
    path.write_bytes(ckpt(tensors.values()))
    with pytest.raises(VerificationError, match=what):
        prove_import(request, discover(request), (0, 0), {"network.ckpt": path}, heed=lambda: None)


def test_layers_that_the_source_lacks_are_reported(tmp_path: Path) -> None:
    one, other = Relaid(topology=topology()), Relaid(topology=topology(pipeline=2))
    for name in [name for name in one.entries[0, 0] if ".layers.2." in name]:
        del one.entries[0, 0][name]
    with pytest.raises(CoverageError, match=r"layer 2 of the target is not in the source"):
        run_all(relaid(one, other, tmp_path))
    assert Handmade(Topology(num_layers=2)).entries
