"""What MindSpore files state of optimizer and scheduler, and what of it takes the place of a template's values."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from ckpt2pt.core.stated import Stated, carry, is_stated, read_statement


def single(value: float) -> Stated:
    """As a float32 entry holds it."""
    return Stated(struct.unpack("<f", struct.pack("<f", value))[0], "float32")


def double(value: float) -> Stated:
    return Stated(value, "float64")


def whole(value: int) -> Stated:
    return Stated(value, "int32")


SCHEDULER = {"max_lr": 1e-3, "min_lr": 1e-5, "lr_warmup_steps": 20.0, "lr_decay_style": "cosine", "lr_decay_steps": 400,
             "start_wd": 0.1, "end_wd": 0.1, "num_steps": 8}  # fmt: skip
GROUP = {
    "wd_mult": 1.0,
    "max_lr": 1e-3,
    "min_lr": 1e-5,
    "lr": 4e-4,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "bias_correction": True,
}
BARE = GROUP | {"wd_mult": 0.0, "weight_decay": 0.0}
# The reference's converter numbers the groups as the stage has them; MindSpore's own order may be another.
FILE: dict[str, Stated] = {
    "max_lr": double(1e-3), "min_lr": double(1e-5), "lr_warmup_steps": whole(20), "lr_decay_style": whole(3),
    "lr_decay_steps": whole(400), "start_wd": double(0.1), "end_wd": double(0.1),
    **{f"{name}_group_{number}": single(value) for number, decay in ((0, 0.0), (1, 0.1)) for name, value in
       {"max_lr": 1e-3, "min_lr": 1e-5, "learning_rate": 4e-4, "eps": 1e-8, "weight_decay": decay, "wd_mult": decay * 10,
        "bias_correction": 1.0}.items()},
}  # fmt: skip


def carried(**changes: Stated) -> Any:
    return carry(read_statement(FILE | changes), SCHEDULER, [GROUP, BARE])


def test_what_says_the_same_leaves_the_template_as_megatron_saved_it() -> None:
    found = carried()
    assert (dict(found.scheduler), [dict(group) for group in found.groups], found.conflicts) == ({}, [{}, {}], ())


@pytest.mark.parametrize("value", [0.1, 1e-3, 3e-4, 1.23456789e-7, 0.3333333, 5.0, 0.0])
def test_a_single_stands_for_the_number_with_the_fewest_digits(value: float) -> None:
    assert single(value).exact == pytest.approx(value, rel=1e-7)
    if len(repr(value)) < 9:
        assert single(value).exact == value
    assert single(value).equals(value)
    assert not single(value).equals(value + 1)


@pytest.mark.parametrize(
    ("changes", "scheduler", "groups", "conflicts"),
    [
        pytest.param({"max_lr": double(5.0)}, {"max_lr": 5.0}, [{}, {}], ["max_lr 5.0 (not 0.001)"], id="scheduler"),
        pytest.param(
            {"lr_decay_style": whole(2)}, {"lr_decay_style": "linear"}, [{}, {}], ["lr_decay_style linear (not cosine)"], id="style"
        ),
        pytest.param({"lr_decay_style": whole(99)}, {}, [{}, {}], [], id="style-of-no-number"),
        pytest.param(
            {"learning_rate_group_0": single(2e-4), "learning_rate_group_1": single(2e-4)}, {}, [{"lr": 2e-4}, {"lr": 2e-4}], [],
            id="progress",
        ),
        pytest.param({"weight_decay_group_1": single(0.05)}, {}, [{"weight_decay": 0.05}, {}], [], id="decay-of-its-own-group"),
        pytest.param(
            {"eps_group_0": single(1e-6), "eps_group_1": single(1e-6)}, {}, [{"eps": 1e-6}, {"eps": 1e-6}],
            ["eps 1e-06 (not 1e-08)"], id="eps",
        ),
        pytest.param({"bias_correction_group_0": single(0.0)}, {}, [{}, {"bias_correction": False}],
                     ["bias_correction False (not True)"], id="a-switch-stays-one"),
    ],
)  # fmt: skip
def test_what_differs_takes_the_place_of_the_templates(
    changes: dict[str, Stated], scheduler: dict[str, Any], groups: list[dict[str, Any]], conflicts: list[str]
) -> None:
    found = carried(**changes)
    assert dict(found.scheduler) == scheduler
    assert [dict(group) for group in found.groups] == groups
    assert list(found.conflicts) == conflicts


def test_a_file_of_a_training_states_limits_for_all_groups_at_once() -> None:
    """MindSpeed-Core-MS itself writes rate and decay of each group, and the limits only once."""
    own = {"max_lr": double(2e-3), "learning_rate_group_0": double(1e-3), "learning_rate_group_1": double(1e-3),
           "weight_decay_group_0": double(0.1), "weight_decay_group_1": double(0.0)}  # fmt: skip
    found = carry(read_statement(own), SCHEDULER, [BARE, GROUP, GROUP | {"is_decoupled_lr": True}])
    assert [dict(group) for group in found.groups] == [
        {"lr": 1e-3, "max_lr": 2e-3}, {"lr": 1e-3, "max_lr": 2e-3}, {"lr": 1e-3},
    ]  # fmt: skip


def test_groups_that_cannot_be_distinguished_and_differ_are_left_alone() -> None:
    own = {"learning_rate_group_0": double(1e-3), "learning_rate_group_1": double(2e-3)}
    assert [dict(group) for group in carry(read_statement(own), {}, [GROUP, BARE]).groups] == [{}, {}]


def test_names_are_those_of_the_table_and_no_others() -> None:
    assert all(map(is_stated, FILE))
    assert not any(map(is_stated, ["num_steps", "max_lr_group_", "eps", "exp_avg.max_lr", "learning_rate_group_x"]))
    assert read_statement(FILE | {"lr_decay_style": whole(-1)}).names == frozenset(FILE) - {"lr_decay_style"}
