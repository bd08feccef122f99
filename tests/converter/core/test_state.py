"""State: what is no tensor, as plain values; what nothing states is refused with a hint."""

from __future__ import annotations

from typing import Any

import pytest

from ckpt2pt.core.state import ARCHITECTURE, State, plain_values
from ckpt2pt.errors import MissingInputError
from ckpt2pt.formats.huggingface.families import NEUTRAL


def state(**more: Any) -> State:
    return State(where="source", iteration=7, samples=42, step=6, **more)


def test_arguments_of_the_model_are_all_that_an_export_looks_at() -> None:
    """Else a result that lost one would be exported as another model."""
    assert set(ARCHITECTURE) >= NEUTRAL.keys()
    held = state(args={"rotary_base": 7, "softmax_type": None, "lr": 0.1})
    assert held.architecture == {"rotary_base": 7}


def test_group_is_found_by_its_weight_decay_and_gets_the_true_step() -> None:
    held = state(groups=({"wd_mult": 0.0, "step": 1}, {"wd_mult": 1.0, "lr": 0.1, "step": 1}))
    assert held.group(decays=True) == {"wd_mult": 1.0, "lr": 0.1, "step": 6}
    assert held.group(decays=False) == {"wd_mult": 0.0, "step": 6}


def test_group_that_nothing_states_is_refused() -> None:
    with pytest.raises(MissingInputError, match="hyperparameters of parameters without weight decay"):
        state(groups=({"wd_mult": 1.0},)).group(decays=False)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        pytest.param({}, "nothing states num_attention_heads", id="missing"),
        pytest.param({"num_attention_heads": 0}, "num_attention_heads is 0", id="zero"),
        pytest.param({"num_attention_heads": True}, "num_attention_heads is True", id="a-switch"),
    ],
)
def test_number_that_nothing_states_is_refused(args: dict[str, Any], what: str) -> None:
    with pytest.raises(MissingInputError, match=what):
        state(args=args).number("num_attention_heads")


def test_sizes_are_whole_numbers_and_switches() -> None:
    assert state(args={"hidden_size": 32, "swiglu": True, "lr": 0.1, "save": "x"}).sizes == {
        "hidden_size": 32,
        "swiglu": True,
    }


def test_objects_of_a_framework_are_left_out() -> None:
    plain = {"a": 1, "b": [1.0, "x", None], "c": (True,), "d": {"e": {"f": 2}}}
    assert plain_values({**plain, "dtype": object(), "g": [object()], "h": {"i": object()}}) == plain
