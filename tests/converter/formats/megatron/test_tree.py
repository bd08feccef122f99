"""What a model file holds beside the model: seven arguments, groups in order, scheduler, random states; nothing foreign."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt2pt.core.state import State
from ckpt2pt.errors import MissingInputError
from ckpt2pt.formats.megatron.tree import Group, model_tree
from ckpt2pt.formats.torchfile.trees import namespace_attrs

SCHEDULER: dict[str, Any] = {
    "max_lr": 1e-3, "lr_warmup_steps": 12, "num_steps": 12, "lr_decay_style": "cosine", "lr_decay_steps": 600,
    "min_lr": 1e-4, "start_wd": 0.1, "end_wd": 0.1, "wd_incr_style": "constant", "wd_incr_steps": 18,
}  # fmt: skip
GROUP: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "lr": 5e-4}
GROUPS: tuple[dict[str, Any], ...] = (
    {**GROUP, "wd_mult": 1.0, "params": [0, 1]},
    {**GROUP, "wd_mult": 0.0, "weight_decay": 0.0},
)


def state(**more: Any) -> State:
    known: dict[str, Any] = {"args": {"num_attention_heads": 4, "save": "x"}, "groups": GROUPS, "scheduler": SCHEDULER}
    return State(where="source", iteration=2, samples=12, step=1, **(known | more))


BOTH = (Group(decays=False), Group(decays=True))


def made(
    held: State, optimizers: tuple[tuple[Group, ...], ...] | None = (BOTH,)
) -> tuple[dict[str, Any], dict[str, bytes]]:
    tree, storages = model_tree(
        held, sizes={"num_layers": 4}, chunks={"model": {}}, optimizers=optimizers, rank=(0, 1, 0)
    )
    return dict(tree), storages


def test_arguments_are_those_that_a_load_needs() -> None:
    tree, _ = made(state())
    assert namespace_attrs(tree["args"]) == {"num_layers": 4, "num_attention_heads": 4, "consumed_train_samples": 12}
    assert (tree["checkpoint_version"], tree["iteration"]) == (3.0, 2)


def test_groups_stand_in_the_order_asked_for_with_the_true_step() -> None:
    tree, _ = made(state())
    groups = tree["optimizer"]["optimizer"]["param_groups"]
    assert [(group["wd_mult"], group["weight_decay"], group["step"]) for group in groups] == [
        (0.0, 0.0, 1),
        (1.0, 0.1, 1),
    ]
    assert list(groups[0]) == [
        "is_expert_parallel", "default_config", "wd_mult", "lr_mult", "is_decoupled_lr", "max_lr", "min_lr", "lr",
        "bias_correction", "betas", "eps", "weight_decay", "step",
    ]  # fmt: skip
    assert (groups[0]["max_lr"], groups[0]["min_lr"]) == (1e-3, 1e-4)


def test_an_optimizer_of_experts_is_a_second_one_with_groups_that_say_so() -> None:
    tree, _ = made(state(), (BOTH, (Group(decays=True, experts=True),)))
    dense, experts = ([*one["optimizer"]["param_groups"]] for one in tree["optimizer"])
    assert [group["is_expert_parallel"] for group in (*dense, *experts)] == [False, False, True]
    assert experts[0]["weight_decay"] == 0.1


def test_random_states_are_plain_integers_and_small_storages() -> None:
    tree, storages = made(state())
    numpy = tree["rng_state"][0]["np_rng_state"]
    assert numpy[0] == "MT19937"
    assert {type(word) for word in numpy[1]} == {int}
    assert {key: len(data) for key, data in storages.items()}["torch"] == 5056


def test_weights_alone_have_neither_groups_nor_scheduler() -> None:
    tree, _ = made(state(groups=(), scheduler={}), None)
    assert not {"optimizer", "opt_param_scheduler"} & tree.keys()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        pytest.param({"args": {}}, "num_attention_heads", id="heads"),
        pytest.param({"scheduler": {**SCHEDULER, "lr_decay_steps": None}}, "lr_decay_steps", id="scheduler"),
        pytest.param({"groups": ({**GROUP, "wd_mult": 1.0, "betas": None}, GROUPS[1])}, "betas", id="betas"),
        pytest.param({"groups": GROUPS[:1]}, "without weight decay", id="group"),
    ],
)
def test_what_nothing_states_is_refused(more: dict[str, Any], what: str) -> None:
    with pytest.raises(MissingInputError, match=what):
        made(state(**more))
