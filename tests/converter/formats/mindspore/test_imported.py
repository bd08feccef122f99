"""What of an imported rank is no tensor, and what is refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from ckpt2pt.core.extents import Extent, TensorRef
from ckpt2pt.core.topology import Topology
from ckpt2pt.errors import InputError, TopologyError
from ckpt2pt.formats.mindspore.imported import check_rank, missing_layers, scalar_entries

FIRST, SECOND = (
    "language_model.encoder.layers.0.input_norm.weight",
    "language_model.encoder.layers.1.mlp.dense_4h_to_h.weight",
)
CUT = Topology(num_layers=4, pipeline=2)


def weight(name: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> tuple[str, TensorRef]:
    return name, TensorRef(name, dtype, shape, (Extent("model", 0, 4),))


WEIGHTS = (weight(FIRST, (2,)), weight(SECOND, (2, 3)))


def check(weights: Any, **sizes: int) -> None:
    check_rank([weights], CUT, pp=1, sizes=sizes, where="here")


@pytest.mark.parametrize(
    ("weights", "error", "what"),
    [
        (WEIGHTS[:1], TopologyError, r"has layers \[0\], by the options it has \[0, 1\]"),
        ((WEIGHTS[0], weight(SECOND, (2, 3), "int8")), InputError, "of type int8"),
    ],
)
def test_a_rank_has_the_layers_of_its_stage_and_weights_of_float_types(weights: Any, error: Any, what: str) -> None:
    check(WEIGHTS)
    with pytest.raises(error, match=what):
        check(weights)


def test_shapes_are_those_of_the_arguments() -> None:
    with pytest.raises(TopologyError, match=r"input_norm\.weight has shape \[2\], the arguments give \[5\]"):
        check(WEIGHTS, hidden_size=5)


def test_layers_without_parameters_are_noop_layers() -> None:
    assert missing_layers({0: [FIRST]}, CUT, pp=1, where="here") == {3}
    with pytest.raises(TopologyError, match="holds a layer 1, by the options it has 1"):
        missing_layers({0: [SECOND]}, Topology(num_layers=2, pipeline=2), pp=0, where="here")


def scalars(
    groups: Any = (), scheduler: Any = None, iteration: int = 7
) -> dict[str, tuple[str, tuple[int, ...], object]]:
    found = scalar_entries(iteration, groups, scheduler or {}, where="here")
    codes = {"int64": "<q", "int32": "<i", "float32": "<f", "float64": "<d"}
    return {
        e.name: (e.dtype, e.shape, struct.unpack(codes[e.dtype], e.source)[0])
        for e in found
        if isinstance(e.source, bytes)
    }


def test_time_comes_first() -> None:
    assert list(scalars().items()) == [("step_num", ("int64", (), 7)), ("epoch_num", ("int64", (), 0))]


def test_groups_are_numbered_and_the_step_is_one_for_all() -> None:
    group = {"wd_mult": 1.0, "is_expert_parallel": False, "betas": (0.9, 0.95), "lr": 0.5, "step": 3}
    found = scalars([group, group | {"step": 4}])
    assert list(found)[2:] == [
        "wd_mult_group_0", "is_expert_parallel_group_0", "learning_rate_group_0", "state_step", "wd_mult_group_1",
        "is_expert_parallel_group_1", "learning_rate_group_1",
    ]  # fmt: skip
    assert found["state_step"] == ("float32", (1,), 4.0)
    assert found["is_expert_parallel_group_0"] == ("float32", (), 0.0)


def test_the_scheduler_has_the_types_of_the_reference() -> None:
    found = scalars(scheduler={"max_lr": 0.1, "lr_warmup_steps": 20.5, "num_steps": 2**31, "lr_decay_style": "cosine",
                               "wd_incr_style": "constant", "none": None, "other": 2})  # fmt: skip
    assert list(found.values())[2:] == [
        ("float64", (), 0.1), ("int32", (), 20), ("int64", (), 2**31), ("int32", (), 3), ("int32", (), 0), ("float32", (), 2.0),
    ]  # fmt: skip


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(InputError, match="lr_decay_style is 'steps'"):
        scalars(scheduler={"lr_decay_style": "steps"})
