"""A torch_dist result against its source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt2pt.cli.commands import main
from ckpt2pt.core.tensor import Key
from ckpt2pt.formats.registry import read
from dist import CUT, of_mindspore


def verify(folder: Path, target: Path, *more: str) -> int:
    words = ["--source", folder / "ms", "--param-map-path", folder / "pt_meta", "--target", target, *more]
    return main(["verify", "--target-format", "torch_dist", "--progress", "none", *map(str, words)])


def test_a_flipped_bit_is_found_in_the_tensor_that_has_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert of_mindspore(CUT, tmp_path / "out") == 0
    assert verify(CUT, tmp_path / "out") == 0
    tensor = read(tmp_path / "out").index[Key("exp_avg", "decoder.layers.0.mlp.linear_fc2.weight")]
    [extent] = tensor.views[0].storage
    path, place = Path(extent.path), extent.offset + 4 * tensor.views[0].first
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    capfd.readouterr()
    assert verify(CUT, tmp_path / "out") == 76
    said = capfd.readouterr()
    assert "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight" in said.out + said.err
    assert verify(CUT, tmp_path / "out", "--level", "digest") == 76


def test_a_file_that_is_gone_or_was_cut_is_a_difference(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert of_mindspore(CUT, tmp_path / "out") == 0
    [lost] = (tmp_path / "out").glob("iter_*/__3_0.distcp")
    for data in (lost.read_bytes()[:-9], None):
        lost.unlink()
        if data:
            lost.write_bytes(data)
        capfd.readouterr()
        assert verify(CUT, tmp_path / "out") == 76
        assert "__3_0.distcp" in capfd.readouterr().out


def test_torch_reads_no_row_of_archives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for target in ("torch_dist", "megatron"):
        assert verify(CUT, tmp_path / "out", "--target-format", target, "--reader", "torch") == 64
        said = capfd.readouterr().err
        assert "--reader is torch" in said
        assert "leave --reader out" in said
        assert "load the result with Megatron-LM" in said


def test_a_result_that_is_not_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify(CUT, tmp_path / "out") == 66
    assert "there is no result of iteration" in capfd.readouterr().err


def change_samples(tree: Any) -> None:
    tree["args"].consumed_train_samples += 1


def change_iteration(tree: Any) -> None:
    tree["iteration"] = 3


def change_argument(tree: Any) -> None:
    tree["args"].num_attention_heads *= 2


def drop_argument(tree: Any) -> None:
    del tree["args"].padded_vocab_size


def change_step(tree: Any) -> None:
    tree["optimizer"]["optimizer"]["param_groups"][1]["step"] = 1


def swap_groups(tree: Any) -> None:
    tree["optimizer"]["optimizer"]["param_groups"].reverse()


def change_schedule(tree: Any) -> None:
    tree["opt_param_scheduler"]["max_lr"] = 0.5


def add_scaler(tree: Any) -> None:
    tree["optimizer"]["grad_scaler"] = {"scale": torch.tensor([4.0]), "growth_tracker": 0, "hysteresis_tracker": 2}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_samples, "/args/consumed_train_samples"),
        (change_iteration, "/iteration"),
        (change_argument, "/args/num_attention_heads"),
        (drop_argument, "/args/padded_vocab_size"),
        (change_step, "/optimizer/optimizer/param_groups/1/step"),
        (swap_groups, "/optimizer/optimizer/param_groups/0/wd_mult"),
        (change_schedule, "/opt_param_scheduler/max_lr"),
        (add_scaler, "/optimizer/grad_scaler"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_no_tensor_is_compared_by_its_name(
    change: Callable[[Any], None], name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert of_mindspore(CUT, tmp_path / "out") == 0
    assert verify(CUT, tmp_path / "out", "--level", "full") == 0
    [common] = (tmp_path / "out").glob("iter_*/common.pt")
    tree = torch.load(common, weights_only=False)
    change(tree)
    torch.save(tree, common)
    capfd.readouterr()
    assert verify(CUT, tmp_path / "out", "--level", "full", "--output", "json") == 76
    found = {one["tensor"] for one in json.loads(capfd.readouterr().out)["differences"] if one["file"] == "common.pt"}
    assert name in found
    assert found - {"file"} <= {name} | {one for one in found if "param_groups/" in one}


def test_a_common_file_that_is_no_archive_is_a_difference(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert of_mindspore(CUT, tmp_path / "out") == 0
    [common] = (tmp_path / "out").glob("iter_*/common.pt")
    common.write_bytes(common.read_bytes()[:-40])
    assert verify(CUT, tmp_path / "out", "--level", "full") == 76
    assert "common.pt" in capfd.readouterr().out
