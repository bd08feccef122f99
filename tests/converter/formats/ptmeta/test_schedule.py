"""Learning rate, weight decay and groups; the golden runs are the judge, the other styles follow the formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ckpt2pt.core.layout import Parameter
from ckpt2pt.errors import UsageError
from ckpt2pt.formats.ptmeta.schedule import learning_rate, param_groups, scheduler, weight_decay

ARGS: dict[str, Any] = {
    "global_batch_size": 4, "train_iters": 100, "lr_decay_iters": 100, "lr_warmup_fraction": 0.05, "lr": 1e-3, "min_lr": 1e-5,
    "lr_decay_style": "cosine", "start_weight_decay": 0.1, "end_weight_decay": 0.3, "weight_decay_incr_style": "linear",
    "lr_warmup_init": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8,
}  # fmt: skip


def rate(samples: int, **more: Any) -> float:
    args = ARGS | more
    return learning_rate(args, scheduler(args, samples))


def test_steps_count_samples() -> None:
    state = scheduler(ARGS, 8)
    assert (state["lr_warmup_steps"], state["lr_decay_steps"], state["wd_incr_steps"], state["num_steps"]) == (
        20.0,
        400,
        400,
        8,
    )
    by_samples = ARGS | {
        "train_iters": None,
        "train_samples": 50,
        "lr_decay_samples": 40,
        "lr_warmup_fraction": None,
        "lr_warmup_samples": 6,
    }
    state = scheduler(by_samples, 8)
    assert (state["lr_warmup_steps"], state["lr_decay_steps"], state["wd_incr_steps"]) == (6, 40, 50)
    by_iterations = ARGS | {"lr_warmup_fraction": None, "lr_warmup_iters": 3}
    assert scheduler(by_iterations, 8)["lr_warmup_steps"] == 12


def test_the_rate_along_the_way() -> None:
    assert rate(8) == 0.0004
    assert rate(20) == 1e-3
    assert rate(210) == pytest.approx(1e-5 + 0.5 * (math.cos(math.pi / 2) + 1) * (1e-3 - 1e-5))
    assert rate(400) == pytest.approx(1e-5)
    assert rate(401) == 1e-5
    assert rate(210, lr_decay_style="linear") == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5))
    assert rate(300, lr_decay_style="constant") == 1e-3
    assert rate(80, lr_decay_style="inverse-square-root") == pytest.approx(1e-3 * math.sqrt(20 / 80))
    assert rate(0, lr_warmup_init=2e-4) == 2e-4


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(UsageError, match="'steps' is not known"):
        rate(100, lr_decay_style="steps")
    with pytest.raises(UsageError, match="neither train_iters nor train_samples"):
        scheduler(ARGS | {"train_iters": None}, 8)


def test_weight_decay_grows() -> None:
    assert weight_decay(scheduler(ARGS, 100)) == pytest.approx(0.15)
    assert weight_decay(scheduler(ARGS, 500)) == 0.3
    assert weight_decay(scheduler(ARGS | {"weight_decay_incr_style": "cosine"}, 200)) == pytest.approx(0.2)
    assert weight_decay(scheduler(ARGS | {"weight_decay_incr_style": "constant"}, 100)) == 0.3


def test_groups_come_in_order_of_their_first_parameter() -> None:
    norm = Parameter(name="final_norm.weight", shape=(4,), dtype="bfloat16")
    matrix = Parameter(name="dense.weight", shape=(4, 4), dtype="bfloat16")
    state = scheduler(ARGS, 8)
    groups: Any = param_groups(ARGS, state, [norm, matrix], step=2)
    assert [(group["wd_mult"], group["weight_decay"] > 0) for group in groups] == [(0.0, False), (1.0, True)]
    groups = param_groups(ARGS, state, [matrix, norm], step=2)
    assert [group["wd_mult"] for group in groups] == [1.0, 0.0]
    assert {group["step"] for group in groups} == {2}
    assert len(param_groups(ARGS, state, [matrix], step=2)) == 1
