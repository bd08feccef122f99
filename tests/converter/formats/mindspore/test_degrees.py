"""Which ranks are tensor and which pipeline parallel: known by the files, and proved where it is given."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest

from ckpt2pt.core.names import NameTable
from ckpt2pt.errors import Ckpt2ptError, InputError, MissingInputError, TopologyError, UsageError, refs
from ckpt2pt.formats.mindspore.degrees import check_ranks, find_layout
from ckpt2pt.formats.mindspore.ranks import find_sources
from ckpt2pt.formats.registry import read
from cutting import EMBEDDING, core_name, model, write_mindspore

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 2, 1), (1, 4, 3), (2, 2, 2), (8, 1, 1), (2, 4, 3)]


@pytest.mark.parametrize(("tp", "pp", "dp"), LAYOUTS)
def test_files_tell_the_degrees(tmp_path: Path, tp: int, pp: int, dp: int) -> None:
    write_mindspore(tmp_path, model(), tp=tp, pp=pp, dp=dp)
    found = find_layout(tmp_path, None, None, NameTable())
    # With one stage there is no rank whose number tells of data parallelism.
    assert (found.tensor, found.pipeline, found.data) == (tp, pp, dp if pp > 1 else 1)


@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 2), (4, 1)])
def test_folders_of_v2_tell_the_degrees(tmp_path: Path, tp: int, pp: int) -> None:
    write_mindspore(tmp_path, model(), tp=tp, pp=pp, v2=True)
    found = find_layout(tmp_path, None, None, NameTable())
    assert (found.tensor, found.pipeline) == (tp, pp)
    with pytest.raises(TopologyError, match=f"the tensor parallel size is {tp}, not 3"):
        find_layout(tmp_path, 3, None, NameTable())


def test_one_that_is_given_is_completed(tmp_path: Path) -> None:
    write_mindspore(tmp_path, model(), tp=2, pp=4)
    assert find_layout(tmp_path, None, 4, NameTable()).tensor == 2
    with pytest.raises(TopologyError, match="the pipeline parallel size is 4, not 2"):
        find_layout(tmp_path, None, 2, NameTable())


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "copies"), [(2, 2, 1, False), (2, 2, 2, True), (1, 2, 2, True), (4, 1, 2, True)]
)
def test_no_wrong_degrees_give_a_part_of_the_model(tmp_path: Path, tp: int, pp: int, dp: int, copies: bool) -> None:
    """Whatever is asked for, the checkpoint is read as it is or refused with a code that says so."""
    write_mindspore(tmp_path, model(), tp=tp, pp=pp, dp=dp, copies=copies)
    whole = {core_name(name): array.shape for name, array in model(moments=False).items()}
    for asked in itertools.product((1, 2, 3, 4), (1, 2, 3, 4)):
        if asked == (tp, pp):
            found = read(tmp_path, tensor=tp, pipeline=pp).index
            assert {key.name: tensor.fused for key, tensor in found.items() if key.role == "param"} == whole
        elif copies and asked == (tp * dp, pp):
            # Copies may be parts that are equal by chance: a warning.
            assert read(tmp_path, tensor=asked[0], pipeline=asked[1]).warnings
        else:
            with pytest.raises((InputError, MissingInputError)):
                read(tmp_path, tensor=asked[0], pipeline=asked[1])


def test_copies_of_data_parallel_ranks_do_not_tell_the_degrees(tmp_path: Path) -> None:
    write_mindspore(tmp_path, model(), tp=2, pp=2, dp=2, copies=True)
    with pytest.raises(UsageError, match=r"8 rank folders, .* some of them hold the same weights") as caught:
        find_layout(tmp_path, None, None, NameTable())
    assert refs("parallelism.tensor", "parallelism.pipeline") in caught.value.hint
    assert find_layout(tmp_path, 2, 2, NameTable()).data == 2


@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_a_missing_rank_is_named_where_the_degrees_are_given(tmp_path: Path, missing: int) -> None:
    write_mindspore(tmp_path, model(), tp=2, pp=2)
    shutil.rmtree(tmp_path / f"rank_{missing}")
    with pytest.raises(MissingInputError, match=f"rank_{missing} "):
        read(tmp_path, tensor=2, pipeline=2)


@pytest.mark.parametrize("missing", [0, 1, 2, 3, 4, 5, 6, 7])
def test_a_missing_rank_is_never_read_over(tmp_path: Path, missing: int) -> None:
    write_mindspore(tmp_path, model(), tp=2, pp=4)
    shutil.rmtree(tmp_path / f"rank_{missing}")
    with pytest.raises(Ckpt2ptError, match="rank") as caught:
        read(tmp_path)
    assert caught.value.exit_code in {64, 66}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_missing_stage_at_an_end_is_reported(tmp_path: Path, stage: int) -> None:
    write_mindspore(tmp_path, model(), tp=1, pp=4)
    shutil.rmtree(tmp_path / f"rank_{stage}")
    if stage == 0:
        for rank in (1, 2, 3):
            name = f"network_rank_{rank - 1}-0_12.ckpt"
            (tmp_path / f"rank_{rank}").rename(tmp_path / f"rank_{rank - 1}")
            next((tmp_path / f"rank_{rank - 1}").iterdir()).rename(tmp_path / f"rank_{rank - 1}" / name)
    with pytest.raises(MissingInputError, match=f"the {'last' if stage else 'first'} pipeline stage is missing"):
        read(tmp_path)


def test_a_rank_without_a_place_is_named(tmp_path: Path) -> None:
    layout = find_layout(write_mindspore(tmp_path, model(), tp=2, pp=2), 2, 2, NameTable())
    ((when, files),) = find_sources(tmp_path, layout).items()
    check_ranks(tmp_path, when, files, layout, NameTable())
    shutil.copytree(tmp_path / "rank_3", tmp_path / "rank_9")
    (tmp_path / "rank_9" / "network_rank_3-0_12.ckpt").rename(tmp_path / "rank_9" / "network_rank_9-0_12.ckpt")
    with pytest.raises(TopologyError, match="rank_9 hold parts of the checkpoint too, which have no place"):
        check_ranks(tmp_path, when, files, layout, NameTable())


def test_older_files_of_a_larger_run_are_not_looked_at(tmp_path: Path) -> None:
    write_mindspore(tmp_path, model(), tp=2, pp=2, dp=2, iteration=4)
    write_mindspore(tmp_path, model(), tp=2, pp=2, iteration=12)
    shutil.rmtree(tmp_path / "rank_4")
    shutil.rmtree(tmp_path / "rank_5")
    assert read(tmp_path, tensor=2, pipeline=2).iteration == 12


def test_a_file_in_the_place_of_another_is_a_warning(tmp_path: Path) -> None:
    write_mindspore(tmp_path, model(), tp=2, pp=2)
    assert read(tmp_path).warnings == ()
    (tmp_path / "rank_3" / "network_rank_3-0_12.ckpt").write_bytes(
        (tmp_path / "rank_2" / "network_rank_2-0_12.ckpt").read_bytes()
    )
    (warning,) = read(tmp_path, tensor=2, pipeline=2).warnings
    assert warning.startswith("rank_2/network_rank_2-0_12.ckpt and rank_3/network_rank_3-0_12.ckpt hold the same")


def test_constant_weights_say_nothing(tmp_path: Path) -> None:
    write_mindspore(tmp_path, {name: array * 0 for name, array in model().items()}, tp=2, pp=2)
    found = read(tmp_path, tensor=2, pipeline=2)
    assert (len(found.index), found.warnings) == (len(model()), ())


def test_pt_meta_beside_the_ranks_states_the_degrees(golden: Path, tmp_path: Path) -> None:
    folder = golden / "megatron06" / "b_tp2pp2"
    shutil.copytree(folder / "ms", tmp_path / "ms")
    shutil.copytree(folder / "pt_meta", tmp_path / "ms" / "pt_meta")
    assert find_layout(tmp_path / "ms", None, None, NameTable()).tensor == 2
    with pytest.raises(TopologyError, match="the tensor parallel size is 2, not 4") as caught:
        find_layout(tmp_path / "ms", 4, 1, NameTable())
    assert caught.value.where.endswith("pt_meta")


def test_descriptions_of_shards_tell_the_degrees(golden: Path) -> None:
    found = find_layout(golden / "megatron06" / "j_tp1pp2dp2" / "ms_zero_src", None, None, NameTable())
    assert (found.tensor, found.pipeline, found.data) == (1, 2, 2)


def test_degrees_below_one_are_refused(tmp_path: Path) -> None:
    write_mindspore(tmp_path, model(), tp=2)
    with pytest.raises(UsageError, match=r"parallelism\.pipeline is 0, and must be at least 1"):
        find_layout(tmp_path, 2, 0, NameTable())


def test_the_embedding_is_that_of_all_ranks(tmp_path: Path) -> None:
    write_mindspore(tmp_path, model(vocab=24), tp=8)
    shapes = {key.name: tensor.fused for key, tensor in read(tmp_path).index.items()}
    assert shapes[core_name(EMBEDDING)] == (24, 6)
