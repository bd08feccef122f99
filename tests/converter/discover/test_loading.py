"""Settings of optimizer and scheduler that the source states, on their way into Megatron's files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.formats.ptmeta.metadata import read_template
from ckpt2pt.run.conversion import run
from ckpt2pt.verification.prove import verify_target
from ckptfiles import Tensor
from conversions import Quiet, flags_for
from handmade import Handmade

TWO = Topology(num_layers=4, pipeline=2)


def stating(folder: Path, **values: float) -> tuple[Handmade, Any]:
    """A source whose every rank states these numbers."""
    model = Handmade(topology=TWO)
    for entries in model.entries.values():
        for name, value in values.items():
            code, dtype = ("<i", "int32") if type(value) is int else ("<d", "float64")
            entries[name] = Tensor(name, dtype, (), struct.pack(code, value))
    return model, model.write(folder)


def test_what_the_source_states_is_carried_and_said(tmp_path: Path) -> None:
    _, request = stating(tmp_path, max_lr=2e-3, lr_decay_steps=4000, learning_rate_group_0=1.5e-3, lr_decay_style=2)
    outcome = run(request, range(2), Quiet())  # verified in full: the second reading expects the same
    for pp in range(2):
        tree: Any = read_template(outcome.target.folder / f"mp_rank_00_{pp:03d}" / "model_optim_rng.pt").tree
        scheduler, groups = tree["opt_param_scheduler"], tree["optimizer"]["optimizer"]["param_groups"]
        assert (scheduler["max_lr"], scheduler["lr_decay_steps"], scheduler["lr_decay_style"]) == (2e-3, 4000, "linear")
        assert (scheduler["min_lr"], scheduler["num_steps"]) == (1e-5, 48)
        assert [(group["lr"], group["max_lr"], group["step"]) for group in groups] == [(1.5e-3, 2e-3, 12)] * 2
        assert sorted(group["wd_mult"] for group in groups) == [0.0, 1.0]
    (warning,) = outcome.warnings
    assert "max_lr 0.002 (not 0.001)" in warning
    assert "lr_decay_steps 4000 (not 400)" in warning
    assert outcome.sentence().startswith("warning: the checkpoint and pt_meta disagree")


def test_what_the_source_states_as_the_template_does_changes_nothing(tmp_path: Path) -> None:
    model, request = stating(tmp_path, max_lr=1e-3, lr_decay_steps=400, lr_decay_style=3)
    outcome = run(request, range(2), Quiet())
    assert outcome.warnings == ()
    model.check(outcome)


def test_a_result_that_lost_what_the_source_states_is_found(tmp_path: Path) -> None:
    _, request = stating(tmp_path, max_lr=2e-3)
    outcome = run(request, range(2), Quiet())
    Handmade(topology=TWO).convert(tmp_path / "plain", metadata=request.metadata)
    name = "mp_rank_00_000/model_optim_rng.pt"
    (outcome.target.folder / name).write_bytes((tmp_path / "plain" / "out" / "iter_0000012" / name).read_bytes())
    found = {d.tensor: (d.expected, d.found) for d in verify_target(request, [0], level="full").differences}
    assert found["/opt_param_scheduler/max_lr"] == ("0.002", "0.001")


def test_plan_calls_nothing_left_out_that_is_carried(
    golden: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plan", *flags_for(golden / "megatron06" / "b_tp2pp2", tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "optimizer scalar" not in out
    assert "scheduler state" not in out
    assert "warning" not in out


def test_what_stays_of_the_templates_iteration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Handmade(topology=TWO, edit=lambda tree: tree.update(num_floating_point_operations_so_far=1.0))
    outcome = model.convert(tmp_path)
    names = ["rng_state", "num_floating_point_operations_so_far"]
    assert outcome.document()["fromTemplate"] == names
    assert (
        "as pt_meta has it, of another iteration: rng_state, num_floating_point_operations_so_far" in outcome.sentence()
    )
    paths = [f"--ms-path={tmp_path}/ms", f"--param-map-path={tmp_path}/pt_meta", f"--megatron-path={tmp_path}/other"]
    assert main(["plan", *paths, "--num-layers=4", "--pp-size=2", "--output=json"]) == 0
    assert json.loads(capsys.readouterr().out)["fromTemplate"] == names
