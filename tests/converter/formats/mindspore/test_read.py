"""MindSpore files of any layout and container are the same global tensors."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckpt2pt
from ckpt2pt.core.names import Rules
from ckpt2pt.core.tensor import Key
from ckpt2pt.errors import CoverageError, InputError, MissingInputError, UnmappedNameError
from ckpt2pt.formats.checkpoint import Checkpoint
from ckpt2pt.formats.registry import read
from ckpt2pt.library.checkpoint import Checkpoint as Opened
from cutting import HEAD, MOMENTS, core_name, model, write_mindspore

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tp": 2},
    {"tp": 4, "pp": 2},
    {"tp": 8},
    {"pp": 4},
    {"tp": 2, "pp": 2, "suffix": "safetensors"},
    {"tp": 2, "pp": 2, "v2": True},
    {"tp": 2, "v2": True, "suffix": "safetensors"},
    {"tp": 2, "pp": 2, "dp": 3},
]


def assert_is(found: Checkpoint, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    with Opened(found) as opened:
        for name, array in arrays.items():
            prefix = next((moment for moment in MOMENTS if name.startswith(moment)), "")
            role: Any = prefix.rstrip(".") or "param"
            got = opened.get(core_name(name.removeprefix(prefix)), role)
            assert got.dtype == array.dtype
            assert np.array_equal(got, array), name
        assert len(opened) * 3 == len(arrays)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True), (True, True)])
def test_any_layout_is_the_same_tensors(tmp_path: Path, layout: dict[str, Any], gated: bool, bias: bool) -> None:
    arrays = model(gated=gated, bias=bias)
    found = read(write_mindspore(tmp_path, arrays, gated=gated, **layout))
    assert (found.format, found.iteration) == ("mindspore", 12)
    assert (found.tensor, found.pipeline) == (layout.get("tp", 1), layout.get("pp", 1))
    assert_is(found, arrays)


def test_no_op_layers_leave_their_numbers_out(tmp_path: Path) -> None:
    arrays = {name: array for name, array in model().items() if "layers.2." not in name}
    assert_is(read(write_mindspore(tmp_path, arrays, tp=2, pp=2)), arrays)


def test_the_newest_that_all_ranks_have_is_read_unless_another_is_asked_for(tmp_path: Path) -> None:
    older = model()
    newer = {name: array + 1 for name, array in older.items()}
    write_mindspore(tmp_path, older, tp=2, iteration=4)
    write_mindspore(tmp_path, newer, tp=2, iteration=12)
    assert_is(read(tmp_path), newer)
    assert_is(read(tmp_path, iteration=4), older)
    with pytest.raises(MissingInputError, match="no checkpoints are of iteration 7; there are iterations 4, 12"):
        read(tmp_path, iteration=7)
    (tmp_path / "rank_1" / "network_rank_1-0_12.ckpt").unlink()
    assert read(tmp_path).iteration == 4


def test_several_iterations_of_v2_need_no_tracker(tmp_path: Path) -> None:
    for iteration in (4, 12):
        write_mindspore(tmp_path, model(), tp=2, iteration=iteration, v2=True)
    assert (read(tmp_path).iteration, read(tmp_path, iteration=4).iteration) == (12, 4)
    assert read(tmp_path / "iter_0000004").iteration == 4


def test_ranks_of_different_steps_are_refused(tmp_path: Path) -> None:
    write_mindspore(tmp_path / "a", model(), tp=2)
    write_mindspore(tmp_path / "b", model(), tp=2, iteration=13)
    shutil.copy(
        tmp_path / "b" / "rank_1" / "network_rank_1-0_13.ckpt", tmp_path / "a" / "rank_1" / "network_rank_1-0_12.ckpt"
    )
    with pytest.raises(InputError, match="ranks are at different steps: step_num is 12 and 13"):
        read(tmp_path / "a")


def test_a_rank_without_the_optimizer_is_refused(tmp_path: Path) -> None:
    write_mindspore(tmp_path / "a", model(), pp=2)
    write_mindspore(tmp_path / "b", model(moments=False), pp=2)
    name = "rank_1/network_rank_1-0_12.ckpt"
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(CoverageError, match="14 of 27 parameters have no exp_avg") as caught:
        read(tmp_path / "a", tensor=1, pipeline=2)
    assert caught.value.where == str(tmp_path / "a")


def test_a_name_that_nobody_knows_asks_for_a_rule(tmp_path: Path) -> None:
    arrays = model(moments=False)
    arrays["language_model.encoder.layers.0.attention.gate.weight"] = np.ones((4, 6), "<f4")
    write_mindspore(tmp_path, arrays, tp=2)
    with pytest.raises(UnmappedNameError, match=r"attention\.gate\.weight"):
        read(tmp_path)
    rules = Rules(layer_modules={"self_attention.gate": "attention.gate"})
    found = read(tmp_path, rules=rules).index[Key("param", "decoder.layers.0.self_attention.gate.weight")]
    assert (found.shape, len(found.views)) == ((2, 2, 6), 2)


def test_a_wrapped_model_is_read_by_its_bare_names(tmp_path: Path) -> None:
    arrays = model(moments=False)
    write_mindspore(tmp_path, {f"module.{name}": array for name, array in arrays.items()}, tp=2)
    with ckpt2pt.open(tmp_path) as checkpoint:
        assert np.array_equal(checkpoint[core_name(HEAD)], arrays[HEAD])


@pytest.mark.parametrize("layout", ["ms", "ms_zero_src", "ms_zero_merged", "ms_zero_merged_st"])
def test_shards_of_the_golden_set_are_its_tensors(golden: Path, layout: str) -> None:
    folder = golden / "megatron06" / "j_tp1pp2dp2"
    # Merged files lie in the folders of all ranks, and copies do not tell the degrees.
    degrees: Any = {"tp": 1, "pp": 2} if "merged" in layout else {}
    with ckpt2pt.open(folder / layout, **degrees) as one, ckpt2pt.open(folder / "A") as other:
        assert set(one) == set(other)
        for name in one:
            for role in ("main_param", "exp_avg", "exp_avg_sq"):
                found = [side.get(name, role).tobytes() for side in (one, other)]
                assert found[0] == found[1], (name, role)


def test_each_file_is_opened_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files may lie on network storage, where each opening is a round trip."""
    write_mindspore(tmp_path, model(), tp=2, pp=2)
    opened: Counter[str] = Counter()
    real = os.open

    def counted(path: Any, *args: Any, **more: Any) -> int:
        opened[str(path)] += 1
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", counted)
    read(tmp_path)
    assert len(opened) == 4
    assert max(opened.values()) <= 8
