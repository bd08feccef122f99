"""Which release wrote a checkpoint, as far as it tells."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ckpt2pt.cli.commands import main
from ckpt2pt.formats.megatron.headers import MegatronRank, read_rank
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.release import optimizer_form, written_by
from ckpt2pt.formats.torchfile.trees import Value, namespace
from coresets import ODD, core_sets


def test_the_release_is_reported_by_the_arguments(tmp_path: Path) -> None:
    reported = {
        folder.parent.name: written_by(read_rank(next(folder.glob("iter_*/mp_rank_00*")))) for folder in core_sets()
    }
    wanted = {
        "0.8.0": "0.7 to 0.8, by its arguments",
        "0.12.3": "0.12, by its arguments",
        "0.19.0": "0.19 or newer, by its arguments",
    }
    assert reported == {release: wanted[release] for release in reported}
    rank = read_rank(next(ODD.glob("iter_*/mp_rank_00")))
    assert optimizer_form(rank) == "coalesced buffers, as since 0.7"


def test_inspect_tells_release_and_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ODD)]) == 0
    shown = capsys.readouterr().out
    assert "Megatron-LM 0.19 or newer, by its arguments" in shown
    assert "coalesced buffers, as since 0.7" in shown
    assert "not by Megatron-LM 0.6" in shown
    assert "round to the weights" in shown


def test_inspect_tells_a_damaged_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(ODD, copied)
    path = next(copied.rglob("distrib_optim.pt"))
    state = torch.load(path)
    (kinds,) = state[0].values()
    kinds["param"] = kinds["param"].flip(0)
    torch.save(state, path)
    assert main(["inspect", str(copied)]) == 0
    assert "not those of the weights: mp_rank_00: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "reported"),
    [
        ((), "0.6 to 0.17, by the names of its parameters"),
        (("ddp_bucket_size",), "0.7 to 0.8, by its arguments"),
        (("ddp_bucket_size", "ckpt_format"), "0.9, by its arguments"),
        (("ddp_num_buckets", "pipeline_model_parallel_layout"), "0.13 to 0.14, by its arguments"),
        (("dist_ckpt_optim_fully_reshardable",), "0.15 to 0.18, by its arguments"),
    ],
)
def test_the_newest_argument_and_the_first_that_is_missing_bound_the_release(
    names: tuple[str, ...], reported: str
) -> None:
    tree: dict[str, Value] = {"args": namespace(dict.fromkeys(names))}
    rank = MegatronRank(folder=Path(), template=Template(path="", tree=tree, storages={}), chunks=(), buffers=None)
    assert written_by(rank) == reported
    assert optimizer_form(rank) == "none"
