"""The commands as functions: the same results, with values instead of flags, and errors instead of exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ckpt2pt
from ckpt2pt.errors import InputError, MissingInputError, TopologyError, UsageError
from cutting import model, write_mindspore


@pytest.fixture(scope="module")
def sets(golden: Path) -> Path:
    return golden / "megatron06" / "b_tp2pp2"


def test_a_conversion_is_compared_with_its_source_and_with_megatrons(sets: Path, tmp_path: Path) -> None:
    outcome = ckpt2pt.convert(
        source=sets / "ms", metadata=str(sets / "pt_meta"), target=tmp_path / "out", verify="full"
    )
    assert (outcome.published, outcome.verified, outcome.target.iteration) == (True, "full", 2)
    assert ckpt2pt.verify(str(sets / "ms"), tmp_path / "out").same
    assert ckpt2pt.verify(sets / "A", tmp_path / "out", ignore=["/args", "/rng_state"], ignore_padding=True).rows == ()
    again = ckpt2pt.convert(source=sets / "ms", metadata=sets / "pt_meta", target=tmp_path / "out")
    assert (again.converted, len(again.kept)) == ((), 4)


def test_a_plan_is_what_the_conversion_does_in_either_direction(sets: Path, tmp_path: Path) -> None:
    forth = ckpt2pt.plan(source=sets / "ms", metadata=sets / "pt_meta", target=tmp_path / "out")
    back = ckpt2pt.plan(source=sets / "A", target=tmp_path / "ms", target_format="mindspore", target_tp=1, target_pp=1)
    forth.check()
    assert not list(tmp_path.iterdir())
    done = ckpt2pt.convert(source=sets / "ms", metadata=sets / "pt_meta", target=tmp_path / "out")
    assert forth.document["bytesToWrite"] == done.bytes_written
    done = ckpt2pt.convert(
        source=sets / "A", target=tmp_path / "ms", target_format="mindspore", target_tp=1, target_pp=1
    )
    assert back.document["bytesToWrite"] == done.bytes_written
    assert ckpt2pt.verify(sets / "A", tmp_path / "ms", tp=1, pp=1, ignore_padding=True).same


def test_a_format_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no format mindspored"):
        ckpt2pt.plan(source=tmp_path, target=tmp_path / "out", target_format="mindspored")  # type: ignore[arg-type]


def test_parameters_alone_are_converted(sets: Path, tmp_path: Path) -> None:
    ckpt2pt.convert(
        source=sets / "ms_params", metadata=sets / "pt_meta_params", target=tmp_path / "out", params_only=True
    )
    with ckpt2pt.open(tmp_path / "out") as checkpoint:
        assert (len(checkpoint), checkpoint.keys("exp_avg")) == (27, ())


def test_sizes_that_contradict_pt_meta_are_refused(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="pt_meta was written with tp 2, pp 2"):
        ckpt2pt.convert(source=sets / "ms", metadata=sets / "pt_meta", target=tmp_path / "out", tp=4)
    assert not (tmp_path / "out").exists()
    with pytest.raises(MissingInputError):
        ckpt2pt.convert(source=tmp_path / "none", metadata=sets / "pt_meta", target=tmp_path / "out")


def test_differences_are_rows(tmp_path: Path) -> None:
    one = write_mindspore(tmp_path / "one", model(), tp=2)
    other = write_mindspore(tmp_path / "other", {name: -array for name, array in model().items()}, tp=4)
    found = ckpt2pt.verify(one, other, tp=None, ignore=["exp_avg*"])
    assert not found.same
    assert {row.name.partition("/")[0] for row in found.rows} == {"param"}


def test_ranks_without_a_common_checkpoint_ask_for_their_sizes(tmp_path: Path) -> None:
    write_mindspore(tmp_path, model(), tp=2)
    file = tmp_path / "rank_1" / "network_rank_1-0_12.ckpt"
    file.rename(file.with_name("network_rank_1-0_13.ckpt"))
    with pytest.raises(UsageError, match="they have no checkpoint in common"):
        ckpt2pt.open(tmp_path)
    with pytest.raises(InputError, match="no checkpoint is complete on all ranks"):
        ckpt2pt.open(tmp_path, tp=2, pp=1)


def test_inspect_gives_its_document(sets: Path) -> None:
    found = ckpt2pt.inspect(sets / "ms")
    assert "MindSpore" in str(found["kind"])


def test_all_names_are_listed_and_load_on_demand() -> None:
    code = (
        "import sys, ckpt2pt; before = set(sys.modules); "
        "assert {'open', 'verify', 'plan', 'convert', 'inspect', 'Checkpoint', 'TensorInfo'} <= set(dir(ckpt2pt)); "
        "assert not any(name.startswith('ckpt2pt.') for name in before); "
        "assert all(callable(getattr(ckpt2pt, name)) for name in ckpt2pt.__all__ if name != '__version__')"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
