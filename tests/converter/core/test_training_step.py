"""Which iteration a checkpoint is of."""

from __future__ import annotations

import pytest

from ckpt2pt.core.training_step import name_conflict, read_training_step
from ckpt2pt.errors import InputError, ref


@pytest.mark.parametrize(
    ("facts", "named", "iteration", "samples", "conflicts"),
    [
        pytest.param({"step_num": 2, "epoch_num": 0, "num_steps": 8, "state_step": 2}, None, 2, 8, 0, id="all-agree"),
        pytest.param(
            {"step_num": 3, "epoch_num": 2, "num_steps": 92}, (2, 3), 23, 92, 0, id="steps-restart-each-epoch"
        ),
        pytest.param({"iteration": 500, "step_num": 2, "epoch_num": 0}, None, 500, 2000, 1, id="entry-iteration-wins"),
        pytest.param(
            {"step_num": 7, "epoch_num": 0, "state_step": 6}, None, 7, 28, 0, id="mint-adamw-starts-at-minus-one"
        ),
        pytest.param({"step_num": 7, "epoch_num": 1, "state_step": 107}, None, 107, 428, 0, id="optimizer-counts"),
        pytest.param({}, (0, 40), 40, 160, 0, id="file-name-alone"),
        pytest.param({"step_num": 2, "epoch_num": 0, "num_steps": 12}, None, 2, 12, 1, id="samples-disagree"),
    ],
)
def test_the_evidence_is_weighed(
    facts: dict[str, float], named: tuple[int, int] | None, iteration: int, samples: int, conflicts: int
) -> None:
    training_step = read_training_step(facts, global_batch_size=4, named=named, where="f")
    assert (training_step.iteration, training_step.samples, len(training_step.conflicts)) == (
        iteration,
        samples,
        conflicts,
    )


@pytest.mark.parametrize("facts", [{}, {"step_num": 3.0, "epoch_num": 2.0}, {"num_steps": 9.0, "epoch_num": 1.0}])
def test_a_checkpoint_that_does_not_tell_is_refused(facts: dict[str, float]) -> None:
    with pytest.raises(InputError, match="tells its iteration") as caught:
        read_training_step(facts, global_batch_size=4, named=None, where="rank_0/network.ckpt")
    assert ref("source.iteration") in caught.value.hint


@pytest.mark.parametrize(
    ("named", "facts", "reported"),
    [
        ((0, 400), {"step_num": 2, "epoch_num": 0}, "named 0_400, and holds step_num 2"),
        ((1, 400), {"step_num": 400, "epoch_num": 0}, "named 1_400, and holds epoch_num 0"),
        ((0, 3), {"iteration": 2}, "named 0_3, and holds iteration 2"),
        ((1, 3), {"step_num": 3, "epoch_num": 1, "iteration": 23}, ""),
        ((0, 23), {"step_num": 3, "epoch_num": 1, "iteration": 23}, ""),
        ((0, 23), {"step_num": 3, "epoch_num": 1, "global_step": 23}, ""),
        ((0, 2), {"step_num": 2}, ""),
        ((0, 2), {}, ""),
        (None, {"step_num": 2}, ""),
    ],
)
def test_a_name_that_the_contents_contradict_is_reported(
    named: tuple[int, int] | None, facts: dict[str, float], reported: str
) -> None:
    assert name_conflict(named, facts) == reported


def test_a_name_that_the_contents_contradict_is_a_doubt() -> None:
    training_step = read_training_step({"step_num": 2, "epoch_num": 0}, global_batch_size=4, named=(0, 400), where="f")
    assert (training_step.iteration, training_step.conflicts) == (2, ("the file is named 0_400, and holds step_num 2",))
