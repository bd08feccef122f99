"""What is no tensor, from a checkpoint and from metadata that is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckpt2pt.errors import FormatError
from ckpt2pt.formats.ptmeta.metadata import read_arguments
from ckpt2pt.formats.registry import read
from ckpt2pt.formats.state import state_of
from dist import CUT, TIED


def test_a_megatron_checkpoint_states_all_of_it() -> None:
    found = read(CUT / "A")
    state = state_of(found, None, iteration=None, zero_samples=False)
    assert found.template
    assert state.iteration == found.iteration == 2
    assert state.samples == found.template.args["consumed_train_samples"]
    assert state.step == 2
    assert {group["wd_mult"] for group in state.groups} == {0.0, 1.0}
    assert state.number("num_attention_heads") > 0
    assert state.scheduler == found.template.scheduler


def test_metadata_that_is_given_is_taken_at_the_time_of_the_checkpoint() -> None:
    given = read_arguments(CUT / "pt_meta", (0, 0))
    state = state_of(read(CUT / "ms"), given, iteration=None, zero_samples=False)
    assert (state.iteration, state.step) == (2, 2)
    assert state.samples == state.scheduler["num_steps"] == 2 * (given.global_batch_size or 0)
    assert state.where == given.path


def test_samples_are_zero_where_the_reference_is_followed() -> None:
    assert state_of(read(CUT / "A"), None, iteration=None, zero_samples=True).samples == 0


def test_without_metadata_a_training_of_mindspore_states_little(tmp_path: Path) -> None:
    state = state_of(read(CUT / "ms", tensor=2, pipeline=2), None, iteration=5, zero_samples=False)
    assert (state.iteration, state.groups, state.scheduler) == (5, (), {})


def test_metadata_of_another_model_is_refused() -> None:
    given = read_arguments(TIED / "pt_meta", (0, 0))
    with pytest.raises(FormatError, match="num_layers is 2, and the checkpoint has 4 layers"):
        state_of(read(CUT / "ms", tensor=2, pipeline=2), given, iteration=None, zero_samples=False)
