"""Checkpoints saved with --no-save-optim or --no-save-rng: pt-meta warns first, and makes what it is asked to make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.cli.commands import main
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.ptmeta.make import Made, from_checkpoint
from ckpt2pt.formats.ptmeta.metadata import read_template
from ckpt2pt.formats.ptmeta.rng import rng_state
from handmade import Handmade
from imports import import_request, run_all

ALL = ("optimizer", "scheduler", "rng")


def saved_without(folder: Path, *keys: str, **arguments: Any) -> Handmade:
    """A Megatron checkpoint in ``folder/out`` that lacks these entries, beside its MindSpore source."""

    def edit(template: dict[str, Any]) -> None:
        template["args"].state.update(arguments)
        for key in keys:
            del template[key]

    model = Handmade(topology=Topology(num_layers=4, pipeline=2), edit=edit)
    model.convert(folder, full=False)
    return model


def make(folder: Path, synthesize: tuple[str, ...] = (), **more: Any) -> Made:
    options: dict[str, Any] = {"target_data": None, "bucket_size": None, "compare": True, "overwrite": False} | more
    return from_checkpoint(folder / "out", folder / "made", synthesize=synthesize, **options)


def test_pt_meta_warns_first_and_calls_nothing_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_without(tmp_path, "optimizer", "opt_param_scheduler", "rng_state")
    flags = ["pt-meta", "--megatron-path", f"{tmp_path}/out", "--param-map-path", f"{tmp_path}/made"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    first, second, *rest = out.splitlines()
    assert first == (
        "warning: Megatron-LM 0.6 cannot resume from what this metadata gives: 2 of 2 ranks, first tp 0 pp 0: "
        "optimizer is missing; opt_param_scheduler is missing; rng_state is missing"
    )
    assert second.startswith(
        "  hint: make pt_meta again: ckpt2pt pt-meta --megatron-path CHECKPOINT --overwrite --synthesize optimizer scheduler rng"
    )
    assert not any("proved" in line for line in rest)
    assert main([*flags, "--overwrite", "--synthesize", *ALL, "--output", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["loadable"], document["warnings"]) == (True, [])
    assert set(document["assumed"]) == {"optimizer.param_groups", "opt_param_scheduler", "rng_state"}


def test_what_is_synthesized_is_what_megatron_would_have_saved(tmp_path: Path) -> None:
    model = saved_without(
        tmp_path, "optimizer", "opt_param_scheduler", "rng_state", consumed_train_samples=4, iteration=1
    )
    made = make(tmp_path, ALL)
    assert made.loadable
    for pp in range(2):
        tree = read_template(tmp_path / "made" / f"args_tp00_pp{pp:03d}.pt").tree
        wanted = Handmade(topology=model.topology).template(pp)
        groups: Any = tree["optimizer"]
        expected: Any = wanted["optimizer"]
        for one, other in zip(groups["optimizer"]["param_groups"], expected["optimizer"]["param_groups"], strict=True):
            assert {k: v for k, v in one.items() if k not in {"step", "lr"}} == {
                k: v for k, v in other.items() if k not in {"step", "lr"}
            }
        scheduler: Any = tree["opt_param_scheduler"]
        assert scheduler | {"num_steps": 4} == wanted["opt_param_scheduler"]
        states: Any = tree["rng_state"]
        assert states[0]["random_rng_state"] == rng_state(1234, tp=0, pp=pp)[0][0]["random_rng_state"]  # type: ignore[index,call-overload]
    outcome = model.convert(tmp_path / "again", metadata=tmp_path / "made")
    model.check(outcome)


def test_what_the_checkpoint_holds_is_not_made_anew(tmp_path: Path) -> None:
    saved_without(tmp_path, "rng_state")
    assert set(make(tmp_path, ALL).assumed) == {"rng_state"}


def test_arguments_that_do_not_tell_enough_are_named(tmp_path: Path) -> None:
    saved_without(tmp_path, "opt_param_scheduler", train_iters=None)
    with pytest.raises(FormatError, match="neither train_iters nor train_samples"):
        make(tmp_path, ("scheduler",))


def test_an_import_warns_of_the_metadata_that_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ckpt2pt.run.conversion.check_loadable", lambda *_: None
    )  # which refuses to write such a checkpoint
    Handmade(topology=Topology(num_layers=2)).convert(tmp_path / "good")
    Handmade(topology=Topology(num_layers=2), edit=lambda tree: tree.pop("rng_state")).convert(
        tmp_path / "bad", verify="digest"
    )
    for name, words in (("good", ()), ("bad", ("rng_state is missing", "--synthesize rng"))):
        outcome = run_all(import_request(source=tmp_path / name / "out", target=tmp_path / name / "ms2"))
        assert len(outcome.warnings) == bool(words)
        assert all(word in outcome.sentence() for word in words)
        assert outcome.document()["warnings"] == list(outcome.warnings)
