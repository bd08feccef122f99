"""The state of a checkpoint: its own template or one that is given, and what a MindSpore file states counts more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.extents import Extent
from ckpt2pt.core.index import Collector, Local
from ckpt2pt.core.stated import Stated, Statement
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.state import state_of
from ckpt2pt.formats.torchfile.pickles import Global, namespace


def template() -> Template:
    return Template(
        path="args",
        tree={
            "args": namespace({"global_batch_size": 4, "params_dtype": Global("torch", "bfloat16")}),
            "optimizer": {"optimizer": {"param_groups": [{"wd_mult": 1.0, "eps": 1e-8, "step": 9}]}},
            "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 40},
        },
        storages={},
    )


def checkpoint(**more: Any) -> Checkpoint:
    collector = Collector(1, "source")
    collector.add("param", "decoder.final_layernorm.weight", 0, Local("float32", (8,), 0, (Extent("x", 0, 32),)))
    known: dict[str, Any] = {"iteration": 10, **more}
    return Checkpoint(path=Path("source"), format="megatron", tensor=1, pipeline=1, index=collector.index(), **known)


def test_checkpoint_with_a_template_keeps_its_own_step() -> None:
    found = state_of(checkpoint(template=template(), samples=40), None, iteration=None, zero_samples=False)
    assert (found.iteration, found.samples, found.step) == (10, 40, 9)
    assert found.args == {"global_batch_size": 4}


def test_given_metadata_is_of_another_time() -> None:
    found = state_of(checkpoint(), template(), iteration=None, zero_samples=False)
    assert (found.samples, found.step, found.scheduler["num_steps"]) == (40, 10, 40)


def test_what_the_source_states_counts_more() -> None:
    stated = Statement(scheduler={"max_lr": Stated(2e-3, "float64")})
    found = state_of(checkpoint(statement=stated, samples=80), template(), iteration=None, zero_samples=False)
    assert (found.scheduler["max_lr"], found.scheduler["num_steps"]) == (2e-3, 80)


@pytest.mark.parametrize(("asked", "expected"), [(None, 10), (12, 12)])
def test_iteration_asked_for_is_taken_at_the_user_s_word(asked: int | None, expected: int) -> None:
    found = state_of(checkpoint(), None, iteration=asked, zero_samples=False)
    assert (found.iteration, found.samples, found.groups) == (expected, None, ())
