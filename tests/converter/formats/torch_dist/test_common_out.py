"""``common.pt`` as written: plain values alone, and nothing that a release refuses."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch

from ckpt2pt.core.state import State
from ckpt2pt.errors import MissingInputError
from ckpt2pt.formats.torch_dist.common_out import write_common

GROUP = {"wd_mult": 1.0, "lr_mult": 1.0, "max_lr": 1e-3, "min_lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "step": 1}
STATE = State(
    where="pt_meta",
    iteration=7,
    samples=70,
    step=6,
    args={"num_attention_heads": 4, "swiglu": True, "save": "/somewhere", "num_layers": 99},
    groups=({**GROUP, "wd_mult": 0.0}, GROUP),
    scheduler={"max_lr": 1e-3, "num_steps": 70},
)


def loaded(state: State, *, full: bool = True) -> Any:
    with torch.serialization.safe_globals([__import__("argparse").Namespace]):
        return torch.load(
            io.BytesIO(write_common(state, {"num_layers": 2, "hidden_size": 8}, full=full)), weights_only=True
        )


def test_it_loads_with_weights_only() -> None:
    found = loaded(STATE)
    assert found["iteration"] == 7
    assert vars(found["args"]) == {
        "swiglu": True,
        "num_attention_heads": 4,
        "num_layers": 2,
        "hidden_size": 8,
        "iteration": 7,
        "consumed_train_samples": 70,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "no_save_optim": False,
        "no_save_rng": True,
    }
    groups = found["optimizer"]["optimizer"]["param_groups"]
    assert [(group["wd_mult"], group["step"]) for group in groups] == [(1.0, 6), (0.0, 6)]
    assert found["opt_param_scheduler"] == STATE.scheduler


def test_weights_alone_have_no_optimizer() -> None:
    found = loaded(replace(STATE, groups=(), scheduler={}), full=False)
    assert not {"optimizer", "opt_param_scheduler"} & found.keys()
    assert found["args"].no_save_optim is True


@pytest.mark.parametrize("lacking", [{"args": {}}, {"groups": ()}, {"groups": (GROUP,)}, {"scheduler": {}}])
def test_what_megatron_needs_is_asked_for(lacking: dict[str, Any]) -> None:
    with pytest.raises(MissingInputError, match="nothing states"):
        write_common(replace(STATE, **lacking), {}, full=True)


def test_a_group_with_a_learning_rate_of_its_own_is_kept() -> None:
    groups = (*STATE.groups, {**GROUP, "is_decoupled_lr": True, "max_lr": 5e-4})
    found = loaded(replace(STATE, groups=groups))["optimizer"]["optimizer"]["param_groups"]
    assert [(group["wd_mult"], group["max_lr"], group["step"]) for group in found] == [
        (1.0, 1e-3, 6),
        (1.0, 5e-4, 6),
        (0.0, 1e-3, 6),
    ]
