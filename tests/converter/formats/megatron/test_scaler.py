"""The loss scale of an fp16 training: what a checkpoint states, what metadata states, what a run begins with."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from ckpt2pt.core.extents import Extent
from ckpt2pt.errors import FormatError
from ckpt2pt.formats.megatron.payload import Template
from ckpt2pt.formats.megatron.scaler import scaler_of, scaler_tree, stored_scaler
from ckpt2pt.formats.torchfile.trees import tensor

STATE = {"scale": 2048.0, "growth_tracker": 7, "hysteresis_tracker": 1}


def template(tmp_path: Path, scaler: Any, *, data: bytes = struct.pack("<2f", 1.0, 2048.0)) -> Template:
    path = tmp_path / "storage"
    path.write_bytes(data)
    tree: dict[str, Any] = {"iteration": 5, "optimizer": {"optimizer": {}, "grad_scaler": scaler}}
    return Template(path="source", tree=tree, storages={"7": Extent(str(path), 0, len(data))})


def stored(**more: Any) -> dict[str, Any]:
    return {**STATE, "scale": tensor("float32", "7", 2, 1, (1,)), **more}


def test_what_a_checkpoint_states_is_taken_as_it_is(tmp_path: Path) -> None:
    own, given = template(tmp_path, stored()), template(tmp_path, {**STATE, "scale": 4.0})
    assert stored_scaler(own) == STATE
    assert scaler_of(own, given, {}) == (STATE, "")


def test_an_older_state_without_a_count_of_overflows_begins_it_anew(tmp_path: Path) -> None:
    held = stored()
    del held["hysteresis_tracker"]
    assert stored_scaler(template(tmp_path, held)) == {**STATE, "hysteresis_tracker": 2}


def test_the_state_of_metadata_is_taken_with_the_iteration_that_it_is_of(tmp_path: Path) -> None:
    assert scaler_of(None, template(tmp_path, stored()), {}) == (
        STATE,
        "as the metadata has it, which is of iteration 5",
    )


@pytest.mark.parametrize(
    ("args", "expected", "said"),
    [
        ({}, {"scale": 2.0**32, "growth_tracker": 0, "hysteresis_tracker": 2}, "4294967296, as at the start of a run"),
        (
            {"initial_loss_scale": 65536, "hysteresis": 3, "loss_scale": None},
            {"scale": 65536.0, "growth_tracker": 0, "hysteresis_tracker": 3},
            "65536, as at the start of a run",
        ),
        ({"loss_scale": 128.0}, {}, "128.0, which does not change"),
    ],
)
def test_without_any_it_is_that_of_a_run_that_starts(args: dict[str, Any], expected: Any, said: str) -> None:
    found, why = scaler_of(None, None, args)
    assert found == expected
    assert why.startswith(said)


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(stored(scale="2048"), id="a-text"),
        pytest.param(stored(scale=tensor("float32", "8", 1, 0, (1,))), id="no-such-storage"),
        pytest.param(stored(scale=tensor("float16", "7", 2, 1, (1,))), id="another-type"),
        pytest.param(stored(scale=tensor("float32", "7", 2, 0, (2,))), id="two-elements"),
        pytest.param(stored(scale=float("inf")), id="infinite"),
        pytest.param(stored(scale=-1.0), id="negative"),
        pytest.param(stored(growth_tracker=None), id="no-growth"),
        pytest.param(stored(hysteresis_tracker=1.5), id="half-an-overflow"),
    ],
)
def test_what_is_no_loss_scale_is_refused(held: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not hold the state of a dynamic loss scale"):
        stored_scaler(template(tmp_path, held))


def test_a_training_with_two_optimizers_has_one_loss_scale(tmp_path: Path) -> None:
    found = template(tmp_path, stored())
    found.tree["optimizer"] = [found.tree["optimizer"], found.tree["optimizer"]]
    assert stored_scaler(found) == STATE


def test_no_entry_is_no_state(tmp_path: Path) -> None:
    assert stored_scaler(template(tmp_path, None)) is None


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    tree, storages = scaler_tree(STATE, "7")
    assert stored_scaler(template(tmp_path, tree, data=storages["7"])) == STATE
    assert scaler_tree({}, "7") == ({}, {})
