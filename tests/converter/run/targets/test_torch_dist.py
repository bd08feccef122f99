"""Conversions into torch_dist: from what MindSpore and Megatron hold, stage by stage, at once, again, and refused."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ckpt2pt
from ckpt2pt.cli.commands import main
from ckpt2pt.core.tensor import ROLES
from ckpt2pt.formats.registry import read
from ckpt2pt.formats.torch_dist.names import named
from ckpt2pt.formats.torch_dist.slots import Division
from ckpt2pt.formats.torchfile.trees import Call, namespace_attrs
from ckpt2pt.verification.across import compare_any
from dist import CUT, NOOP, TIED, convert, of_mindspore
from mcoresets import odd_set, script_of
from torchdist import gpt, write_gpt


def iteration(target: Path) -> Path:
    [found] = target.glob("iter_*")
    return found


def files(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in iteration(target).iterdir() if path.is_file()}


@pytest.mark.parametrize("folder", [TIED, CUT, NOOP], ids=lambda folder: folder.name)
def test_what_mindspore_holds_is_what_megatron_itself_saved(folder: Path, tmp_path: Path) -> None:
    assert of_mindspore(folder, tmp_path / "out", "--verify", "full") == 0
    found = compare_any([tmp_path / "out", folder / "A"])
    assert found.same
    assert found.equal > 100


def test_a_megatron_checkpoint_needs_nothing_besides(tmp_path: Path) -> None:
    assert convert(CUT / "A", tmp_path / "out", "--verify", "full") == 0
    assert compare_any([tmp_path / "out", CUT / "A"]).same
    own, made = read(CUT / "A").template, read(tmp_path / "out").template
    assert own
    assert made
    assert made.args["consumed_train_samples"] == own.args["consumed_train_samples"] != 0
    assert made.scheduler == own.scheduler
    assert [{**group} for group in made.groups] == sorted(own.groups, key=lambda group: -float(str(group["wd_mult"])))


def test_a_result_is_a_source_again(tmp_path: Path) -> None:
    assert convert(CUT / "A", tmp_path / "one") == 0
    assert convert(tmp_path / "one", tmp_path / "two", "--target-tp-size", "1", "--target-pp-size", "1") == 0
    assert compare_any([tmp_path / "one", tmp_path / "two"]).same
    assert {name for name in files(tmp_path / "two") if name.endswith(".distcp")} == {"__0_0.distcp"}


def test_what_no_release_refuses_is_in_common(tmp_path: Path) -> None:
    assert of_mindspore(CUT, tmp_path / "out") == 0
    common: Any = torch.load(iteration(tmp_path / "out") / "common.pt", weights_only=False)
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    assert common["optimizer"]["param_state_sharding_type"] == "fully_reshardable"
    assert [group["wd_mult"] for group in common["optimizer"]["optimizer"]["param_groups"]] == [1.0, 0.0]
    assert common["checkpoint_version"] == 3.0
    args = common["args"]
    assert args.no_save_rng is True
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert {type(value) for value in vars(args).values()} <= {bool, int, float, str, type(None)}
    assert json.loads(files(tmp_path / "out")["metadata.json"])["common_backend"] == "torch"


def test_stages_of_their_own_make_the_same_bytes_as_one_run(tmp_path: Path) -> None:
    assert of_mindspore(CUT, tmp_path / "whole") == 0
    assert of_mindspore(CUT, tmp_path / "parts", "--stage", "1") == 0
    assert set(files(tmp_path / "parts")) == {"__2_0.distcp", "__3_0.distcp"}
    assert not (tmp_path / "parts" / "latest_checkpointed_iteration.txt").exists()
    assert of_mindspore(CUT, tmp_path / "parts", "--stage", "0") == 0
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert (tmp_path / "parts" / "latest_checkpointed_iteration.txt").exists()


def test_a_second_run_keeps_what_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert of_mindspore(TIED, tmp_path / "out") == 0
    before = {path: path.stat().st_mtime_ns for path in iteration(tmp_path / "out").iterdir() if path.is_file()}
    capfd.readouterr()
    assert of_mindspore(TIED, tmp_path / "out") == 0
    assert "everything was there already" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_lost_file_is_reported_to_the_last_stage_and_made_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert of_mindspore(CUT, tmp_path / "out", "--stage", "0") == 0
    lost = iteration(tmp_path / "out") / "__1_0.distcp"
    lost.unlink()
    assert of_mindspore(CUT, tmp_path / "out", "--stage", "1") == 75
    assert "the files of tp 1 pp 0 were complete" in capfd.readouterr().err
    assert ".metadata" not in files(tmp_path / "out")
    assert of_mindspore(CUT, tmp_path / "out", "--stage", "0") == 0
    assert ".metadata" in files(tmp_path / "out")
    assert compare_any([tmp_path / "out", CUT / "A"]).same


def test_a_changed_file_is_found_before_it_is_joined(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert of_mindspore(CUT, tmp_path / "out", "--stage", "0") == 0
    changed = iteration(tmp_path / "out") / "__1_0.distcp"
    changed.write_bytes(changed.read_bytes()[::-1])
    assert of_mindspore(CUT, tmp_path / "out", "--stage", "1") == 76
    assert str(changed) in capfd.readouterr().err
    assert ".metadata" not in files(tmp_path / "out")
    assert of_mindspore(CUT, tmp_path / "out", "--stage", "0", "--overwrite") == 0
    assert compare_any([tmp_path / "out", CUT / "A"]).same


def test_weights_alone(tmp_path: Path) -> None:
    words = ("--convert-param-only", "--verify", "full")
    assert of_mindspore(CUT, tmp_path / "out", *words) == 0
    index = read(tmp_path / "out").index
    assert {key.role for key in index} == {"param"}
    common: Any = torch.load(iteration(tmp_path / "out") / "common.pt", weights_only=False)
    assert "optimizer" not in common


def test_nothing_is_written_where_hyperparameters_are_stated_nowhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(CUT / "ms", tmp_path / "ms")
    assert convert(tmp_path / "ms", tmp_path / "out", "--source-format", "safetensors") == 66
    assert "nothing states num_attention_heads" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_many_stages_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert of_mindspore(CUT, tmp_path / "out", "--target-pp-size", "99") == 65
    assert "99 pipeline stages share" in capfd.readouterr().err


def test_a_training_is_not_followed_into_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--ms-path", CUT / "ms", "--param-map-path", CUT / "pt_meta", "--target", tmp_path / "out"]
    assert main(["watch", "--once", "--target-format", "torch_dist", *map(str, words)]) == 64
    assert "--target-format is torch_dist" in capfd.readouterr().err


def test_namespaces_are_plain(tmp_path: Path) -> None:
    assert of_mindspore(TIED, tmp_path / "out") == 0
    template = read(tmp_path / "out").template
    assert template
    args = template.tree["args"]
    assert isinstance(args, Call)
    assert namespace_attrs(args)["hidden_size"] == read(TIED / "A").template.args["hidden_size"]  # type: ignore[union-attr]


def test_a_tensor_that_no_worker_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = Division.names
    monkeypatch.setattr(Division, "names", lambda self, pp: [one for one in names(self, pp) if "final" not in one])
    assert convert(CUT / "A", tmp_path / "out") == 65
    assert "decoder.final_layernorm.weight" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_launch_script_says_what_a_mindspore_checkpoint_does_not(tmp_path: Path) -> None:
    folder = odd_set()
    script = script_of(folder, tmp_path)
    assert convert(folder / "ms", tmp_path / "out", "--param-map-path", script, "--verify", "full") == 0
    assert compare_any([tmp_path / "out", folder]).same
    common: Any = torch.load(iteration(tmp_path / "out") / "common.pt", weights_only=False)
    assert common["opt_param_scheduler"]["num_steps"] == common["args"].consumed_train_samples == 12


@pytest.mark.parametrize("target", ["torch_dist", "megatron"])
@pytest.mark.parametrize("said", ["auto", "megatron"])
def test_any_megatron_format_is_a_source_and_is_reported_by_the_folder(said: str, target: str, tmp_path: Path) -> None:
    save = write_gpt(tmp_path / "save" / "iter_0000003", gpt()).parent
    words = ("--source-format", said, "--target-format", target, "--target-tp-size", "2", "--verify", "full")
    assert convert(save, tmp_path / "out", *words) == 0
    assert compare_any([tmp_path / "out", save]).same
    [one] = {
        json.dumps(json.loads(path.read_text())["sourceChecksums"])
        for path in iteration(tmp_path / "out").glob(".ckpt2pt/rank*.json")
    }
    assert json.loads(one)["notChecked"] == 0


def test_a_number_of_layers_that_the_source_has_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "convert",
        "--source",
        str(odd_set() / "ms"),
        "--target",
        str(tmp_path / "out"),
        "--target-format",
        "torch_dist",
    ]
    assert main([*words, "--param-map-path", str(script_of(odd_set(), tmp_path)), "--num-layers", "9"]) == 64
    assert "--num-layers is 9, and the source has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target_format", ["megatron", "torch_dist"])
@pytest.mark.parametrize("sizes", [(), ("--target-tp-size", "1", "--target-pp-size", "1")], ids=["found", "given"])
def test_weights_of_a_wrong_optimizer_state_are_converted_alone(
    target_format: str, sizes: tuple[str, ...], tmp_path: Path
) -> None:
    source = odd_set().with_name("odd_dp2__td_full")
    more = ("--target-format", target_format, *sizes)
    assert convert(source, tmp_path / "full", *more) == 65
    assert not (tmp_path / "full").exists()
    assert convert(source, tmp_path / "out", *more, "--convert-param-only", "--verify", "full") == 0
    left, right = read(odd_set()), read(tmp_path / "out")
    assert {key.role for key in right.index} == {"param"}
    assert {key for key in left.index if key.role == "param"} == set(right.index)
    assert compare_any([odd_set(), tmp_path / "out"], ignore=["main_param/*", "exp_avg*"]).same


@pytest.mark.parametrize("target_format", ["megatron", "torch_dist"])
def test_weights_beside_a_damaged_optimizer_file_are_converted_alone(target_format: str, tmp_path: Path) -> None:
    source = shutil.copytree(odd_set(), tmp_path / "source")
    [optimizer] = source.glob("iter_*/mp_rank_*/distrib_optim.pt")
    optimizer.write_bytes(b"nothing that torch has written")
    more = ("--target-format", target_format)
    assert convert(source, tmp_path / "full", *more) == 65
    assert convert(source, tmp_path / "out", *more, "--convert-param-only", "--verify", "full") == 0
    assert compare_any([odd_set(), tmp_path / "out"], ignore=["main_param/*", "exp_avg*"]).same


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_itself_reads_every_element_of_a_result(tmp_path: Path) -> None:
    """``torch.distributed.checkpoint`` knows neither Megatron-LM nor our reader."""
    from torch.distributed.checkpoint import FileSystemReader, load

    assert of_mindspore(CUT, tmp_path / "out") == 0
    reader = FileSystemReader(str(tmp_path / "out" / "iter_0000002"))
    described = {key: one for key, one in reader.read_metadata().state_dict_metadata.items() if hasattr(one, "chunks")}
    state = {key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in described.items()}
    load(state, storage_reader=reader, no_dist=True)
    seen = 0
    with ckpt2pt.open(CUT / "A") as source:
        for key, tensor in state.items():
            name = named(key)
            assert name
            for numbers in product(*map(range, tensor.shape[: name.leading])):
                wanted = source.get(name.name(numbers), name.role)
                assert np.array_equal(tensor[numbers].float().numpy().ravel(), wanted.astype("<f4").ravel()), key
                seen += 1
        assert seen == sum(len(source.keys(role)) for role in ROLES)
